"""The `clickstream` command: the streams and every bounded job.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 a dry run found differences, 4 a gate refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import fields
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clickstream import __version__
from clickstream.errors import JobError, RefusedError
from clickstream.limits import ParameterError
from clickstream.settings import PREFIX, RULESET_VERSIONS, Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger("clickstream")

STREAMS = ("bronze", "silver", "gold", "gold_hourly")
# What `recompute` computes.
GOLD = ("gold.product_funnel_1m", "gold.product_funnel_1h", "gold.conversion_1h", "gold.sessions")
MINUTES = GOLD[0]
WITHOUT_SPARK = ("show", "latency", "report", "notify")
QUALITY_COLUMNS = ("check_name", "subject", "status", "value", "threshold")
# The settings that are worth a flag; every other one has its variable.
FLAGS = ("lake_uri", "bootstrap_servers", "topic", "spark_master", "marts_dsn", "status_dir")


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = sorted(set(names) - set(known))
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is not among {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write for example 2025-11-29T12:00Z") from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)


def _hour(text: str) -> datetime:
    moment = _moment(text)
    if moment.minute or moment.second or moment.microsecond:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole hour of UTC; write for example {moment:%Y-%m-%dT%H:00Z}"
        )
    return moment


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day; write for example 2025-11-29") from None


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return port


def _rows(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    variables = ", ".join(PREFIX + field.name.upper() for field in fields(Settings))
    parser = argparse.ArgumentParser(
        prog="clickstream",
        description="Runs the clickstream platform's streams and bounded jobs.",
        epilog=f"Settings come from the environment, flags win: {variables}.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    for name in FLAGS:
        common.add_argument(f"--{name.replace('_', '-')}", help=f"instead of {PREFIX}{name.upper()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    stream = commands.add_parser(
        "stream",
        parents=[common],
        help="run streams until stopped",
        description="Runs streams in one Spark application until SIGTERM; ends non-zero when one of them fails.",
    )
    stream.add_argument(
        "--queries",
        type=_some_of(STREAMS),
        default=list(STREAMS),
        help=f"comma-separated, of {', '.join(STREAMS)} (default: all)",
    )
    stream.add_argument(
        "--metrics-port",
        type=_port,
        default=0,
        metavar="PORT",
        help="answer a Prometheus at this port, path /metrics (default: do not)",
    )
    job = commands.add_parser(
        "compact",
        parents=[common],
        help="compact the lake's tables",
        description="Joins small files of every table. --vacuum refuses, before anything is done, while a stream has "
        "yet to read what is older than a table's retention, or a backfill that can be taken back needs it.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong usage; 4 vacuum was refused, and nothing was changed.",
    )
    job.add_argument(
        "--vacuum", action="store_true", help="also remove files past the tables' retention, and rows past the marts'"
    )
    job.add_argument("--json", action="store_true", help="print the result as JSON")
    account = commands.add_parser(
        "account",
        parents=[common],
        help="account for every offset",
        description="Classifies what the streams' deduplication dropped, adds late events to silver.events, and prints "
        "the ledger of the newly closed offsets. Exits 1, naming offsets, when one is unexplained.",
    )
    account.add_argument("--json", action="store_true", help="print the result as JSON")
    recompute = commands.add_parser(
        "recompute",
        parents=[common],
        help="compute Gold for a range of time again and repair what differs",
        description="Computes whole hours of Gold again from silver.events, compares them with what Delta and the marts"
        " serve, reports the differences, and replaces what differs: each table in one commit, all marts in one "
        "transaction. Only hours that the streams have finished are computed; later ones are left out, with a message. "
        "A visit in gold.sessions belongs to the hour it begins in, and is left out while it may go on.",
        epilog="Exit codes: 0 done, or a dry run found no difference; 1 failed; 2 wrong usage; 3 a dry run found "
        "differences; 4 there are more than --max-differences, and nothing was changed.",
    )
    recompute.add_argument(
        "--from", type=_hour, required=True, metavar="T", dest="start", help="first hour, for example 2025-11-29T12:00Z"
    )
    recompute.add_argument("--to", type=_hour, required=True, metavar="T", dest="end", help="end, not included")
    recompute.add_argument(
        "--tables",
        type=_some_of(GOLD),
        default=list(GOLD),
        help=f"comma-separated, of {', '.join(GOLD)} (default: all)",
    )
    recompute.add_argument("--dry-run", action="store_true", help="report the differences and change nothing")
    recompute.add_argument(
        "--max-differences",
        type=_count,
        metavar="N",
        help="change nothing when more rows than this differ, in Delta and the marts together; visits that are new in "
        "gold.sessions, which no stream writes, do not count (default: no limit)",
    )
    recompute.add_argument("--json", action="store_true", help="print the report as JSON")
    backfill = commands.add_parser(
        "backfill",
        parents=[common],
        help="judge records again, by another version of the rules",
        description="Judges the records of a range of Kafka's time again from Bronze's bytes, compares with "
        "silver.events and silver.rejects, reports what changes its place and by which rules, and replaces the rows of "
        "the range in both tables. Only offsets that `clickstream account` has accounted for are taken. Gold follows "
        "with `clickstream recompute`, for the hours that are printed at the end.",
        epilog="Exit codes: 0 done, or a dry run found nothing to change; 1 failed; 2 wrong usage; 3 a dry run found "
        "something to change.",
    )
    backfill.add_argument(
        "--ruleset",
        type=int,
        choices=RULESET_VERSIONS,
        help="version of the rules (default: CLICKSTREAM_RULESET_VERSION, by which the streams judge)",
    )
    backfill.add_argument(
        "--from", type=_moment, metavar="T", dest="start", help="begin, of Kafka's time (default: the first record)"
    )
    backfill.add_argument(
        "--to", type=_moment, metavar="T", dest="end", help="end, not included (default: the last record)"
    )
    backfill.add_argument(
        "--rollback", action="store_true", help="put back what the latest backfill replaced, while the tables keep it"
    )
    backfill.add_argument("--dry-run", action="store_true", help="report what would change and change nothing")
    backfill.add_argument("--json", action="store_true", help="print the report as JSON")
    alerts = commands.add_parser(
        "alerts",
        parents=[common],
        help="find products with high interest and low conversion",
        description="Folds the funnel's minutes that became final since the last run, and prints the episodes of "
        "gold.product_alerts that are open or were closed in them. CLICKSTREAM_ALERT_* set the detector's parameters.",
    )
    alerts.add_argument("--rebuild", action="store_true", help="fold the whole funnel anew, after it was corrected")
    alerts.add_argument("--json", action="store_true", help="print the result as JSON")
    quality = commands.add_parser(
        "quality",
        parents=[common],
        help="measure freshness, holes, nulls, rejects and volume",
        description="Measures how fresh each layer is, whether Bronze's offsets have holes, whether tables have their "
        "columns and no nulls, each rule's part of the records and the volume against their own history. "
        "Every result is a row of quality.checks in the marts. CLICKSTREAM_QUALITY_* set the limits.",
        epilog="Exit codes: 0 nothing fails; 1 failed; 2 wrong usage or settings; 4 a check fails, named on stderr.",
    )
    quality.add_argument("--json", action="store_true", help="print the results as JSON")
    notify = commands.add_parser(
        "notify",
        parents=[common],
        help="put what people should know into the outbox, once",
        description="Looks through the marts for new and closed episodes of gold.product_alerts, categories whose "
        "conversion dropped, revenue that stalled and checks of the newest `clickstream quality` that fail. Each is "
        "put once into alerts.outbox, from where Airflow delivers it, and printed when it is new. Needs no Spark. "
        "CLICKSTREAM_NOTIFY_* set what counts as a drop and a stall.",
    )
    notify.add_argument("--json", action="store_true", help="print the result as JSON")
    report = commands.add_parser(
        "report",
        parents=[common],
        help="write the report of a day",
        description="Writes DIR/YYYY-MM-DD/report.html, a page without outside parts, with the day's funnel, its top "
        "products, products of high interest and low conversion, data quality and the ledger; beside it funnel.csv, "
        "products.csv and quality.csv; and DIR/index.html, which lists the days. All is read from the marts; a second "
        "run replaces the files. Needs no Spark.",
    )
    report.add_argument("--date", type=_day, metavar="YYYY-MM-DD", help="day of UTC (default: yesterday)")
    report.add_argument("--output", metavar="DIR", help=f"folder of all reports (default: {PREFIX}REPORT_DIR)")
    report.add_argument("--json", action="store_true", help="print the result as JSON")
    show = commands.add_parser(
        "show",
        parents=[common],
        help="show the newest windows of the product funnel",
        description="Prints rows of the mart gold.product_funnel_1m, newest window first.",
    )
    show.add_argument("--limit", type=_rows, default=20, help="rows to print (default: %(default)s)")
    show.add_argument("--count", action="store_true", help="print only how many rows there are")
    latency = commands.add_parser(
        "latency",
        parents=[common],
        help="measure seconds from event to mart",
        description="Watches the topic and the mart, and prints the seconds from an event's timestamp to its count.",
    )
    latency.add_argument("--seconds", type=float, default=60, help="how long to watch (default: %(default)s)")
    latency.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _print_table(rows: Sequence[dict[str, Any]], otherwise: str = "no rows yet") -> None:
    if not rows:
        print(otherwise)
        return
    header = list(rows[0])
    cells = [header, *[[str(row[name]) for name in header] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for line in cells:
        first, *rest = zip(line, widths, strict=True)
        print("  ".join([f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in rest)]))


def _show(settings: Settings, limit: int, count_only: bool) -> int:
    import psycopg

    from clickstream import gold

    mart = gold.FUNNEL_1M.mart
    table = f"{mart.schema}.{mart.name}"
    query = f"SELECT * FROM {table} ORDER BY window_start DESC, views DESC, product_id LIMIT {limit}"
    with psycopg.connect(settings.marts_dsn) as connection:
        connection.execute("SET TIME ZONE 'UTC'")
        found = connection.execute("SELECT to_regclass(%s)", [table]).fetchone()
        if found is None or found[0] is None:
            print(0 if count_only else f"{table} does not exist yet; the gold stream makes it when it starts")
            return 0
        if count_only:
            print(*(connection.execute(f"SELECT count(*) FROM {table}").fetchone() or (0,)))
            return 0
        cursor = connection.execute(query)
        names = [column.name for column in cursor.description or ()]
        _print_table([dict(zip(names, row, strict=True)) for row in cursor])
    return 0


def _report(report: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(report))
    elif report["ledger"]:
        _print_table(report["ledger"])
    else:
        print("no offset was closed since the last run")
    for topic, partition, offset in report["unexplained"]:
        print(f"clickstream: unexplained: {topic}/{partition} offset {offset}", file=sys.stderr)
    return 1 if report["unexplained"] else 0


def _print_recomputed(report: dict[str, Any], as_json: bool) -> int:
    changed = [line for line in report["lines"] if line["missing"] or line["surplus"] or line["differing"]]
    if as_json:
        print(json.dumps(report))
    else:
        _print_table([{name: value for name, value in line.items() if name != "first"} for line in report["lines"]])
        for line in report["lines"]:
            for key in line["first"]:
                print(f"{line['table']} ({line['place']}) differs at {key}")
        done = "replaced" if report["swapped"] else "nothing was changed"
        print(f"{report['start']} to {report['end']}: {report['differences']} differences, {done}")
    if report["swapped"] and any(line["table"] == MINUTES and line["place"] == "delta" for line in changed):
        print(
            "clickstream: final minutes changed, and gold.product_alerts was found in those of before; to find its "
            "episodes anew: clickstream alerts --rebuild",
            file=sys.stderr,
        )
    if report["refused"]:
        print(
            f"clickstream: {report['unexpected']} differences are more than --max-differences allows: nothing was "
            "changed. The report names the first of each table: find out what wrote them (late events and a backfill "
            "are good reasons, a damaged table is not); then replace them with the same command without "
            "--max-differences",
            file=sys.stderr,
        )
    if report["left_out"]:
        print(
            f"clickstream: {report['left_out']} visits that may still go on are left out; a later run has them",
            file=sys.stderr,
        )
    if report["end"] != report["asked"]:
        print(
            f"clickstream: {report['end']} to {report['asked']} is left out: not final yet; run it again later",
            file=sys.stderr,
        )
    if report["refused"]:
        return 4
    return 3 if report["differences"] and not report["swapped"] else 0


def _print_backfilled(report: dict[str, Any], as_json: bool, streams: int, rollback: bool) -> int:
    if as_json:
        print(json.dumps(report))
    else:
        _print_table(
            [
                line | {"codes": ", ".join(f"{code} {n}" for code, n in line["codes"].items())}
                for line in report["lines"]
            ],
            "no record changes its place",
        )
        for name in report["first"]:
            print(name)
        for found in report["ranges"]:
            print(f"{found['topic']}/{found['partition']}: offsets {found['start']} to {found['end'] - 1}")
        done = "replaced" if report["swapped"] else "nothing was changed"
        print(
            f"rule set {report['ruleset_version']}{' taken back' if rollback else ''}: {report['records']} records, "
            f"{report['differences']} differences, {report['relabelled']} with another version only, {done}"
        )
    if report["left_out"]:
        print(
            f"clickstream: {report['left_out']} records are left out: not accounted for yet; run "
            "`clickstream account`, then this again",
            file=sys.stderr,
        )
    if report["swapped"]:
        if report["hours"]:
            start, end = report["hours"]
            print(f"clickstream: now run: clickstream recompute --from {start} --to {end}", file=sys.stderr)
        if not rollback:
            print("clickstream: to take it back: clickstream backfill --rollback", file=sys.stderr)
            if streams != report["ruleset_version"]:
                print(
                    f"clickstream: the streams judge by rule set {streams}; they take this one with "
                    f"pipeline_settings: {{ruleset_version: {report['ruleset_version']}}} and a deployment",
                    file=sys.stderr,
                )
        return 0
    return 3 if report["differences"] or report["relabelled"] else 0


def _print_quality(report: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(report))
    else:
        _print_table([{name: check[name] for name in QUALITY_COLUMNS} for check in report["checks"]])
    failed = [check for check in report["checks"] if check["status"] == "fail"]
    for check in failed:
        print(f"clickstream: {check['check_name']} of {check['subject']}: {check['detail']}", file=sys.stderr)
    return 4 if failed else 0


def _marts_away(settings: Settings, error: Exception) -> int:
    print(
        f"clickstream: the marts cannot be used with {settings.marts_dsn!r}: {str(error).strip()}; nothing more was "
        "changed, run it again when PostgreSQL answers (`nodectl status postgresql`)",
        file=sys.stderr,
    )
    return 1


# What Spark's message has in it, and what an operator does about it.
SPARK_FIXES = (
    (("No space left on device", "Disk quota exceeded"), "make room on the lake's disk"),
    (
        ("Permission denied", "AccessControlException"),
        "run it as a user of the lake's group, as the `clickstream` command does",
    ),
    (
        ("FAILED_READ_FILE", "FileNotFoundException", "FILE_NOT_EXIST", "is not a Parquet file", "ChecksumException"),
        "a table's file is missing or damaged, and the log names it: put it back from a copy, or RESTORE the table "
        "with `spark-sql` to a version before it was lost",
    ),
    (
        ("All masters are unresponsive", "Initial job has not accepted"),
        "see `nodectl status`: Spark has no room or is away",
    ),
)


def _spark_failed(error: Exception) -> int:
    log.error("Spark failed", exc_info=error)
    text = str(error)
    # Of a Java exception Python's bridge tells first where it was called.
    lines = [line.lstrip(": ").strip() for line in text.splitlines() if not line.startswith("An error occurred while")]
    said = next(filter(None, lines), type(error).__name__)[:300]
    fix = next((fix for signs, fix in SPARK_FIXES if any(sign in text for sign in signs)), "the log above says more")
    print(f"clickstream: Spark failed: {said}; {fix}, then run this again", file=sys.stderr)
    return 1


def _told(settings: Settings, job: Callable[[], int]) -> int:
    """The job's exit code; what an operator can mend is told in a line."""
    from psycopg import OperationalError

    try:
        return job()
    except (JobError, ParameterError, SettingsError) as error:
        print(f"clickstream: {error}", file=sys.stderr)
        if isinstance(error, RefusedError):
            return 4
        return 1 if isinstance(error, JobError) else 2
    except OperationalError as error:
        return _marts_away(settings, error)


def _without_spark(args: argparse.Namespace, settings: Settings) -> int:
    """The jobs that need the marts and Kafka only."""
    if args.command == "show":
        return _show(settings, args.limit, args.count)
    if args.command == "latency":
        from clickstream import latency

        result = latency.measure(settings, args.seconds)
        print(json.dumps(result)) if args.json else _print_table([result])
        return 1 if result["missing"] else 0
    if args.command == "report":
        from clickstream import report

        day = args.date or (datetime.now(UTC) - timedelta(days=1)).date()
        written = report.run(settings, day, Path(args.output or settings.report_dir))
        print(json.dumps(written)) if args.json else print(*written["files"], sep="\n")
        return 0
    from clickstream import notify

    found = notify.run(settings)
    if args.json:
        print(json.dumps(found))
    else:
        _print_table([{"kind": new["kind"], "message": new["message"]} for new in found["new"]], "nothing new")
    return 0


def _with_spark(args: argparse.Namespace, settings: Settings) -> int:
    """The jobs that read or write the lake; 128 and the signal's number when told to stop."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    from clickstream import stopping

    with stopping.in_order():
        try:
            return _run(args, settings)
        except (PySparkException, Py4JJavaError) as error:
            number = stopping.told()
            if number is None:
                return _spark_failed(error)
            print(f"clickstream: {args.command} was told to stop; run it again to go on", file=sys.stderr)
            return 128 + number


def _run(args: argparse.Namespace, settings: Settings) -> int:
    if args.command == "account":
        from clickstream import account

        return _report(account.run(settings), args.json)
    if args.command == "recompute":
        from clickstream import recompute

        span = recompute.Span(args.start, args.end)
        found = recompute.run(settings, span, args.tables, dry_run=args.dry_run, max_differences=args.max_differences)
        return _print_recomputed(found, args.json)
    if args.command == "backfill":
        from clickstream import backfill

        report = backfill.run(
            settings,
            args.ruleset or settings.ruleset_version,
            args.start,
            args.end,
            dry_run=args.dry_run,
            rollback=args.rollback,
        )
        return _print_backfilled(report, args.json, settings.ruleset_version, args.rollback)
    if args.command == "alerts":
        from clickstream import alerts

        episodes = alerts.run(settings, rebuild=args.rebuild)
        if args.json:
            print(json.dumps(episodes, default=str))
        else:
            _print_table(episodes, "no product stands out")
        return 0
    if args.command == "compact":
        from clickstream import compact

        results = compact.run(settings, args.vacuum)
        if args.json:
            print(json.dumps(results))
        else:
            _print_table(results)
        return 0
    if args.command == "quality":
        from clickstream import quality

        return _print_quality(quality.run(settings), args.json)
    raise AssertionError(args.command)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "recompute" and args.start >= args.end:
        parser.error(f"--from {args.start:%Y-%m-%dT%H:%MZ} is not before --to {args.end:%Y-%m-%dT%H:%MZ}")
    if args.command == "backfill":
        if args.rollback and (args.ruleset or args.start or args.end):
            parser.error("--rollback takes the latest backfill as it was: without --ruleset, --from and --to")
        if args.start and args.end and args.start >= args.end:
            parser.error(f"--from {args.start.isoformat()} is not before --to {args.end.isoformat()}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("clickstream").setLevel(logging.INFO)
    for noisy in ("kafka", "py4j"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    try:
        settings = Settings.from_env(**{name: getattr(args, name) for name in FLAGS})
    except SettingsError as error:
        print(f"clickstream: {error}", file=sys.stderr)
        return 2
    if args.command == "report" and not (args.output or settings.report_dir):
        parser.error(f"give the folder of the reports: --output DIR, or {PREFIX}REPORT_DIR")
    if args.command in WITHOUT_SPARK:
        return _told(settings, lambda: _without_spark(args, settings))
    # Spark is imported after the settings are known to be good, so that a wrong one is told at once.
    if args.command == "stream":
        from clickstream import streams

        return streams.run(settings, args.queries, args.metrics_port)
    return _told(settings, lambda: _with_spark(args, settings))


if __name__ == "__main__":
    sys.exit(main())
