"""The Spark session and the Kafka source: every tuning setting and its reason in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import SparkSession
from pyspark.sql import functions as F  # noqa: N812

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame
    from pyspark.sql.readwriter import DataFrameReader
    from pyspark.sql.streaming.readwriter import DataStreamReader

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
    # No two records have the same of these, so a dictionary would be made for nothing (that gold.conversion_1h has a
    # `value` too is a few rows more).
    "spark.hadoop.parquet.enable.dictionary#value": "false",
    "spark.hadoop.parquet.enable.dictionary#event_id": "false",
    # Where in our code a column was made is not told with an error: to know it, each function that makes one asks the
    # JVM four times and looks for IPython, and each expression takes it along to the executors.
    "spark.python.sql.dataFrameDebugging.enabled": "false",
    "spark.sql.dataFrameQueryContext.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.locality.wait": "0s",
    # A batch is of few days: a file open for each costs less than sorting the rows by day.
    "spark.sql.maxConcurrentOutputFileWriters": "8",
}

# Heaps of this size are collected in little time, and without a concurrent collector's threads on the cores. What was
# compiled is kept: a batch every few seconds looks unused to the JVM, which would throw its code away and compile it
# again, on the cores that the batches need. So is room for the classes of generated code, which would else have the
# whole heap collected again and again.
_JAVA = "-XX:+UseParallelGC -XX:-UseCodeCacheFlushing -XX:MetaspaceSize=256m"

STREAMS = {
    # Queries that share an application take turns by task, not by batch; the file says who goes first.
    "spark.scheduler.mode": "FAIR",
    "spark.scheduler.allocation.file": Path(__file__).with_name("pools.xml").as_uri(),
    # Batches are small and their plans known: re-planning each one costs more than it saves.
    "spark.sql.adaptive.enabled": "false",
    # A batch is kept for a second, to be written to two tables.
    "spark.sql.inMemoryColumnarStorage.compressed": "false",
    # Some minutes of all products fit in memory; with the default of 128 groups they would be sorted on disk.
    "spark.sql.objectHashAggregate.sortBased.fallbackThreshold": "1000",
    "spark.sql.streaming.stateStore.providerClass": (
        "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
    ),
    f"{_ROCKSDB}.changelogCheckpointing.enabled": "true",
    f"{_ROCKSDB}.trackTotalNumberOfRows": "false",
    f"{_ROCKSDB}.boundedMemoryUsage": "true",
    f"{_ROCKSDB}.maxMemoryUsageMB": "128",
    "spark.driver.defaultJavaOptions": _JAVA,
    "spark.executor.defaultJavaOptions": _JAVA,
    # Four queries have more kinds of generated code than the default of 100; what falls out is compiled again.
    "spark.sql.codegen.cache.maxEntries": "1000",
    # Each job's plan is written out for the UI: in its details, that took a tenth of the driver's time.
    "spark.sql.ui.explainMode": "simple",
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
        if settings.batch_java_home:
            config["spark.executorEnv.JAVA_HOME"] = settings.batch_java_home
    builder = SparkSession.builder.appName(app_name).master(settings.spark_master)
    for key, value in config.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("WARN")
    return spark


def unwritten(*moments: Column) -> Column:
    """An array of these constants, which Spark hands to generated code instead of writing it into it.

    What differs from batch to batch and is written into the code makes another class of each batch, which is compiled,
    loaded and run cold.
    """
    return F.array(*moments)


def batch_clock() -> Column:
    """The time of the micro-batch, for Kafka's records: `partition % 1` is 0, and not known before there is one."""
    return F.get(unwritten(F.current_timestamp()), F.col("partition") % 1)


def kafka_stream(spark: SparkSession, settings: Settings, *, headers: bool) -> DataFrame:
    stream = spark.readStream.option("maxOffsetsPerTrigger", settings.max_offsets_per_trigger)
    return kafka_records(stream, settings, headers=headers)


def kafka_records(reader: DataFrameReader | DataStreamReader, settings: Settings, *, headers: bool) -> DataFrame:
    """The topic from its start, as a stream or at once."""
    return (
        reader.format("kafka")
        .option("kafka.bootstrap.servers", settings.bootstrap_servers)
        .option("subscribe", settings.topic)
        .option("startingOffsets", "earliest")
        .option("includeHeaders", str(headers).lower())
        # Offsets that retention took before we read them are a loss: stop and say so.
        .option("failOnDataLoss", "true")
        # A broker may take a minute to restart without anyone noticing here.
        .option("kafka.default.api.timeout.ms", "120000")
        .option("kafka.request.timeout.ms", "30000")
        .option("kafkaConsumer.pollTimeoutMs", "120000")
        .option("kafka.reconnect.backoff.max.ms", "2000")
        # After each poll Spark asks the broker for both ends of the partition: a poll takes a whole fetch. And a fetch
        # begun at the end of the topic, which the next one has to wait for, is soon over.
        .option("kafka.max.poll.records", "5000")
        .option("kafka.fetch.max.wait.ms", "20")
        .load()
    )
