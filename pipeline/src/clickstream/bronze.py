"""Bronze: the byte-exact archive of the topic. Nothing is parsed, nothing is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F  # noqa: N812

from clickstream.lake import Appender, Table, query_id
from clickstream.session import batch_clock, kafka_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming.readwriter import DataStreamWriter

    from clickstream.settings import Settings

QUERY = "bronze"

CLICKSTREAM = Table(
    "bronze.clickstream",
    """
    topic STRING, partition INT, offset BIGINT,
    timestamp TIMESTAMP, timestamp_type INT, ingested_at TIMESTAMP,
    key BINARY, value BINARY, headers ARRAY<STRUCT<key: STRING, value: BINARY>>,
    ingest_date DATE
    """,
    # By our own clock: a record's timestamp is the producer's word and could name any year.
    partition_by=("ingest_date",),
    pruned_by=("partition", "offset", "timestamp", "ingested_at"),
)
TABLES = (CLICKSTREAM,)


def archive(records: DataFrame) -> DataFrame:
    """Kafka's records as Bronze keeps them. The batch's clock is in the checkpoint, so a replay keeps it."""
    return records.select(
        "topic",
        "partition",
        "offset",
        "timestamp",
        F.col("timestampType").alias("timestamp_type"),
        batch_clock().alias("ingested_at"),
        "key",
        "value",
        "headers",
        F.current_date().alias("ingest_date"),
    )


def writer(settings: Settings) -> Callable[[DataFrame, int], None]:
    append = Appender()

    def write(batch: DataFrame, batch_id: int) -> None:
        # By the name that Delta's own sink has for the query. That one looks for its earlier commit in every batch, and
        # computes the table's state for it.
        append(batch, settings.table(CLICKSTREAM.name), query_id(batch.sparkSession), batch_id)

    return write


def build(spark: SparkSession, settings: Settings, write: Callable[[DataFrame, int], None]) -> DataStreamWriter:
    return query(kafka_stream(spark, settings, headers=True), settings, write)


def query(records: DataFrame, settings: Settings, write: Callable[[DataFrame, int], None]) -> DataStreamWriter:
    # One task and so one small file a batch; the archive is not in anybody's path to an answer.
    return (
        archive(records)
        .coalesce(1)
        .writeStream.queryName(QUERY)
        .foreachBatch(write)
        .outputMode("append")
        .option("checkpointLocation", settings.checkpoint(QUERY))
        .trigger(processingTime=settings.trigger_bronze)
    )
