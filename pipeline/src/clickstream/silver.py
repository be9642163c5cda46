"""Silver: typed events that pass every rule, once each; and rejects, raw, with all their reasons.

One query writes both tables from one micro-batch, each with the batch's identity, so that a batch that failed
between the two writes completes when it is replayed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from pyspark.sql import functions as F  # noqa: N812

from clickstream import metrics
from clickstream.lake import Appender, Table, query_id
from clickstream.rules import PRICE_TYPE, check
from clickstream.session import batch_clock, kafka_stream

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming.readwriter import DataStreamWriter

    from clickstream.settings import Settings

QUERY = "silver"

EVENTS = Table(
    "silver.events",
    f"""
    event_id STRING, event_time TIMESTAMP, user_id STRING, session_id STRING, product_id STRING,
    product_category STRING, event_type STRING, device_type STRING, page_url STRING, price {PRICE_TYPE},
    topic STRING, partition INT, offset BIGINT, kafka_timestamp TIMESTAMP,
    ruleset_version INT, processed_at TIMESTAMP, event_date DATE,
    event_hour INT, session_key STRING
    """,
    partition_by=("event_date",),
    pruned_by=("event_time", "partition", "offset", "kafka_timestamp", "processed_at"),
)
REJECTS = Table(
    "silver.rejects",
    """
    topic STRING, partition INT, offset BIGINT, kafka_timestamp TIMESTAMP, timestamp_type INT,
    disposition STRING, codes ARRAY<STRING>, ruleset_version INT, rejected_at TIMESTAMP,
    key BINARY, value BINARY, reject_date DATE
    """,
    partition_by=("reject_date",),
    pruned_by=("partition", "offset", "kafka_timestamp", "rejected_at"),
)
TABLES = (EVENTS, REJECTS)

INVALID = "invalid"


def between(events: DataFrame, start: datetime, end: datetime) -> DataFrame:
    """The events of a time, its end not included; the dates prune partitions."""
    last = end - timedelta(microseconds=1)
    return events.where(
        F.col("event_date").between(F.lit(start.date()), F.lit(last.date()))
        & (F.col("event_time") >= F.lit(start))
        & (F.col("event_time") < F.lit(end))
    )


def received(records: DataFrame) -> DataFrame:
    """Kafka's records with the names Silver uses and the batch's clock."""
    return records.select(
        "topic",
        "partition",
        "offset",
        F.col("timestamp").alias("kafka_timestamp"),
        F.col("timestampType").alias("timestamp_type"),
        batch_clock().alias("received_at"),
        "key",
        "value",
    )


def judge(raw: DataFrame, settings: Settings) -> DataFrame:
    """Every record with its codes and, when valid, its typed event.

    An invalid record has no event time, so it neither moves the watermark nor can be late, and a dedup key of
    its own, so deduplication keeps it. A valid one leaves its raw bytes behind: Bronze has them.
    """
    valid = F.size("codes") == 0
    return check(raw, settings).select(
        F.when(valid, F.col("e.event_id"))
        .otherwise(F.concat_ws("/", F.lit("invalid"), "topic", "partition", "offset"))
        .alias("dedup_key"),
        F.when(valid, F.col("event_time")).alias("event_time"),
        F.when(valid, F.col("e")).alias("e"),
        F.when(valid, F.col("amount")).alias("price"),
        "codes",
        "topic",
        "partition",
        "offset",
        "kafka_timestamp",
        "timestamp_type",
        "received_at",
        F.when(~valid, F.col("key")).alias("key"),
        F.when(~valid, F.col("value")).alias("value"),
    )


def deduplicate(judged: DataFrame, settings: Settings) -> DataFrame:
    return judged.withWatermark("event_time", settings.watermark).dropDuplicatesWithinWatermark(["dedup_key"])


def events(judged: DataFrame, settings: Settings) -> DataFrame:
    return judged.where(F.size("codes") == 0).select(
        "e.event_id",
        "event_time",
        "e.user_id",
        "e.session_id",
        "e.product_id",
        "e.product_category",
        "e.event_type",
        "e.device_type",
        "e.page_url",
        "price",
        "topic",
        "partition",
        "offset",
        "kafka_timestamp",
        F.lit(settings.ruleset_version).alias("ruleset_version"),
        F.col("received_at").alias("processed_at"),
        F.to_date("event_time").alias("event_date"),
        F.hour("event_time").alias("event_hour"),
        # A session's number is a user's own: events of one visitor, in the order of (event_time, event_id).
        F.concat_ws("/", "e.user_id", "e.session_id").alias("session_key"),
    )


def rejects(judged: DataFrame, settings: Settings) -> DataFrame:
    return judged.where(F.size("codes") > 0).select(
        "topic",
        "partition",
        "offset",
        "kafka_timestamp",
        "timestamp_type",
        F.lit(INVALID).alias("disposition"),
        "codes",
        F.lit(settings.ruleset_version).alias("ruleset_version"),
        F.col("received_at").alias("rejected_at"),
        "key",
        "value",
        F.to_date("received_at").alias("reject_date"),
    )


def writer(settings: Settings) -> Callable[[DataFrame, int], None]:
    append = Appender()

    def write(batch: DataFrame, batch_id: int) -> None:
        app_id = query_id(batch.sparkSession)
        batch = batch.persist()
        try:
            # Also what materialises the batch: the state store must be asked once only.
            counts = batch.agg(
                F.count_if(F.size("codes") == 0).alias("events"),
                F.count_if(F.size("codes") > 0).alias("rejects"),
            ).first()
            assert counts is not None
            for table, rows, count in (
                (EVENTS, events(batch, settings), counts["events"]),
                (REJECTS, rejects(batch, settings), counts["rejects"]),
            ):
                if count:
                    files = -(-count // settings.rows_per_file)
                    append(rows.coalesce(files), settings.table(table.name), f"{app_id}/{table.name}", batch_id)
                metrics.ROWS_WRITTEN.labels(table.name).inc(count)
            if counts["rejects"]:
                failed = batch.select(F.explode("codes").alias("code")).groupBy("code").count()
                for row in failed.collect():
                    metrics.REJECTS.labels(row["code"]).inc(row["count"])
        finally:
            batch.unpersist()

    return write


def build(spark: SparkSession, settings: Settings, write: Callable[[DataFrame, int], None]) -> DataStreamWriter:
    return query(kafka_stream(spark, settings, headers=False), settings, write)


def query(records: DataFrame, settings: Settings, write: Callable[[DataFrame, int], None]) -> DataStreamWriter:
    return (
        deduplicate(judge(received(records), settings), settings)
        .writeStream.queryName(QUERY)
        .foreachBatch(write)
        .outputMode("append")
        .option("checkpointLocation", settings.checkpoint(QUERY))
        .trigger(processingTime=settings.trigger_silver)
    )
