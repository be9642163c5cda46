"""The batch layer: what differs is found, named and repaired; what is not final is left alone."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import Topic, event
from delta.tables import DeltaTable
from pyspark.errors import PySparkException
from test_gold import Gold, at

from clickstream import cli, compact, gold, recompute, sessions, silver, streams
from clickstream.errors import JobError
from clickstream.recompute import Span

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from clickstream.settings import Settings

NOON = datetime(2025, 11, 29, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
AFTERNOON = Span(NOON, NOON + 3 * HOUR)


def differences(report: recompute.Report) -> dict[str, tuple[int, int, int]]:
    """Missing, surplus and differing rows by table and place, where there are any."""
    counts = {f"{line.table} {line.place}": (line.missing, line.surplus, line.differing) for line in report.lines}
    return {name: count for name, count in counts.items() if any(count)}


def test_late_events_and_damage_are_found_named_and_repaired(spark: SparkSession, settings: Settings, dsn: str) -> None:
    shop = Gold(spark, settings, dsn)

    def run(*, dry_run: bool = False) -> recompute.Report:
        return recompute.recompute(spark, shop.settings, AFTERNOON, dry_run=dry_run)

    # The newest event, less ten minutes of watermark, is in the hour of 14:00; one visit begins at 13:55 and goes on.
    shop.append(at(1, "12:00:10"), at(2, "12:40:00", event_type="purchase"), at(3, "13:55:00"), at(4, "14:15:00"))
    shop.run()

    # Visits are new in any run, and nothing to stop at.
    report = recompute.recompute(spark, shop.settings, AFTERNOON, ["gold.sessions"], dry_run=True, max_differences=0)
    assert (report.refused, report.unexpected, report.differences) == (False, 0, 4)
    # The first run: the funnel per minute is right, the other tables were never made.
    report = run()
    assert (report.end, report.asked, report.swapped) == ("2025-11-29T14:00Z", "2025-11-29T15:00Z", True)
    # 13:55 goes on at 14:15, which is not final.
    assert report.left_out == 1
    assert differences(report) == {
        f"gold.{name} {place}": (rows, 0, 0)
        for name, rows in (("product_funnel_1h", 2), ("conversion_1h", 4), ("sessions", 2))
        for place in ("delta", "mart")
    }

    # Late events in final windows, which make two visits one; a wrong figure and a wrong key in the mart; a row that
    # Delta lost.
    shop.append(at(5, "12:20:00", event_type="add_to_cart"), at(6, "13:00:00", product_id="prod_0001"))
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE gold.product_funnel_1m SET views = 99 WHERE window_start = '2025-11-29T13:55Z'")
        connection.execute(
            "UPDATE gold.conversion_1h SET value = 'fridge' WHERE dimension = 'device' AND window_start = %s", [NOON]
        )
    spark.sql(f"DELETE FROM delta.`{settings.table('gold.sessions')}` WHERE session_start = '2025-11-29T12:00:10Z'")
    found = run(dry_run=True)
    assert not found.swapped
    assert differences(found) == {
        # 12:20 and 13:00
        "gold.product_funnel_1m delta": (2, 0, 0),
        # and the wrong figure
        "gold.product_funnel_1m mart": (2, 0, 1),
        # another product at 13:00, another cart at 12:00
        "gold.product_funnel_1h delta": (1, 0, 1),
        "gold.product_funnel_1h mart": (1, 0, 1),
        # Home and mobile of both hours
        "gold.conversion_1h delta": (0, 0, 4),
        "gold.conversion_1h mart": (1, 1, 3),
        # from 12:00:10 to 13:00 it is one visit now, not two
        "gold.sessions delta": (1, 1, 0),
        "gold.sessions mart": (0, 1, 1),
    }
    (line,) = (line for line in found.lines if (line.table, line.place) == ("gold.product_funnel_1m", "mart"))
    assert line.first == [
        "2025-11-29T12:20:00Z, prod_0007",
        "2025-11-29T13:00:00Z, prod_0001",
        "2025-11-29T13:55:00Z, prod_0007",
    ]
    assert differences(run()) == differences(found), "a dry run changes nothing"
    assert run().differences == 0

    # The mart and Delta agree with a recount; the stream, which comes to the late events now, changes nothing.
    shop.check()
    served = shop.mart()
    shop.run()
    assert shop.mart() == served
    shop.check()


def test_a_corrupted_partition_is_refused_and_nothing_is_changed(
    spark: SparkSession, settings: Settings, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Gold(spark, settings, dsn)
    shop.append(*(at(n, f"12:{n:02d}:00") for n in range(9)), at(9, "13:30:00"))
    shop.run()

    def run(limit: int | None = None, *, dry_run: bool = False) -> recompute.Report:
        hour = Span(NOON, NOON + HOUR)
        return recompute.recompute(
            spark, shop.settings, hour, ["gold.product_funnel_1m"], dry_run=dry_run, max_differences=limit
        )

    def served_marts() -> list[Any]:
        with psycopg.connect(dsn) as connection:
            return connection.execute("SELECT * FROM gold.product_funnel_1m ORDER BY window_start").fetchall()

    def served() -> tuple[Any, ...]:
        return served_marts(), sorted(gold.FUNNEL_1M.table.read(spark, settings).collect())

    def version() -> int:
        return int(DeltaTable.forPath(spark, table).history(1).collect()[0]["version"])

    table = settings.table("gold.product_funnel_1m")
    assert run(0).differences == 0
    # Six minutes of Delta, and one row of the mart: a cause for neither is known.
    spark.sql(f"UPDATE delta.`{table}` SET revenue = revenue + 1000 WHERE minute(window_start) < 6")
    with psycopg.connect(dsn) as connection:
        connection.execute("DELETE FROM gold.product_funnel_1m WHERE window_start = %s", [NOON])
    before, at_version = served(), version()
    report = run(6)
    assert (report.differences, report.refused, report.swapped) == (7, True, False)
    assert differences(report) == {"gold.product_funnel_1m delta": (0, 0, 6), "gold.product_funnel_1m mart": (1, 0, 0)}
    assert (served(), version()) == (before, at_version)
    # A dry run says the same, and seven are not more than seven.
    assert run(6, dry_run=True).refused
    report = run(7)
    assert (report.refused, report.swapped) == (False, True)
    assert run(0).differences == 0
    shop.check()

    # And one that cannot be read at all.
    before = served()
    (file,) = gold.FUNNEL_1M.table.read(spark, settings).limit(1).inputFiles()[:1]
    data = Path(file.removeprefix("file:"))
    data.write_bytes(data.read_bytes()[:100])
    spark.catalog.clearCache()
    with pytest.raises(PySparkException) as failed:
        run(0)
    assert served_marts() == before[0]
    assert cli._spark_failed(failed.value) == 1
    said = capsys.readouterr().err
    assert "a table's file is missing or damaged, and the log names it: put it back from a copy, or RESTORE" in said


def test_what_the_marts_keep_no_more_is_not_missed_in_them(spark: SparkSession, settings: Settings, dsn: str) -> None:
    shop = Gold(spark, replace(settings, mart_retention_days=8), dsn)
    december = NOON.replace(month=12, day=9)
    shop.append(at(1, "12:00:10"))
    shop.append(*(event(n, timestamp=f"2025-12-09T0{n}:30:00Z") for n in (0, 3)), sent=december)
    shop.run()
    asked = Span(NOON, december.replace(hour=2))
    recompute.recompute(spark, shop.settings, asked)
    with psycopg.connect(dsn) as connection:
        starts = "SELECT to_char(window_start AT TIME ZONE 'UTC', 'MM-DD HH24') FROM gold.product_funnel_1h ORDER BY 1"
        assert connection.execute(starts).fetchall() == [("11-29 12",), ("12-09 00",)]
        compact.expire(shop.settings)
        assert connection.execute(starts).fetchall() == [("12-09 00",)]
    report = recompute.recompute(spark, shop.settings, asked)
    assert report.differences == 0
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE gold.product_funnel_1h SET views = 99")
    found = recompute.recompute(spark, shop.settings, asked)
    assert differences(found) == {"gold.product_funnel_1h mart": (0, 0, 1)}


def test_a_late_event_joins_visits_across_the_ends_of_a_range(
    spark: SparkSession, settings: Settings, dsn: str
) -> None:
    shop = Gold(spark, settings, dsn)

    def visits(start: int) -> list[tuple[str, int]]:
        span = Span(NOON + start * HOUR, NOON + (start + 1) * HOUR)
        recompute.recompute(spark, shop.settings, span, ["gold.sessions"])
        rows = sessions.TABLE.read(spark, settings).orderBy("session_start").collect()
        return [(f"{row['session_start']:%H:%M}", row["events"]) for row in rows]

    shop.append(at(1, "12:50:00"), at(2, "13:25:00"), at(9, "16:00:00", user_id="user_0002"))
    visits(0)
    assert visits(1) == [("12:50", 1), ("13:25", 1)]
    shop.append(at(3, "13:05:00"))
    assert visits(1) == [("12:50", 3)]
    shop.append(at(4, "12:25:00"), at(5, "13:50:00"))
    assert visits(0) == [("12:25", 5)]


def test_the_watermark_of_silvers_last_batch_bounds_what_is_final(
    spark: SparkSession, settings: Settings, dsn: str
) -> None:
    Gold(spark, settings, dsn).append(at(1, "12:00:00"), at(2, "14:30:00"))
    assert recompute.horizon(spark, settings) == NOON + timedelta(hours=2, minutes=20)
    root = Path(settings.checkpoint("silver").removeprefix("file://"))
    for folder, text in (("commits", "v1\n{}"), ("offsets", 'v1\n{"batchWatermarkMs":1764420000000}\n{"t":{"0":1}}')):
        (root / folder).mkdir(parents=True)
        (root / folder / "7").write_text(text)
    assert recompute.horizon(spark, settings) == datetime(2025, 11, 29, 12, 40, tzinfo=UTC)


def test_a_visit_is_the_same_in_whatever_range(spark: SparkSession, settings: Settings) -> None:
    """Computed by ranges that cut through visits, a robot's of more than a day too."""
    day = NOON.replace(hour=0)

    def visit(number: int, minutes: int, user: str) -> dict[str, Any]:
        return event(number, timestamp=(day + timedelta(minutes=minutes)).isoformat(), user_id=user)

    robot = [visit(n, 29 * n, "user_0009") for n in range(60)]
    people = [visit(100 + n, n * 37 % 1800, f"user_{n % 3:04d}") for n in range(90)]
    records = silver.received(Topic(spark).records([*robot, *people], at=day + timedelta(days=2)))
    events = silver.events(silver.judge(records, settings), settings).persist()
    horizon = day + timedelta(days=3)

    def visits(*bounds: int) -> list[Any]:
        spans = [Span(day + a * HOUR, day + b * HOUR) for a, b in itertools.pairwise(bounds)]
        target = recompute.TARGETS["gold.sessions"]
        assert target.settled is not None
        found = [target.rows(events, span).where(target.settled(horizon)).collect() for span in spans]
        return sorted(row for rows in found for row in rows)

    whole = visits(-24, 48)
    # every 29 minutes
    assert max(row["events"] for row in whole) == 50
    assert whole == sorted(sessions.sessions(events).collect())
    assert visits(-24, 1, 12, 13, 48) == whole
    events.unpersist()


@pytest.mark.parametrize(
    ("until", "end"),
    [(NOON + HOUR, NOON + HOUR), (NOON + timedelta(minutes=119), NOON + HOUR), (NOON + 9 * HOUR, NOON + 3 * HOUR)],
)
def test_only_final_hours_are_computed(until: datetime, end: datetime) -> None:
    assert recompute.final(AFTERNOON, until) == Span(NOON, end)


def test_a_range_without_a_final_hour_is_refused() -> None:
    with pytest.raises(JobError, match=r"no hour from 2025-11-29T12:00Z is final.*2025-11-29T12:59:59Z"):
        recompute.final(AFTERNOON, NOON + HOUR - timedelta(seconds=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from yesterday --to 2025-11-29", "'yesterday' is not a time; write for example 2025-11-29T12:00Z"),
        ("--from 2025-11-29T12:30Z --to 2025-11-30", "not a whole hour of UTC; write for example 2025-11-29T12:00Z"),
        ("--from 2025-11-29T12:00+05:30 --to 2025-11-30", "not a whole hour of UTC"),
        ("--from 2025-11-29T12:00Z --to 2025-11-29T12:00Z", "2025-11-29T12:00Z is not before --to"),
        ("--from 2025-11-29 --to 2025-11-30 --tables gold.alerts", "gold.alerts is not among gold.product_funnel_1m"),
        ("--from 2025-11-29", "--to"),
        ("--from 2025-11-29 --to 2025-11-30 --max-differences -1", "'-1' is not a whole number of 0 or more"),
    ],
)
def test_a_wrong_range_is_told_before_anything_starts(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["recompute", *words.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "missing", "code"),
    [
        ("", 1, 0),
        ("--dry-run", 1, 3),
        ("--dry-run", 0, 0),
        ("--max-differences 0", 1, 4),
        ("--max-differences 1", 1, 0),
    ],
)
def test_the_command_reports_and_says_by_its_exit_code_whether_to_act(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    missing: int,
    code: int,
) -> None:
    def run(
        settings: Settings, asked: Span, names: list[str], *, dry_run: bool, max_differences: int | None
    ) -> dict[str, Any]:
        assert (asked, names) == (AFTERNOON, ["gold.sessions"])
        line = recompute.Line("gold.sessions", "mart", 7, missing, 0, 0, ["2025-11-29T12:00:00Z, user_0001"] * missing)
        refused = max_differences is not None and missing > max_differences
        swapped = not dry_run and not refused
        report = recompute.Report(
            "2025-11-29T12:00Z", "2025-11-29T14:00Z", "2025-11-29T15:00Z", swapped, 2, [line], refused
        )
        return recompute.as_dict(report)

    monkeypatch.setattr(recompute, "run", run)
    span = "--from 2025-11-29T12:00Z --to 2025-11-29T16:00+01:00"
    command = ["recompute", *f"{span} --tables gold.sessions --lake-uri file:///lake {words}".split()]
    assert cli.main(command) == code
    said = capsys.readouterr()
    assert f"{missing} differences" in said.out
    assert ("gold.sessions (mart) differs at 2025-11-29T12:00:00Z, user_0001" in said.out) == bool(missing)
    assert "2025-11-29T14:00Z to 2025-11-29T15:00Z is left out" in said.err
    assert "2 visits that may still go on are left out" in said.err
    assert ("more than --max-differences allows: nothing was changed" in said.err) == (code == 4)
    assert cli.main([*command, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["differences"] == missing


def test_the_command_line_knows_every_query_and_table() -> None:
    assert streams.QUERIES == cli.STREAMS
    assert tuple(recompute.TARGETS) == cli.GOLD
