"""The Spark session and the Kafka source: every tuning setting and its reason in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import SparkSession

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from clickstream.settings import Settings

_ROCKSDB = "spark.sql.streaming.stateStore.rocksdb"

COMMON = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    # On a local disk the driver and the executors are different users of one group.
    "spark.hadoop.fs.permissions.umask-mode": "007",
    # A small table's state fits in few tasks; the default of 50 costs more than the work.
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.ui.showConsoleProgress": "false",
    "spark.locality.wait": "0s",
}

STREAMS = {
    # Queries that share an application take turns by task, not by batch.
    "spark.scheduler.mode": "FAIR",
    # Batches are small and their plans known: re-planning each one costs more than it saves.
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.streaming.stateStore.providerClass": (
        "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
    ),
    f"{_ROCKSDB}.changelogCheckpointing.enabled": "true",
    f"{_ROCKSDB}.trackTotalNumberOfRows": "false",
    f"{_ROCKSDB}.boundedMemoryUsage": "true",
    f"{_ROCKSDB}.maxMemoryUsageMB": "128",
    # Heaps of this size are collected in little time, and without a concurrent collector's threads on the cores.
    "spark.driver.defaultJavaOptions": "-XX:+UseParallelGC",
    "spark.executor.defaultJavaOptions": "-XX:+UseParallelGC",
    # An endless application's event log would grow for ever; its progress is in the status files.
    "spark.eventLog.enabled": "false",
    "spark.ui.retainedJobs": "50",
    "spark.ui.retainedStages": "50",
    "spark.ui.retainedTasks": "500",
    "spark.sql.ui.retainedExecutions": "20",
    "spark.sql.streaming.ui.retainedProgressUpdates": "20",
    "spark.sql.streaming.ui.retainedQueries": "10",
    "spark.sql.streaming.numRecentProgressUpdates": "10",
    # A query that does not stop in time is left to the replay of its batch.
    "spark.sql.streaming.stopTimeout": "20s",
}

# The driver of a bounded job on a cluster plans for a minute, which does not earn back the optimising compiler; the
# executors may have more to do. On local Spark the driver is the executor.
BOUNDED = {"spark.driver.defaultJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}


def spark_session(settings: Settings, app_name: str, *, streams: bool = False) -> SparkSession:
    """The application's session; jars and anything about the node come from its spark-defaults.conf."""
    config = dict(COMMON)
    config |= {
        "spark.cores.max": str(settings.spark_cores_max),
        "spark.executor.memory": settings.executor_memory,
        "spark.driver.memory": settings.driver_memory,
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.default.parallelism": str(settings.shuffle_partitions),
    }
    if streams:
        config |= STREAMS
        config["spark.sql.streaming.minBatchesToRetain"] = str(settings.checkpoint_batches)
    elif not settings.spark_master.startswith("local"):
        config |= BOUNDED
    builder = SparkSession.builder.appName(app_name).master(settings.spark_master)
    for key, value in config.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("WARN")
    return spark


def kafka_stream(spark: SparkSession, settings: Settings, *, headers: bool) -> DataFrame:
    return (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", settings.bootstrap_servers)
        .option("subscribe", settings.topic)
        .option("startingOffsets", "earliest")
        .option("maxOffsetsPerTrigger", settings.max_offsets_per_trigger)
        .option("includeHeaders", str(headers).lower())
        # Offsets that retention took before we read them are a loss: stop and say so.
        .option("failOnDataLoss", "true")
        # A broker may take a minute to restart without anyone noticing here.
        .option("kafka.default.api.timeout.ms", "120000")
        .option("kafka.request.timeout.ms", "30000")
        .option("kafkaConsumer.pollTimeoutMs", "120000")
        .option("kafka.reconnect.backoff.max.ms", "2000")
        .load()
    )
