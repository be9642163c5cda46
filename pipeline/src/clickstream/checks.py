"""The checks of data quality: what is measured, what is judged of it, and where the results are kept. No Spark.

A check says pass, warn or fail of one subject: a layer, a table, a partition, a rule. Everything that has a history is
judged against its own, by confidence bounds or robust deviations, never by an absolute number alone; where there is too
little history the check passes and says so.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

from clickstream.detector import interest_z, wilson_upper
from clickstream.marts import Mart, MartWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import psycopg

    from clickstream.limits import QualityLimits

PASS, WARN, FAIL = "pass", "warn", "fail"
# How many offsets or columns are named.
NAMED = 5

CHECKS = Mart(
    schema="quality",
    name="checks",
    columns=("run_id", "checked_at", "check_name", "subject", "status", "value", "threshold", "detail"),
    key=("run_id", "check_name", "subject"),
    ddl=(
        """CREATE TABLE IF NOT EXISTS {table} (
            run_id     uuid             NOT NULL,
            checked_at timestamptz      NOT NULL,
            check_name text             NOT NULL,
            subject    text             NOT NULL,
            status     text             NOT NULL CHECK (status IN ('pass', 'warn', 'fail')),
            value      double precision,
            threshold  double precision,
            detail     text             NOT NULL,
            PRIMARY KEY (run_id, check_name, subject)
        )""",
        "CREATE INDEX IF NOT EXISTS checks_at ON {table} (checked_at)",
        "CREATE INDEX IF NOT EXISTS checks_subject ON {table} (check_name, subject, checked_at)",
    ),
    time="checked_at",
)


# What `clickstream account` found, as silver.ledger has it.
LEDGER = Mart(
    schema="quality",
    name="ledger",
    columns=(
        "accounted_at",
        "topic",
        "partition",
        "start_offset",
        "end_offset",
        "bronze",
        "events",
        "invalid",
        "duplicates",
        "conflicting",
        "late_added",
        "unexplained",
    ),
    key=("accounted_at", "topic", "partition"),
    ddl=(
        """CREATE TABLE IF NOT EXISTS {table} (
            accounted_at timestamptz NOT NULL,
            topic        text        NOT NULL,
            partition    int         NOT NULL,
            start_offset bigint      NOT NULL,
            end_offset   bigint      NOT NULL,
            bronze       bigint      NOT NULL,
            events       bigint      NOT NULL,
            invalid      bigint      NOT NULL,
            duplicates   bigint      NOT NULL,
            conflicting  bigint      NOT NULL,
            late_added   bigint,
            unexplained  bigint      NOT NULL,
            updated_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (accounted_at, topic, partition)
        )""",
        # Of a release that did not count them.
        "ALTER TABLE {table} ADD COLUMN IF NOT EXISTS late_added bigint",
    ),
    time="accounted_at",
)


@dataclass(frozen=True)
class Check:
    """A result. `value` and `threshold` are in the check's own unit, which `detail` names; None where there is none."""

    check_name: str
    subject: str
    status: str
    value: float | None
    threshold: float | None
    detail: str


def freshness(subject: str, age: timedelta | None, allowed: timedelta, fix: str) -> Check:
    """Seconds since something was last seen to go on; None is never. More than half of what is allowed is a warning."""
    if age is None:
        return Check("freshness", subject, FAIL, None, allowed.total_seconds(), f"it has no rows; {fix}")
    status = FAIL if age > allowed else WARN if 2 * age > allowed else PASS
    detail = f"{age.total_seconds():.0f} s behind, {allowed.total_seconds():.0f} s are allowed"
    return Check(
        "freshness", subject, status, round(age.total_seconds(), 3), allowed.total_seconds(),
        detail if status == PASS else f"{detail}; {fix}",
    )  # fmt: skip


def continuity(subject: str, offsets: int, holes: Sequence[tuple[int, int]], repeated: Sequence[int]) -> Check:
    """Whether a partition's offsets follow each other, once each; holes are (first, last) and both are complete."""
    missing = sum(last - first + 1 for first, last in holes)
    problems = [f"{missing} missing: {_named(f'{a}' if a == b else f'{a} to {b}' for a, b in holes)}"] if holes else []
    problems += [f"{len(repeated)} there twice: {_named(map(str, repeated))}"] if repeated else []
    if not problems:
        return Check("continuity", subject, PASS, 0, 0, f"{offsets} offsets without a hole")
    problems.append(
        "find out what changed bronze.clickstream (its history names the commits); `clickstream account` says what "
        "it means for Silver"
    )
    return Check("continuity", subject, FAIL, missing + len(repeated), 0, "; ".join(problems))


def _named(values: Iterable[str]) -> str:
    found = list(values)
    return ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")


def schema(subject: str, declared: Mapping[str, str], present: Mapping[str, str]) -> Check:
    """Whether a table has the columns that the package declares, by name and type."""
    wrong = [
        f"{name} is {present.get(name, 'absent')}, not {kind}"
        for name, kind in declared.items()
        if present.get(name) != kind
    ]
    wrong += [f"{name} is not declared" for name in present if name not in declared]
    detail = f"{len(declared)} columns as declared"
    if wrong:
        detail = f"{_named(wrong)}; deploy the release that wrote the table, or move the table away"
    return Check("schema", subject, FAIL if wrong else PASS, len(wrong), 0, detail)


def nulls(subject: str, rows: int, found: Mapping[str, int]) -> Check:
    """Null values in columns that always have one, in recent rows: column to count."""
    wrong = {name: count for name, count in found.items() if count}
    detail = f"none in {rows} recent rows"
    if wrong:
        named = _named(f"{name} {count}" for name, count in sorted(wrong.items()))
        detail = f"{named}, in {rows} recent rows; only the package's jobs write this table: find out what else did"
    return Check("nulls", subject, FAIL if wrong else PASS, sum(wrong.values()), 0, detail)


def reject_rates(
    limits: QualityLimits, recent: Mapping[str, int], records: int, history: Mapping[str, int], past_records: int
) -> list[Check]:
    """For each rule, and for all together ("any rule"), its part of the recent records against its part of the history.

    The counts are of records that failed the rule. Value and threshold are parts of all records.
    """
    z = NormalDist().inv_cdf(limits.confidence)
    found = []
    for code in sorted({*recent, *history}):
        now, before = recent.get(code, 0), history.get(code, 0)
        if records < limits.min_records or past_records < records:
            why = f"{records} recent records are too few" if past_records >= records else "too little history"
            found.append(Check("reject_rate", code, PASS, now / records if records else None, None, why))
            continue
        least = 1 - wilson_upper(records - now, records, z)
        most = wilson_upper(before, past_records, z)
        higher = least > most
        status = FAIL if higher and least > limits.reject_factor * most and least > limits.reject_rate else PASS
        status = WARN if higher and status == PASS else status
        detail = f"{now} of {records} records fail it ({now / records:.2%}); before {before / past_records:.2%}"
        if status != PASS:
            detail += "; silver.rejects has the records, rules.py the rule: ask who sends them"
        threshold = max(limits.reject_factor * most, limits.reject_rate)
        found.append(Check("reject_rate", code, status, now / records, threshold, detail))
    return found


def volume(limits: QualityLimits, recent: int, same_time: Sequence[int], before: Sequence[int]) -> Check:
    """Records in the recent window against windows of the history: those of the same time of day on earlier days,
    where there are three of them, else all. The value is the ratio to their median."""
    daily = len(same_time) >= 3
    others = same_time if daily else before
    if len(before) < limits.min_windows:
        return Check("volume", "bronze.clickstream", PASS, None, None, f"{recent} records; too little history")
    middle = median(others)
    z = interest_z(recent, others)
    factor = max(recent, 1) / max(middle, 1)
    apart = max(factor, 1 / factor) > limits.volume_factor
    status = PASS if abs(z) <= limits.volume_z else FAIL if apart else WARN
    detail = (
        f"{recent} records in {limits.window_minutes} minutes, where {middle:.0f} are usual "
        f"({'at this time of day' if daily else 'all windows'}; z {z:.1f})"
    )
    if status != PASS:
        detail += "; see whether the shop or a campaign says so, then `make lag` and the producers"
    return Check(
        "volume", "bronze.clickstream", status, round(recent / max(middle, 1), 4), limits.volume_factor, detail
    )


def store(marts: MartWriter, limits: QualityLimits, checked_at: datetime, checks: Sequence[Check]) -> str:
    """Writes a run's results and removes those past their retention; returns the run's id."""
    run_id = str(uuid.uuid4())
    marts.ensure(CHECKS)

    def work(connection: psycopg.Connection[Any]) -> None:
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO quality.checks "
                "(run_id, checked_at, check_name, subject, status, value, threshold, detail) VALUES ("
                "%(run_id)s, %(checked_at)s, %(check_name)s, %(subject)s, %(status)s, %(value)s, "
                "%(threshold)s, %(detail)s) ON CONFLICT DO NOTHING",
                [asdict(check) | {"run_id": run_id, "checked_at": checked_at} for check in checks],
            )
        connection.execute(
            "DELETE FROM quality.checks WHERE checked_at < %s", (checked_at - timedelta(days=limits.retention_days),)
        )

    marts.transact(work)
    return run_id
