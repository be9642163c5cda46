"""The bounded job that compacts the lake's tables and removes files that no reader can need.

Vacuum removes files that were replaced longer ago than a table's retention. That is refused while a stream has yet to
read what is as old as that, or a backfill that can be taken back would need it: `guard` looks before anything is done.
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from delta.tables import DeltaTable
from pyspark.sql import functions as F  # noqa: N812

from clickstream import account, alerts, backfill, bronze, checks, gold, sessions, silver
from clickstream.errors import RefusedError
from clickstream.lake import latest, on_file_system, retry_conflicts, utc
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


# Delta's own, where a table has none.
DEFAULT_RETENTION = timedelta(days=7)
# Streams that read a table of the lake. Bronze and Silver read Kafka.
READERS: dict[str, Table] = dict.fromkeys(gold.QUERIES, silver.EVENTS)


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


def retention(spark: SparkSession, path: str) -> timedelta:
    """How long a table keeps replaced files: what vacuum goes by."""
    said = latest(spark, path).metadata().getConfiguration().get("delta.deletedFileRetentionDuration")
    match = re.fullmatch(r"interval (\d+) hours?", said or "")
    return timedelta(hours=int(match[1])) if match else DEFAULT_RETENTION


def _committed_at(spark: SparkSession, path: str, version: int) -> datetime | None:
    """When a version of a table was committed; None when the log does not have it any more, or not yet.

    By the log's file: a table's history is read commit by commit, and the streams make tens of thousands.
    """
    file, fs = on_file_system(spark, f"{path}/_delta_log/{version:020d}.json")
    if not fs.exists(file):
        return None
    return datetime.fromtimestamp(fs.getFileStatus(file).getModificationTime() / 1000, UTC)


def _guard_stream(spark: SparkSession, settings: Settings, query: str, table: Table, now: datetime) -> None:
    lines = account.last_batch(spark, settings, query)
    if not lines:
        return
    path = settings.table(table.name)
    # The first version that is not wholly read; one beyond the last is none.
    version = int(json.loads(lines[-1])["reservoirVersion"])
    newest = latest(spark, path).version()
    if version > newest:
        return
    keeps = retention(spark, path)
    committed = _committed_at(spark, path, version)
    if committed is not None and now - committed > keeps:
        # Only appends are read: an idle shop's tables are compacted as well.
        appended = (
            DeltaTable.forPath(spark, path)
            .history(newest - version + 1)
            .where("operation = 'WRITE' AND operationParameters.mode = 'Append'")
            .agg(F.min("timestamp").alias("first"))
            .first()
        )
        if appended is None or appended["first"] is None:
            return
        committed = utc(appended["first"])
    if committed is not None and now - committed < keeps:
        return
    since = f"{committed:%Y-%m-%dT%H:%MZ}" if committed else "before the table's log begins"
    raise RefusedError(
        f"stream {query} has yet to read {table.name} from version {version} ({since}), and replaced files are kept "
        f"for {keeps / timedelta(hours=1):.0f} hours: vacuum would remove what it needs. Nothing was changed. Start "
        "the stream and let it catch up (`make status`, `make logs`), or raise retention_hours in pipeline_settings "
        f"and deploy; if it never runs again, remove its checkpoint {settings.checkpoint(query)}"
    )


def _guard_backfill(spark: SparkSession, settings: Settings, now: datetime) -> None:
    entry = backfill.last(spark, settings)
    if entry is None:
        return
    expires = entry.began + timedelta(hours=settings.retention_hours)
    if now >= expires:
        return
    if not entry.done:
        raise RefusedError(
            f"the backfill that began at {entry.began:%Y-%m-%dT%H:%MZ} was interrupted, and can only be taken back "
            "with the files it replaced. Nothing was changed. Take it back with `clickstream backfill --rollback`, "
            "then run this again"
        )
    kept = min(retention(spark, settings.table(table.name)) for table in silver.TABLES)
    if entry.began + kept < now:
        raise RefusedError(
            f"the backfill of {entry.began:%Y-%m-%dT%H:%MZ} can be taken back until {expires:%Y-%m-%dT%H:%MZ}, but "
            f"silver.events keeps replaced files for {kept / timedelta(hours=1):.0f} hours only. Nothing was changed. "
            "Restart the streams, so that the tables take CLICKSTREAM_RETENTION_HOURS over, or wait until then"
        )


def guard(spark: SparkSession, settings: Settings, now: datetime | None = None) -> None:
    """RefusedError, naming the reader and the fix, when vacuum would remove what somebody still has to read."""
    now = now or datetime.now(UTC)
    for query, table in READERS.items():
        if DeltaTable.isDeltaTable(spark, settings.table(table.name)):
            _guard_stream(spark, settings, query, table, now)
    if DeltaTable.isDeltaTable(spark, settings.table(backfill.BACKFILLS.name)):
        _guard_backfill(spark, settings, now)


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
    if vacuum:
        guard(spark, settings)
    for key, value in options.items():
        spark.conf.set(key, value)
    results = []
    for table in TABLES:
        if not DeltaTable.isDeltaTable(spark, settings.table(table.name)):
            log.warning("%s does not exist yet", table.name)
            continue
        result = compact_table(spark, settings, table, vacuum)
        log.info(
            "%s: %d files, %d before, in %.1f s", table.name, result.files_after, result.files_before, result.seconds
        )
        results.append(result)
    return results


def expire(settings: Settings) -> None:
    """Removes from the marts of times what is past their retention; an episode of gold.product_alerts stays."""
    marts = MartWriter(settings.marts_dsn, application_name="clickstream-compact")
    try:
        for mart in (*(windowed.mart for windowed in gold.WINDOWED), sessions.MART, checks.LEDGER):
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
