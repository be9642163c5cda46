"""The bounded job that compacts the lake's tables and removes files that no reader can need."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from delta.tables import DeltaTable

from clickstream import account, alerts, backfill, bronze, gold, sessions, silver
from clickstream.lake import retry_conflicts
from clickstream.marts import MartWriter
from clickstream.session import spark_session
from clickstream.settings import size_bytes

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from clickstream.lake import Table
    from clickstream.settings import Settings

log = logging.getLogger("clickstream")

TABLES: tuple[Table, ...] = (
    *bronze.TABLES,
    *silver.TABLES,
    account.LEDGER,
    backfill.BACKFILLS,
    *gold.TABLES,
    *alerts.TABLES,
    sessions.TABLE,
)


@dataclass(frozen=True)
class Result:
    table: str
    files_before: int
    files_after: int
    bytes: int
    seconds: float


def _size(spark: SparkSession, path: str) -> tuple[int, int]:
    detail = DeltaTable.forPath(spark, path).detail().select("numFiles", "sizeInBytes").first()
    assert detail is not None
    return int(detail["numFiles"]), int(detail["sizeInBytes"])


def compact_table(spark: SparkSession, settings: Settings, table: Table, vacuum: bool) -> Result:
    path = settings.table(table.name)
    started = time.monotonic()
    before, _ = _size(spark, path)
    # The streams go on writing meanwhile: their appends never conflict with this, and where Gold replaces a
    # window that is being compacted, one of the two runs again.
    retry_conflicts(lambda: DeltaTable.forPath(spark, path).optimize().executeCompaction())
    if vacuum:
        # The table's own retention decides what is old enough, so that the job and the table cannot disagree.
        DeltaTable.forPath(spark, path).vacuum()
    after, size = _size(spark, path)
    return Result(table.name, before, after, size, round(time.monotonic() - started, 1))


def compact(spark: SparkSession, settings: Settings, vacuum: bool = True) -> list[Result]:
    options = {
        "spark.databricks.delta.optimize.maxFileSize": str(size_bytes(settings.compact_target_size)),
        "spark.databricks.delta.vacuum.parallelDelete.enabled": "true",
        # VACUUM lists with this many tasks; the default of 10,000 takes minutes for a handful of folders.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(settings.spark_cores_max),
    }
    for key, value in options.items():
        spark.conf.set(key, value)
    results = []
    for table in TABLES:
        if not DeltaTable.isDeltaTable(spark, settings.table(table.name)):
            log.warning("%s does not exist yet", table.name)
            continue
        results.append(compact_table(spark, settings, table, vacuum))
    return results


def expire(settings: Settings) -> None:
    """Removes from the marts of times what is past their retention; an episode of gold.product_alerts stays."""
    marts = MartWriter(settings.marts_dsn, application_name="clickstream-compact")
    try:
        for mart in (*(windowed.mart for windowed in gold.WINDOWED), sessions.MART):
            marts.ensure(mart)
            if rows := marts.expire(mart, settings.mart_retention_days):
                log.info("mart %s: %d rows older than %d days", mart.name, rows, settings.mart_retention_days)
    finally:
        marts.close()


def run(settings: Settings, vacuum: bool) -> list[dict[str, Any]]:
    # One core and so one executor: the streams beside it need theirs more.
    spark = spark_session(replace(settings, spark_cores_max=1), "clickstream-compact")
    try:
        results = [asdict(result) for result in compact(spark, settings, vacuum)]
        if vacuum and settings.marts_dsn:
            expire(settings)
        return results
    finally:
        spark.stop()
