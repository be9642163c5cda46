"""Delta tables by path: creating them, writing a batch once, and retrying commits that lost a race."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)
from py4j.protocol import Py4JJavaError
from pyspark.sql.types import StructType

from clickstream.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyspark.sql import DataFrame, SparkSession

    from clickstream.settings import Settings

log = logging.getLogger("clickstream")

T = TypeVar("T")

CONFLICTS = (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)


@dataclass(frozen=True)
class Table:
    """A table's name, columns and partitioning: the only place that says what is in it.

    `pruned_by` are the columns whose least and greatest values a file's entry in the log has, for readers to pass over
    files; without any Delta takes all of them, at a price for each row written.
    """

    name: str
    columns: str
    partition_by: tuple[str, ...]
    pruned_by: tuple[str, ...] = ()

    @property
    def schema(self) -> StructType:
        schema = StructType.fromDDL(self.columns)
        assert isinstance(schema, StructType)
        return schema

    def ensure(self, spark: SparkSession, settings: Settings) -> None:
        """Creates the table when it is missing, adds columns that it lacks and sets its retention; changes nothing
        otherwise. Rows that were there have no value in an added column."""
        hours = settings.retention_hours
        properties = {
            # A commit every few seconds: rarer checkpoints cost less than the short log they would save.
            "delta.checkpointInterval": "20",
            "delta.logRetentionDuration": f"interval {hours} hours",
            "delta.deletedFileRetentionDuration": f"interval {hours} hours",
        }
        if self.pruned_by:
            properties["delta.dataSkippingStatsColumns"] = ",".join(self.pruned_by)
        path = f"delta.`{settings.table(self.name)}`"

        def pairs(values: dict[str, str]) -> str:
            return ", ".join(f"'{key}' = '{value}'" for key, value in values.items())

        # Applications may start together: the one that loses the race finds the table there.
        retry_conflicts(
            lambda: spark.sql(
                f"CREATE TABLE IF NOT EXISTS {path} ({self.columns}) USING delta "
                f"PARTITIONED BY ({', '.join(self.partition_by)}) TBLPROPERTIES ({pairs(properties)})"
            )
        )
        present = {name.lower() for name in self.read(spark, settings).columns}
        added = [field for field in self.schema.fields if field.name.lower() not in present]
        if added:
            columns = ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in added)
            # Of two applications that add the same, the second finds that it need not.
            retry_conflicts(lambda: spark.sql(f"ALTER TABLE {path} ADD COLUMNS ({columns})"))
        found = {row["key"]: row["value"] for row in spark.sql(f"SHOW TBLPROPERTIES {path}").collect()}
        changed = {key: value for key, value in properties.items() if found.get(key) != value}
        if changed:
            spark.sql(f"ALTER TABLE {path} SET TBLPROPERTIES ({pairs(changed)})")

    def read(self, spark: SparkSession, settings: Settings, version: int | None = None) -> DataFrame:
        """The table; at each use as it is then, unless a version is given."""
        reader = spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(settings.table(self.name))

    def replace(self, rows: DataFrame, settings: Settings, where: str) -> None:
        """Makes the table hold exactly `rows` where the condition is true, in one commit."""
        path = settings.table(self.name)
        retry_conflicts(lambda: rows.write.format("delta").mode("overwrite").option("replaceWhere", where).save(path))


def utc(moment: datetime) -> datetime:
    """Spark hands timestamps over in the machine's zone, naive."""
    return moment.astimezone(UTC)


def retry_conflicts(action: Callable[[], T], attempts: int = 6) -> T:
    """Runs an idempotent table change again when a concurrent commit made it obsolete."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except CONFLICTS as error:
            if attempt == attempts:
                raise
            log.info("a concurrent commit won (%s), attempt %d", type(error).__name__, attempt)
            time.sleep(random.uniform(0.2, 0.5) * attempt)
    raise AssertionError("unreachable")


# A run that holds a lock writes it anew this often; one that was killed has lost it after the other time.
LOCK_RENEWED_S = 10.0
LOCK_EXPIRES_S = 60.0


def _created(fs: Any, path: Any) -> bool:
    """Makes a file that is not there yet; whether it did."""
    # The file system decides in one step; S3's does so when it is asked to, others know no such option.
    builder = fs.createFile(path).recursive().overwrite(False).opt("fs.option.create.conditional.overwrite", "true")
    try:
        builder.build().close()
    except Py4JJavaError:
        if not fs.exists(path):
            raise
        return False
    return True


@contextlib.contextmanager
def locked(spark: SparkSession, settings: Settings, name: str) -> Iterator[None]:
    """Holds a lock of the lake; JobError when another run holds it, which it shows by writing it again and again."""
    jvm = spark._jvm
    assert jvm is not None
    path = jvm.org.apache.hadoop.fs.Path(f"{settings.lake_uri}/_locks/{name}")
    fs = path.getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())

    def write() -> None:
        stream = fs.create(path, True)
        stream.write(f"{time.time():.3f} {spark.sparkContext.applicationId}".encode())
        stream.close()

    def age(of: Any) -> float:
        # By what is in it: S3 renames by copying, which is a new time of the file.
        stream = fs.open(of)
        text = bytes(stream.readAllBytes()).decode()
        stream.close()
        written = float(text.split()[0]) if text else fs.getFileStatus(of).getModificationTime() / 1000
        return time.time() - float(written)

    held = _created(fs, path)
    if not held and age(path) > LOCK_EXPIRES_S:
        # Of two runs that see it expired one renames it, and looks at what it got: it may be the other's new one.
        expired = jvm.org.apache.hadoop.fs.Path(f"{path.toString()}.{uuid.uuid4().hex}")
        if fs.rename(path, expired):
            if age(expired) > LOCK_EXPIRES_S:
                log.warning("took over %s, whose run ended without giving it back", path.toString())
                held = _created(fs, path)
                fs.delete(expired, False)
            else:
                fs.rename(expired, path)
    if not held:
        raise JobError(f"another run holds {path.toString()} and wrote it {age(path):.0f} s ago; wait for it")

    done = threading.Event()

    def renew() -> None:
        while not done.wait(LOCK_RENEWED_S):
            try:
                write()
            except Exception as error:  # the next one may do better, and without any the lock is lost in time
                log.warning("%s could not be renewed: %s", path.toString(), error)

    renewing = threading.Thread(target=renew, name=f"lock-{name}", daemon=True)
    try:
        write()
        renewing.start()
        yield
    finally:
        done.set()
        if renewing.is_alive():
            renewing.join()
        fs.delete(path, False)


def append_once(df: DataFrame, path: str, app_id: str, version: int) -> None:
    """Appends unless this application already wrote this version: a replayed batch changes nothing."""
    (df.write.format("delta").mode("append").option("txnAppId", app_id).option("txnVersion", version).save(path))


def last_version(spark: SparkSession, path: str, app_id: str) -> int:
    """The version of this application's last `append_once` to a table; -1 before the first.

    Of https://github.com/delta-io/delta: a snapshot's `transactions` are the versions by application.
    """
    jvm = spark._jvm
    assert jvm is not None
    log_of = jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, path)
    none = jvm.scala.Option.empty()
    found = log_of.update(False, none, none).transactions().get(app_id)
    return int(found.get()) if found.isDefined() else -1


def query_id(spark: SparkSession) -> str:
    """Inside foreachBatch, the identity that the query's checkpoint carries.

    It makes Delta's (txnAppId, txnVersion) safe: batch numbers restart with a new checkpoint, and so does this.
    """
    value = spark.sparkContext.getLocalProperty("sql.streaming.queryId")
    if not value:
        raise RuntimeError("not inside a streaming query's batch")
    return str(value)
