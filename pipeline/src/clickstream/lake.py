"""Delta tables by path: creating them, writing a batch once, and retrying commits that lost a race."""

from __future__ import annotations

import contextlib
import json
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

# Of the JVM: Hadoop's path, and Delta's package.
PATH = "org.apache.hadoop.fs.Path"
DELTA = "org.apache.spark.sql.delta"

CONFLICTS = (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)

# Commits from one checkpoint of a table's log to the next. With one every few seconds, Delta's own 10 costs more in
# checkpoints than the shorter log saves who reads it.
CHECKPOINT_COMMITS = 20

# How long a table whose log has no commit is waited for.
CREATED_S = 10.0


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
            "delta.checkpointInterval": str(CHECKPOINT_COMMITS),
            "delta.logRetentionDuration": f"interval {hours} hours",
            "delta.deletedFileRetentionDuration": f"interval {hours} hours",
        }
        if self.pruned_by:
            properties["delta.dataSkippingStatsColumns"] = ",".join(self.pruned_by)
        uri = settings.table(self.name)
        path = f"delta.`{uri}`"

        def pairs(values: dict[str, str]) -> str:
            return ", ".join(f"'{key}' = '{value}'" for key, value in values.items())

        def create() -> None:
            spark.sql(
                f"CREATE TABLE IF NOT EXISTS {path} ({self.columns}) USING delta "
                f"PARTITIONED BY ({', '.join(self.partition_by)}) TBLPROPERTIES ({pairs(properties)})"
            )

        def alter() -> None:
            # What is there is asked of the log itself: three statements took 0.2 s, for each table at each start.
            metadata = latest(spark, uri).metadata()
            present = {field["name"].lower() for field in json.loads(metadata.schemaString())["fields"]}
            added = [field for field in self.schema.fields if field.name.lower() not in present]
            if added:
                columns = ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in added)
                spark.sql(f"ALTER TABLE {path} ADD COLUMNS ({columns})")
            found = metadata.getConfiguration()
            changed = {key: value for key, value in properties.items() if found.get(key) != value}
            if changed:
                spark.sql(f"ALTER TABLE {path} SET TBLPROPERTIES ({pairs(changed)})")

        # Applications may start together: the one that loses the race finds the table there, or a log's folder in which
        # the other is about to commit.
        deadline = time.monotonic() + CREATED_S
        while latest(spark, uri).version() < 0:
            if time.monotonic() > deadline:
                raise JobError(f"{uri} has a log without a commit, so it is no table; move the folder away")
            retry_conflicts(create)
        # Of two applications that alter the same, the second looks again and finds that it need not.
        retry_conflicts(alter)

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


class _Locks:
    """The files of a lock, on any file system. Each says when it was written, by which application and by which run."""

    def __init__(self, spark: SparkSession, uri: str) -> None:
        self._path = java_class(spark, PATH)
        _, self._fs = on_file_system(spark, uri)
        self._application = spark.sparkContext.applicationId
        self.run = uuid.uuid4().hex

    def _write(self, stream: Any) -> None:
        stream.write(f"{time.time():.3f} {self._application} {self.run}".encode())
        stream.close()

    def create(self, uri: str) -> bool:
        """Makes a file that is not there yet; whether it did."""
        path = self._path(uri)
        # The file system decides in one step; S3's does so when it is asked to, others know no such option.
        builder = self._fs.createFile(path).recursive().overwrite(False)
        try:
            self._write(builder.opt("fs.option.create.conditional.overwrite", "true").build())
        except Py4JJavaError:
            if not self._fs.exists(path):
                raise
            # The answer to the write may have been lost.
            return self.read(uri)[1] == self.run
        return True

    def read(self, uri: str) -> tuple[float, str]:
        """Age of a file and the run that wrote it; no run and no age when there is no file."""
        path = self._path(uri)
        try:
            stream = self._fs.open(path)
            words = bytes(stream.readAllBytes()).decode().split()
            stream.close()
            if not words:
                # A run that was killed at once left an empty file.
                written = self._fs.getFileStatus(path).getModificationTime() / 1000
                words = [str(written), f"empty-{written}"]
        except Py4JJavaError as error:
            if "FileNotFoundException" not in error.java_exception.getClass().getName():
                raise
            return 0.0, ""
        return time.time() - float(words[0]), words[-1]

    def renew(self, uri: str) -> None:
        """Writes a file of this run anew; one that another run made since stays."""
        if self.read(uri)[1] == self.run:
            self._write(self._fs.create(self._path(uri), True))

    def delete(self, uri: str, run: str) -> None:
        """Removes a file if that run wrote it."""
        if self.read(uri)[1] == run:
            self._fs.delete(self._path(uri), False)


def _take(locks: _Locks, uri: str) -> list[tuple[str, str]]:
    """The files that this run holds the lock by, with who wrote them: its own and expired ones before it.

    A lock that expired is never replaced, for it may be another's new one by then. It is taken over by a file whose
    name ends with the run that left it, of which there can be only one; and so on, if that run was killed, too.
    """
    held: list[tuple[str, str]] = []
    name = uri
    while not locks.create(name):
        age, run = locks.read(name)
        if not run:
            # It was given back just now.
            return _take(locks, uri)
        if age <= LOCK_EXPIRES_S:
            raise JobError(f"another run holds {name} and wrote it {age:.0f} s ago; wait for it")
        held.append((name, run))
        name = f"{uri}.{run}"
    if any(locks.read(expired)[1] != run for expired, run in held):
        # Another took it over, and has given all of it back meanwhile.
        locks.delete(name, locks.run)
        return _take(locks, uri)
    if held:
        log.warning("took over %s, whose run ended without giving it back", uri)
    return [*held, (name, locks.run)]


@contextlib.contextmanager
def locked(spark: SparkSession, settings: Settings, name: str) -> Iterator[None]:
    """Holds a lock of the lake; JobError when another run holds it, which it shows by writing it again and again."""
    uri = f"{settings.lake_uri}/_locks/{name}"
    locks = _Locks(spark, uri)
    held = _take(locks, uri)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LOCK_RENEWED_S):
            try:
                locks.renew(held[-1][0])
            except Exception as error:  # the next one may do better, and without any the lock is lost in time
                log.warning("%s could not be renewed: %s", uri, error)

    renewing = threading.Thread(target=renew, name=f"lock-{name}", daemon=True)
    try:
        renewing.start()
        yield
    finally:
        done.set()
        renewing.join()
        if locks.read(f"{uri}.{locks.run}")[1]:
            # It is the other's to give back.
            log.warning("%s was taken over by another run, since this one did not renew it in time", uri)
        else:
            # Its own file last: as long as one of the others is there, it says who holds the lock.
            for file, run in held:
                locks.delete(file, run)


def java_class(spark: SparkSession, name: str) -> Any:
    """A class of the JVM by its full name. Asked for part by part, as `jvm.java.lang.String`, py4j would take each
    package for a class first, and look for it in all jars under a dozen prefixes."""
    jvm = spark._jvm
    assert jvm is not None
    return getattr(jvm, name)


def on_file_system(spark: SparkSession, uri: str) -> tuple[Any, Any]:
    """Hadoop's path of a URI, and its file system."""
    path = java_class(spark, PATH)(uri)
    return path, path.getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())


def delta_log(spark: SparkSession, path: str) -> Any:
    """Delta's own object for a table's log."""
    return java_class(spark, f"{DELTA}.DeltaLog").forTable(spark._jsparkSession, path)


def latest(spark: SparkSession, path: str) -> Any:
    """Delta's own object for a table as it is now; its version is -1 when there is no table."""
    none = java_class(spark, "scala.Option").empty()
    return delta_log(spark, path).update(False, none, none)


def append_once(df: DataFrame, path: str, app_id: str, version: int) -> None:
    """Appends unless this application already wrote this version: a replayed batch changes nothing.

    As the writer's options txnAppId and txnVersion, but without computing the table's whole state where the log says
    what was written, and without the writer's look at the types: the rows have to be of the table's.
    """
    _append(df, path, app_id, version, look=True)


def append_next(df: DataFrame, path: str, app_id: str, version: int) -> None:
    """`append_once` of a version that is known not to be there."""
    _append(df, path, app_id, version, look=False)


def _append(df: DataFrame, path: str, app_id: str, version: int, *, look: bool) -> None:
    """Of https://github.com/delta-io/delta: WriteIntoDelta is a transaction that writes files and commits them
    together with the application's version, after it merged their schema into the table's.

    Raises ConcurrentTransactionException when another driver commits a version of this application meanwhile.
    """
    spark = df.sparkSession
    transaction = delta_log(spark, path).startTransaction()
    if look and _written(spark, transaction.snapshot(), app_id) >= version:
        return
    # As the writer's look would: the commit is checked against those of this application that came in between.
    getattr(transaction.readTxn(), "$plus$eq")(app_id)
    files = transaction.writeFiles(df._jdf)
    now = java_class(spark, "scala.Some")(int(time.time() * 1000))
    entry = java_class(spark, f"{DELTA}.actions.SetTransaction")(app_id, version, now)
    append, none = java_class(spark, "org.apache.spark.sql.SaveMode").Append, java_class(spark, "scala.Option").empty()
    transaction.commit(files.appended(entry), java_class(spark, f"{DELTA}.DeltaOperations$Write")(append, *[none] * 8))


class Appender:
    """Appends a streaming query's batches to tables, each once; called inside foreachBatch.

    What may be there already is what earlier runs of the query wrote, so it is asked for once a run and table: up to
    the batch that failed, or further, when the checkpoint was taken back by hand.
    """

    def __init__(self) -> None:
        self._there: dict[tuple[str, str], int] = {}

    def __call__(self, df: DataFrame, path: str, app_id: str, version: int) -> None:
        key = run_id(df.sparkSession), path
        if key not in self._there:
            self._there[key] = last_version(df.sparkSession, path, app_id)
        if version > self._there[key]:
            append_next(df, path, app_id, version)


def last_version(spark: SparkSession, path: str, app_id: str) -> int:
    """The version of this application's last append to a table; -1 before the first."""
    return _written(spark, latest(spark, path), app_id)


def _written(spark: SparkSession, snapshot: Any, app_id: str) -> int:
    """The version of this application's last append up to a snapshot; -1 before the first.

    Of https://github.com/delta-io/delta, PROTOCOL.md: a version's checksum may hold the applications' versions. Where
    it does not, Delta computes the table's whole state, which takes four times as long as writing a small batch.
    """
    checksum = snapshot.checksumOpt()
    known = checksum.get().setTransactions() if checksum.isDefined() else checksum
    if known.isDefined():
        written = java_class(spark, "scala.jdk.javaapi.CollectionConverters").asJava(known.get())
        return max((int(entry.version()) for entry in written if entry.appId() == app_id), default=-1)
    found = snapshot.transactions().get(app_id)
    return int(found.get()) if found.isDefined() else -1


def query_id(spark: SparkSession) -> str:
    """Inside foreachBatch, the identity that the query's checkpoint carries.

    It makes Delta's (txnAppId, txnVersion) safe: batch numbers restart with a new checkpoint, and so does this.
    """
    return _of_batch(spark, "sql.streaming.queryId")


def run_id(spark: SparkSession) -> str:
    """Inside foreachBatch, what is another with each start of the query: of Spark, the group of its jobs."""
    return _of_batch(spark, "spark.jobGroup.id")


def _of_batch(spark: SparkSession, name: str) -> str:
    value = spark.sparkContext.getLocalProperty(name)
    if not value:
        raise RuntimeError("not inside a streaming query's batch")
    return str(value)
