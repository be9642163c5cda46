"""The bounded job that accounts for every offset: what the stream dropped is classified and kept.

The stream's deduplication drops rows unseen. This job finds, in ranges that both Bronze and Silver have finished,
the offsets that are in neither silver.events nor silver.rejects, and puts each where it belongs:

  invalid                 fails a rule                                  -> silver.rejects
  duplicate               its event_id is known, with the same content  -> silver.rejects
  conflicting_duplicate   its event_id is known, with other content     -> silver.rejects
  late                    valid and unknown: older than the watermark   -> silver.events, and so Gold

Then it checks the conservation law, each offset exactly once in Bronze and exactly once in Silver, and writes the
ledger. It may be stopped at any point and run again: what is already in Silver is not missing any more. Two runs at
once would both add the same rows, so a run takes a lock in the lake.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from pyspark.sql import Window
from pyspark.sql import functions as F  # noqa: N812

from clickstream import bronze, checks, silver
from clickstream.errors import JobError
from clickstream.gold import in_utc
from clickstream.lake import Table, append_once, last_version, locked, on_file_system
from clickstream.marts import EVER, MartWriter, Part
from clickstream.rules import check
from clickstream.session import spark_session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyspark.sql import Column, DataFrame, SparkSession

    from clickstream.settings import Settings

log = logging.getLogger("clickstream")

LEDGER = Table(
    "silver.ledger",
    """
    accounted_at TIMESTAMP, topic STRING, partition INT, start_offset BIGINT, end_offset BIGINT,
    bronze BIGINT, events BIGINT, invalid BIGINT, duplicates BIGINT, conflicting BIGINT,
    late_added BIGINT, unexplained BIGINT, ledger_date DATE
    """,
    partition_by=("ledger_date",),
)

# Held by whatever must not run while late events are added to Silver.
LOCK = "account"
DUPLICATE = "duplicate"
CONFLICTING = "conflicting_duplicate"
LATE = "late"

POSITION = ("topic", "partition", "offset")
# Two events of one id are the same when these are, as values: 19.9 and 19.90 do not conflict.
CONTENT = (
    "event_time",
    "user_id",
    "session_id",
    "product_id",
    "product_category",
    "event_type",
    "device_type",
    "page_url",
    "price",
)
# How many unexplained offsets are named.
NAMED = 20
# Offsets are counted out in pieces of this size, so that a long range needs no long array.
PIECE = 100_000

Ends = dict[tuple[str, int], int]


@dataclass(frozen=True, order=True)
class Range:
    """Offsets of a partition, the end not included."""

    topic: str
    partition: int
    start: int
    end: int


def where(ranges: Sequence[Range]) -> str:
    """The condition on a table with records' positions; as literals, so that files with none of them are not read."""
    return " OR ".join(
        f"(topic = '{r.topic}' AND `partition` = {r.partition} AND `offset` >= {r.start} AND `offset` < {r.end})"
        for r in ranges
    )


@dataclass(frozen=True)
class Report:
    """The ledger's new rows, one a partition, and the first offsets nobody can explain. `late_added` counts the events
    that this run added to silver.events."""

    ledger: list[dict[str, Any]]
    unexplained: list[tuple[str, int, int]]


def _checkpoint(spark: SparkSession, settings: Settings, query: str) -> tuple[Any, Any]:
    """A query's checkpoint and its file system."""
    return on_file_system(spark, settings.checkpoint(query))


def _text(fs: Any, root: Any, name: str) -> str:
    """What a file of a checkpoint says."""
    stream = fs.open(root.suffix(f"/{name}"))
    try:
        return bytes(stream.readAllBytes()).decode()
    finally:
        stream.close()


def last_batch(spark: SparkSession, settings: Settings, query: str) -> list[str]:
    """What the checkpoint says of the last committed batch, by line; empty before the first.

    Of https://github.com/apache/spark: a batch N is committed when commits/N exists; offsets/N holds a version
    line, a line of metadata, and a line of JSON for each source.
    """
    root, fs = _checkpoint(spark, settings, query)
    commits = root.suffix("/commits")
    if not fs.exists(commits):
        return []
    batches = [int(name) for status in fs.listStatus(commits) if (name := status.getPath().getName()).isdigit()]
    if not batches:
        return []
    return _text(fs, root, f"offsets/{max(batches)}").strip().splitlines()


def _ends(line: str) -> Ends:
    """Offsets as Spark's source of Kafka writes them."""
    return {(topic, int(p)): int(end) for topic, found in json.loads(line).items() for p, end in found.items()}


def began(spark: SparkSession, settings: Settings, query: str) -> Ends:
    """With which offsets a stream that reads Kafka began, from its checkpoint, without partitions that came later.

    Of https://github.com/apache/spark, KafkaSourceInitialOffsetWriter: sources/0/0 holds a zero byte, a version line
    and a line of JSON.
    """
    root, fs = _checkpoint(spark, settings, query)
    if not fs.exists(root.suffix("/sources/0/0")):
        return {}
    return _ends(_text(fs, root, "sources/0/0").splitlines()[-1])


def committed(spark: SparkSession, settings: Settings, query: str) -> Ends:
    """Up to which offset (exclusive) a stream that reads Kafka has committed, from its checkpoint; empty before."""
    lines = last_batch(spark, settings, query)
    return _ends(lines[-1]) if lines else {}


def watermark(spark: SparkSession, settings: Settings, query: str) -> datetime | None:
    """The watermark by which a stream's last committed batch dropped late rows; None before the first batch."""
    lines = last_batch(spark, settings, query)
    return datetime.fromtimestamp(json.loads(lines[1])["batchWatermarkMs"] / 1000, UTC) if lines else None


def closed(spark: SparkSession, settings: Settings) -> Ends:
    """Up to which offset both Bronze and Silver have committed: nothing below will be written by them again."""
    archived = committed(spark, settings, bronze.QUERY)
    judged = committed(spark, settings, silver.QUERY)
    return {key: min(end, judged[key]) for key, end in archived.items() if key in judged}


def same(left: str, right: str) -> Column:
    """Whether two structs have the same content; a missing value equals a missing value."""
    result = F.lit(True)
    for name in CONTENT:
        result = result & F.col(f"{left}.{name}").eqNullSafe(F.col(f"{right}.{name}"))
    return result


def classify(candidates: DataFrame, known: DataFrame) -> DataFrame:
    """What each valid record that is not in Silver is: adds `disposition` to the candidates. Pure.

    Both have `event_id`, `kafka_timestamp`, the position and the content. The record that counts is the one that
    is known, else a candidate that is `served` (there already, and judged again), else the earliest: within a
    partition by offset, whatever the producer's clock said; between partitions by Kafka's time, then by partition.
    """
    content = F.struct(*CONTENT)
    columns = ["event_id", *POSITION, "kafka_timestamp", "own", "served"]
    mine = candidates.select("*", content.alias("own"), F.lit(False).alias("is_known"))
    theirs = (
        known.join(F.broadcast(candidates.select("event_id").distinct()), "event_id", "left_semi")
        .select("*", content.alias("own"), F.lit(True).alias("served"))
        .select(*columns, F.lit(True).alias("is_known"))
    )
    first = Window.partitionBy("event_id").orderBy(
        F.col("is_known").desc(), F.col("served").desc(), "reached", "partition", "offset"
    )
    # The latest time up to a record: it never goes back within a partition, so there the offset decides.
    reached = F.max("kafka_timestamp").over(Window.partitionBy("event_id", "topic", "partition").orderBy("offset"))
    judged = (
        mine.select(*columns, "is_known")
        .unionByName(theirs)
        .repartition("event_id")  # for both windows at once
        .withColumn("reached", reached)
        .withColumn("kept", F.first("own").over(first))
        .withColumn("place", F.row_number().over(first))
        .where(~F.col("is_known"))
        .select(
            *POSITION,
            F.when(F.col("place") == 1, F.lit(LATE))
            .when(same("own", "kept"), F.lit(DUPLICATE))
            .otherwise(F.lit(CONFLICTING))
            .alias("disposition"),
        )
    )
    return candidates.join(judged, list(POSITION))


def accounted(spark: SparkSession, settings: Settings) -> DataFrame:
    """Up to where each partition is accounted for: topic, partition, accounted (exclusive)."""
    # A range with something unexplained is looked at again, with all after it.
    return (
        LEDGER.read(spark, settings)
        .groupBy("topic", "partition")
        .agg(F.max_by(F.struct("start_offset", "end_offset", "unexplained"), "accounted_at").alias("last"))
        .select(
            "topic",
            "partition",
            F.when(F.col("last.unexplained") > 0, F.col("last.start_offset"))
            .otherwise(F.col("last.end_offset"))
            .alias("accounted"),
        )
    )


def _ranges(spark: SparkSession, settings: Settings, ends: Mapping[tuple[str, int], int]) -> list[Range]:
    """From where to where each partition is to be accounted for."""
    done = {(row["topic"], row["partition"]): row["accounted"] for row in accounted(spark, settings).collect()}
    # From Bronze's first offset by its checkpoint, not by its rows: that these begin later is a hole.
    start = began(spark, settings, bronze.QUERY) | done
    return [Range(*key, start.get(key, 0), end) for key, end in sorted(ends.items()) if end > start.get(key, 0)]


def _missing(spark: SparkSession, settings: Settings, ranges: Sequence[Range]) -> DataFrame:
    """Bronze's records that Silver has nowhere, with the rules' verdict."""
    condition = where(ranges)
    known = silver.EVENTS.read(spark, settings).where(condition).select(*POSITION)
    known = known.unionByName(silver.REJECTS.read(spark, settings).where(condition).select(*POSITION))
    archived = bronze.CLICKSTREAM.read(spark, settings).where(condition)
    return judged(archived.join(known, list(POSITION), "left_anti"), settings)


def judged(archived: DataFrame, settings: Settings) -> DataFrame:
    """Bronze's records with the rules' verdict and, where valid, the columns that `classify` asks for. Pure."""
    raw = archived.select(
        *POSITION,
        F.col("timestamp").alias("kafka_timestamp"),
        "timestamp_type",
        F.col("ingested_at").alias("received_at"),
        "key",
        "value",
    )
    return check(raw, settings).select(
        *POSITION, "kafka_timestamp", "timestamp_type", "received_at", "key", "value", "codes", "e", "event_time",
        F.col("amount").alias("price"), "e.event_id", "e.user_id", "e.session_id", "e.product_id",
        "e.product_category", "e.event_type", "e.device_type", "e.page_url",
    )  # fmt: skip


def rejects(rows: DataFrame, disposition: str | Column, settings: Settings) -> DataFrame:
    """What a bounded job writes to silver.rejects."""
    return rows.select(
        *POSITION,
        "kafka_timestamp",
        "timestamp_type",
        (F.lit(disposition) if isinstance(disposition, str) else disposition).alias("disposition"),
        "codes",
        F.lit(settings.ruleset_version).alias("ruleset_version"),
        F.current_timestamp().alias("rejected_at"),
        "key",
        "value",
        F.current_date().alias("reject_date"),
    )


def _writer(table: Table) -> str:
    return f"account/{table.name}"


def next_version(spark: SparkSession, settings: Settings, table: Table) -> int:
    """The number of this job's next append to a table."""
    return last_version(spark, settings.table(table.name), _writer(table)) + 1


def complete(spark: SparkSession, settings: Settings, ranges: Sequence[Range]) -> Counter[tuple[str, int]]:
    """Puts every offset of the ranges that Silver lacks where it belongs. Returns how many late events were added
    to each topic and partition."""
    # Before what is missing is asked for: of two runs that both ask, one finds its version taken and adds nothing.
    version = {table: next_version(spark, settings, table) for table in silver.TABLES}
    checked = _missing(spark, settings, ranges).persist()
    try:
        invalid = checked.where(F.size("codes") > 0)
        candidates = checked.where(F.size("codes") == 0).withColumn("served", F.lit(False))
        classified = classify(candidates, silver.EVENTS.read(spark, settings)).persist()
        try:
            late = classified.where(F.col("disposition") == LATE)
            found = classified.groupBy("disposition", "topic", "partition").count().collect()
            added = Counter(
                {(row["topic"], row["partition"]): row["count"] for row in found if row["disposition"] == LATE}
            )
            dropped = rejects(invalid, silver.INVALID, settings).unionByName(
                rejects(classified.where(F.col("disposition") != LATE), F.col("disposition"), settings)
            )
            refused = any(row["disposition"] != LATE for row in found) or not invalid.isEmpty()
            # Rejects first: what a crash leaves undone is missing still, and the next run finds it.
            for table, rows, some in (
                (silver.REJECTS, dropped, refused),
                (silver.EVENTS, silver.events(late, settings), bool(added)),
            ):
                if some:
                    append_once(rows.coalesce(1), settings.table(table.name), _writer(table), version[table])
        finally:
            classified.unpersist()
    finally:
        checked.unpersist()
    return added


def ledger(spark: SparkSession, settings: Settings, ranges: Sequence[Range]) -> tuple[DataFrame, DataFrame]:
    """The conservation law over these ranges: a row of counts for each, and the offsets that break it."""
    condition = where(ranges)
    archived = bronze.CLICKSTREAM.read(spark, settings).where(condition).select(*POSITION)
    events = silver.EVENTS.read(spark, settings).where(condition).select(*POSITION, F.lit("events").alias("kind"))
    refused = silver.REJECTS.read(spark, settings).where(condition)
    refused = refused.select(*POSITION, F.col("disposition").alias("kind"))
    rows = [(r.topic, r.partition, r.start, r.end) for r in ranges]
    expected = (
        spark.createDataFrame(rows, "topic STRING, partition INT, start BIGINT, end BIGINT")
        .select("topic", "partition", "end", F.explode(F.expr(f"sequence(start, end - 1, {PIECE})")).alias("at"))
        .repartition(spark.sparkContext.defaultParallelism)
        .select("topic", "partition", F.explode(F.expr(f"sequence(at, least(at + {PIECE}, end) - 1)")).alias("offset"))
    )
    in_bronze = archived.groupBy(*POSITION).agg(F.count("*").alias("bronze"))
    in_silver = (
        events.unionByName(refused)
        .groupBy(*POSITION)
        .agg(
            F.count("*").alias("silver"),
            *(
                F.count_if(F.col("kind") == kind).alias(name)
                for name, kind in (
                    ("events", "events"),
                    ("invalid", silver.INVALID),
                    ("duplicates", DUPLICATE),
                    ("conflicting", CONFLICTING),
                )
            ),
        )
    )
    counts = ("bronze", "silver", "events", "invalid", "duplicates", "conflicting")
    each = (
        expected.join(in_bronze, list(POSITION), "left")
        .join(in_silver, list(POSITION), "left")
        .fillna(0, list(counts))
        .withColumn("broken", (F.col("bronze") != 1) | (F.col("silver") != 1))
    )
    sums = each.groupBy("topic", "partition").agg(
        *(F.sum(name).alias(name) for name in counts if name != "silver"),
        F.count_if("broken").alias("unexplained"),
    )
    return sums, each.where("broken").select(*POSITION)


def account(spark: SparkSession, settings: Settings, ends: Mapping[tuple[str, int], int]) -> Report:
    """Accounts for every offset below `ends` that the ledger does not have yet."""
    for table in (*silver.TABLES, LEDGER):
        table.ensure(spark, settings)
    ranges = _ranges(spark, settings, ends)
    if not ranges:
        return Report([], [])
    log.info("%d offsets of %d partitions to account for", sum(r.end - r.start for r in ranges), len(ranges))
    added = complete(spark, settings, ranges)
    log.info("%d late events added to silver.events; counting every offset", added.total())
    version = next_version(spark, settings, LEDGER)
    sums, broken = ledger(spark, settings, ranges)
    counts = {(row["topic"], row["partition"]): row.asDict() for row in sums.collect()}
    now = datetime.now(UTC)
    listed = [
        counts[r.topic, r.partition]
        | {"start_offset": r.start, "end_offset": r.end, "late_added": added[r.topic, r.partition]}
        for r in ranges
    ]
    names = LEDGER.schema.names
    rows = [tuple((row | {"accounted_at": now, "ledger_date": now.date()})[name] for name in names) for row in listed]
    entries = spark.createDataFrame(rows, LEDGER.schema)
    append_once(entries.coalesce(1), settings.table(LEDGER.name), _writer(LEDGER), version)
    named: list[tuple[str, int, int]] = []
    if any(row["unexplained"] for row in listed):
        named = [tuple(row) for row in broken.orderBy(*POSITION).limit(NAMED).collect()]
    return Report([{name: row[name] for name in names if name in row} for row in listed], named)


def publish(spark: SparkSession, settings: Settings, marts: MartWriter) -> None:
    """Makes the mart quality.ledger hold the ledger's last days, whatever an earlier run left undone."""
    start = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start -= timedelta(days=settings.mart_retention_days)
    marts.ensure(checks.LEDGER)
    kept = LEDGER.read(spark, settings).where(F.col("ledger_date") >= F.lit(start.date()))
    rows = [in_utc(row) for row in kept.select(*checks.LEDGER.columns).collect()]
    marts.reconcile([Part(checks.LEDGER, lambda: rows, start, EVER[1])], swap=True)


def run(settings: Settings) -> dict[str, Any]:
    """Raises JobError when another run is there, or the streams have not committed anything to this lake."""
    spark = spark_session(settings, "clickstream-account")
    try:
        ends = closed(spark, settings)
        if not ends:
            raise JobError(f"neither Bronze nor Silver has committed a batch in {settings.lake_uri}; is it the lake?")
        with locked(spark, settings, LOCK):
            report = asdict(account(spark, settings, ends))
            if settings.marts_dsn:
                marts = MartWriter(settings.marts_dsn, application_name="clickstream-account")
                try:
                    publish(spark, settings, marts)
                except psycopg.OperationalError as error:
                    log.warning("the marts do not have the ledger yet, the next run has it: %s", str(error).strip())
                finally:
                    marts.close()
            return report
    finally:
        spark.stop()
