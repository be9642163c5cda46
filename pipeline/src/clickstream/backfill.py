"""The bounded job that judges records again: Silver of a range, from Bronze's bytes, with a version of the rules.

The new rows are computed beside those that are served and compared with them; then they take their place, in one commit
a table. `silver.backfills` has a row when a run begins to write, with the versions of both tables before it, and one
when it is done: a run that was interrupted between the two commits is known, and any run can be taken back while the
tables' retention keeps what was before.

It is safe beside the streams: it takes only offsets that the ledger has, which no stream writes again, and it holds the
lock of the accounting job, the only other writer there.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F  # noqa: N812

from clickstream import account, bronze, silver
from clickstream.account import POSITION, Range, where
from clickstream.errors import JobError
from clickstream.lake import Table, append_once, latest, locked, utc
from clickstream.session import spark_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyspark.sql import DataFrame, SparkSession

    from clickstream.settings import Settings

log = logging.getLogger("clickstream")

BACKFILLS = Table(
    "silver.backfills",
    """
    backfill_id STRING, state STRING, at TIMESTAMP, ruleset_version INT,
    ranges ARRAY<STRUCT<topic: STRING, partition: INT, start: BIGINT, end: BIGINT>>,
    events_version BIGINT, rejects_version BIGINT, backfill_date DATE
    """,
    partition_by=("backfill_date",),
)
BEGUN, DONE, ROLLING_BACK, ROLLED_BACK = "begun", "done", "rolling back", "rolled back"

# The place of a record that is in silver.events; else its disposition in silver.rejects.
EVENT = "event"
# How many of the records that change are named.
NAMED = 20


@dataclass(frozen=True)
class Line:
    """How many records go from one place to another, and the rules that say so: those that fail now, or did."""

    was: str
    becomes: str
    records: int
    codes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """`relabelled` counts the records that stay what they are and were judged by another version; `left_out` those of
    the time asked for that the ledger does not have yet; `hours` are those of Gold, from and to, that are to be
    computed again."""

    backfill_id: str
    ruleset_version: int
    ranges: list[Range]
    records: int
    lines: list[Line]
    first: list[str]
    relabelled: int
    left_out: int
    swapped: bool
    hours: tuple[str, str] | None

    @property
    def differences(self) -> int:
        return sum(line.records for line in self.lines)


def closed(
    spark: SparkSession, settings: Settings, start: datetime | None, end: datetime | None
) -> tuple[list[Range], int]:
    """The offsets of a time that the ledger has, and how many it does not have yet.

    They begin with a partition's first record of Kafka's time `start` or later, and end before its first of `end` or
    later, as Kafka's own offsetsForTimes has it: times need not be in the order of offsets, offsets always are.
    """

    def first(moment: datetime | None) -> Any:
        return F.min("offset" if moment is None else F.when(F.col("timestamp") >= F.lit(moment), F.col("offset")))

    rows = (
        bronze.CLICKSTREAM.read(spark, settings)
        .groupBy("topic", "partition")
        .agg(first(start).alias("start"), first(end).alias("end"), (F.max("offset") + 1).alias("all"))
        .join(account.accounted(spark, settings), ["topic", "partition"], "left")
        .collect()
    )
    found, left_out = [], 0
    for row in rows:
        if row["start"] is None:
            continue
        asked = row["all"] if end is None or row["end"] is None else row["end"]
        known = max(row["start"], min(asked, row["accounted"] or 0))
        left_out += asked - known
        if known > row["start"]:
            found.append(Range(row["topic"], row["partition"], row["start"], known))
    return sorted(found), left_out


@dataclass(frozen=True)
class Rows:
    """What Silver has of some offsets: rows of silver.events and of silver.rejects."""

    events: DataFrame
    rejects: DataFrame

    @classmethod
    def served(
        cls, spark: SparkSession, settings: Settings, ranges: Sequence[Range], events: int, rejects: int
    ) -> Rows:
        """As they were in these versions of the tables."""
        condition = where(ranges)
        return cls(
            silver.EVENTS.read(spark, settings, events).where(condition),
            silver.REJECTS.read(spark, settings, rejects).where(condition),
        )

    @classmethod
    def of(cls, judged: DataFrame, settings: Settings) -> Rows:
        """What the two tables have to say of records that were judged."""
        place = F.col("disposition")
        return cls(
            silver.events(judged.where(place == EVENT), settings),
            account.rejects(judged.where(place != EVENT), place, settings),
        )

    def places(self) -> DataFrame:
        """A row for each record: its position, its place, and what must be the same for it to be the same."""
        content = F.xxhash64("event_id", *account.CONTENT, "event_hour", "session_key")
        return self.events.select(
            *POSITION,
            F.lit(EVENT).alias("place"),
            F.array().cast("array<string>").alias("codes"),
            content.alias("content"),
            "event_time",
            "ruleset_version",
        ).unionByName(
            self.rejects.select(
                *POSITION,
                F.col("disposition").alias("place"),
                "codes",
                F.lit(None).cast("bigint").alias("content"),
                F.lit(None).cast("timestamp").alias("event_time"),
                "ruleset_version",
            )
        )


def judge(archived: DataFrame, served: DataFrame, others: DataFrame, settings: Settings) -> DataFrame:
    """The `disposition` of Bronze's records by the settings' rules, with what the rows of Silver are made of. Pure.

    `served` are their events that are in Silver, `others` those of all other records. An event that is in Silver and
    still valid stays one: an id that came back after the stream had forgotten it is there twice. Of several others with
    one id that of `others` counts, else the one that is in Silver, else the earliest.
    """
    known = served.select(*POSITION, F.lit(True).alias("served"))
    checked = account.judged(archived, settings).join(known, list(POSITION), "left").fillna(False, ["served"])
    invalid = checked.where(F.size("codes") > 0).withColumn("disposition", F.lit(silver.INVALID))
    place = F.col("disposition")
    return (
        account.classify(checked.where(F.size("codes") == 0), others)
        .withColumn("disposition", F.when(F.col("served") | (place == account.LATE), F.lit(EVENT)).otherwise(place))
        .unionByName(invalid)
    )


def _version(spark: SparkSession, settings: Settings, table: Table) -> int:
    return int(latest(spark, settings.table(table.name)).version())


def _compare(
    ranges: Sequence[Range], old: Rows, new: Rows
) -> tuple[list[Line], list[str], int, tuple[str, str] | None]:
    """What changes, by place; the first positions that do; how many only change their version; and Gold's hours.

    Raises JobError unless both have every offset of the ranges exactly once.
    """
    same = F.col("old.place").eqNullSafe(F.col("new.place"))
    for name in ("codes", "content"):
        same = same & F.col(f"old.{name}").eqNullSafe(F.col(f"new.{name}"))
    both = (
        old.places()
        .alias("old")
        .join(new.places().alias("new"), list(POSITION), "full_outer")
        .select(
            *POSITION,
            F.col("old.place").alias("was"),
            F.col("new.place").alias("becomes"),
            F.when(F.col("new.place") == silver.INVALID, F.col("new.codes"))
            .otherwise(F.coalesce("old.codes", F.array().cast("array<string>")))
            .alias("codes"),
            (~same).alias("differs"),
            (~F.col("old.ruleset_version").eqNullSafe(F.col("new.ruleset_version"))).alias("relabelled"),
            F.least("old.event_time", "new.event_time").alias("earliest"),
            F.greatest("old.event_time", "new.event_time").alias("latest"),
        )
        .persist()
    )
    try:
        total = both.agg(
            F.count("*").alias("rows"),
            F.count_if(F.col("was").isNull() | F.col("becomes").isNull()).alias("broken"),
            F.count_if(F.col("relabelled") & ~F.col("differs")).alias("relabelled"),
            F.min(F.when(F.col("differs"), F.col("earliest"))).alias("earliest"),
            F.max(F.when(F.col("differs"), F.col("latest"))).alias("latest"),
        ).first()
        assert total is not None
        expected = sum(r.end - r.start for r in ranges)
        if total["rows"] != expected or total["broken"]:
            raise JobError(
                f"{expected} offsets are asked for, but Bronze and Silver have {total['rows']} records of them, "
                f"{total['broken']} in one only; nothing was changed: find out what removed or doubled them first"
            )
        changed = both.where("differs")
        counts = changed.groupBy("was", "becomes").count().collect()
        codes = changed.select("was", "becomes", F.explode("codes").alias("code")).groupBy("was", "becomes", "code")
        by_rule: dict[tuple[str, str], dict[str, int]] = {}
        for row in codes.count().orderBy("code").collect():
            by_rule.setdefault((row["was"], row["becomes"]), {})[row["code"]] = row["count"]
        lines = [
            Line(row["was"], row["becomes"], row["count"], by_rule.get((row["was"], row["becomes"]), {}))
            for row in sorted(counts)
        ]
        first = [
            f"{row['topic']}/{row['partition']} offset {row['offset']}: {row['was']} becomes {row['becomes']}"
            + (f" ({', '.join(row['codes'])})" if row["codes"] else "")
            for row in (changed.orderBy(*POSITION).limit(NAMED).collect() if counts else [])
        ]
    finally:
        both.unpersist()
    hours = None
    if total["earliest"] is not None:
        start, end = (utc(total[name]).replace(minute=0, second=0, microsecond=0) for name in ("earliest", "latest"))
        hours = (f"{start:%Y-%m-%dT%H:%MZ}", f"{end + timedelta(hours=1):%Y-%m-%dT%H:%MZ}")
    return lines, first, total["relabelled"], hours


@dataclass(frozen=True)
class Entry:
    """A backfill that was not rolled back: what it wrote over, and whether it came to its end."""

    backfill_id: str
    done: bool
    began: datetime
    ruleset_version: int
    ranges: list[Range]
    events_version: int
    rejects_version: int

    def write(self, spark: SparkSession, settings: Settings, state: str) -> None:
        now = datetime.now(UTC)
        ranges = [(r.topic, r.partition, r.start, r.end) for r in self.ranges]
        row = (
            self.backfill_id, state, now, self.ruleset_version, ranges, self.events_version, self.rejects_version,
            now.date(),
        )  # fmt: skip
        entry = spark.createDataFrame([row], BACKFILLS.schema).coalesce(1)
        append_once(entry, settings.table(BACKFILLS.name), f"backfill/{self.backfill_id}/{state}", 1)

    def swap(self, spark: SparkSession, settings: Settings, rows: Rows) -> None:
        condition = where(self.ranges)
        silver.REJECTS.replace(rows.rejects.coalesce(settings.shuffle_partitions), settings, condition)
        silver.EVENTS.replace(rows.events.coalesce(settings.shuffle_partitions), settings, condition)


def last(spark: SparkSession, settings: Settings) -> Entry | None:
    """The latest backfill that was not rolled back."""
    found: dict[str, list[Any]] = {}
    for row in BACKFILLS.read(spark, settings).orderBy("at").collect():
        found.setdefault(row["backfill_id"], []).append(row)
    for rows in reversed(found.values()):
        states = {row["state"] for row in rows}
        if ROLLED_BACK in states:
            continue
        row = rows[0]
        return Entry(
            row["backfill_id"],
            DONE in states and ROLLING_BACK not in states,
            utc(row["at"]),
            row["ruleset_version"],
            [Range(*found) for found in row["ranges"]],
            row["events_version"],
            row["rejects_version"],
        )
    return None


def _ensure(spark: SparkSession, settings: Settings) -> None:
    for table in (*bronze.TABLES, *silver.TABLES, account.LEDGER, BACKFILLS):
        table.ensure(spark, settings)


def backfill(
    spark: SparkSession,
    settings: Settings,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    dry_run: bool = False,
) -> Report:
    """Judges the accounted records of a time by the settings' rules; unless it is a dry run, replaces what differs.

    Raises JobError when none of them is accounted for, or an earlier backfill was interrupted.
    """
    _ensure(spark, settings)
    before = last(spark, settings)
    if before and not before.done and not dry_run:
        raise JobError(
            f"the backfill that began at {before.began:%Y-%m-%dT%H:%M:%SZ} was interrupted while it wrote; take it "
            "back with `clickstream backfill --rollback`, then run this again"
        )
    ranges, left_out = closed(spark, settings, start, end)
    if not ranges:
        raise JobError(
            f"none of the {left_out} records of that time is in the ledger yet; run `clickstream account` first"
            if left_out
            else "Bronze has no records of that time"
        )
    entry = Entry(
        uuid.uuid4().hex,
        False,
        datetime.now(UTC),
        settings.ruleset_version,
        ranges,
        _version(spark, settings, silver.EVENTS),
        _version(spark, settings, silver.REJECTS),
    )
    log.info(
        "%d records of %d partitions, by rule set %d",
        sum(r.end - r.start for r in ranges),
        len(ranges),
        settings.ruleset_version,
    )
    served = Rows.served(spark, settings, ranges, entry.events_version, entry.rejects_version)
    with _judged(spark, settings, ranges, entry.events_version, served) as rows:
        return _replace(spark, settings, entry, served, rows, (BEGUN, DONE), left_out=left_out, dry_run=dry_run)


@contextlib.contextmanager
def _judged(
    spark: SparkSession, settings: Settings, ranges: list[Range], events_version: int, served: Rows
) -> Iterator[Rows]:
    """What Silver has of the ranges by the settings' rules, from Bronze's bytes."""
    condition = where(ranges)
    others = silver.EVENTS.read(spark, settings, events_version).where(f"NOT ({condition})")
    archived = bronze.CLICKSTREAM.read(spark, settings).where(condition)
    judged = judge(archived, served.events, others, settings).persist()
    try:
        yield Rows.of(judged, settings)
    finally:
        judged.unpersist()


def _replace(
    spark: SparkSession,
    settings: Settings,
    entry: Entry,
    served: Rows,
    rows: Rows,
    states: tuple[str, str],
    *,
    left_out: int = 0,
    dry_run: bool,
) -> Report:
    lines, first, relabelled, hours = _compare(entry.ranges, served, rows)
    swapped = bool(lines or relabelled) and not dry_run
    if swapped:
        entry.write(spark, settings, states[0])
        entry.swap(spark, settings, rows)
        entry.write(spark, settings, states[1])
    records = sum(r.end - r.start for r in entry.ranges)
    return Report(
        entry.backfill_id,
        entry.ruleset_version,
        entry.ranges,
        records,
        lines,
        first,
        relabelled,
        left_out,
        swapped,
        hours,
    )


def roll_back(spark: SparkSession, settings: Settings, *, dry_run: bool = False) -> Report:
    """Puts back what the latest backfill wrote over, be it done or interrupted. Records outside its ranges, also those
    that the streams added since, stay as they are. Raises JobError when there is none, or it is too long ago; one that
    was interrupted too long ago is closed by judging its records again by the settings' rules."""
    _ensure(spark, settings)
    entry = last(spark, settings)
    if entry is None:
        raise JobError("there is no backfill to roll back")
    kept = entry.began + timedelta(hours=settings.retention_hours)
    gone = datetime.now(UTC) > kept
    if gone and entry.done:
        raise JobError(
            f"the tables kept what was before the backfill of {entry.began:%Y-%m-%dT%H:%MZ} until "
            f"{kept:%Y-%m-%dT%H:%MZ}; judge the records again instead: "
            "`clickstream backfill --ruleset` with the version of before"
        )
    now = (_version(spark, settings, silver.EVENTS), _version(spark, settings, silver.REJECTS))
    served = Rows.served(spark, settings, entry.ranges, *now)
    # Where what was before is gone, the streams' rules say what is right: of events, each version is of one piece.
    restored = (
        _judged(spark, settings, entry.ranges, now[0], served)
        if gone
        else contextlib.nullcontext(
            Rows.served(spark, settings, entry.ranges, entry.events_version, entry.rejects_version)
        )
    )
    with restored as before:
        if entry.done:
            return _replace(spark, settings, entry, served, before, (ROLLING_BACK, ROLLED_BACK), dry_run=dry_run)
        # Between its two commits a record is in both tables or in none: there is nothing sound to compare with.
        if not dry_run:
            entry.swap(spark, settings, before)
            entry.write(spark, settings, ROLLED_BACK)
    records = sum(r.end - r.start for r in entry.ranges)
    return Report(entry.backfill_id, entry.ruleset_version, entry.ranges, records, [], [], 0, 0, not dry_run, None)


def as_dict(report: Report) -> dict[str, Any]:
    return asdict(report) | {"differences": report.differences}


def run(
    settings: Settings,
    ruleset_version: int,
    start: datetime | None,
    end: datetime | None,
    *,
    dry_run: bool,
    rollback: bool,
) -> dict[str, Any]:
    """Raises JobError when another run is there, or as `backfill` and `roll_back` do."""
    spark = spark_session(settings, "clickstream-backfill")
    try:
        with locked(spark, settings, account.LOCK):
            if rollback:
                return as_dict(roll_back(spark, settings, dry_run=dry_run))
            chosen = replace(settings, ruleset_version=ruleset_version)
            return as_dict(backfill(spark, chosen, start, end, dry_run=dry_run))
    finally:
        spark.stop()
