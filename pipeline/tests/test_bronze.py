"""Bronze as a stream: the records as they came, each once, whoever wrote the batches before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Topic, event, forget_last_commit
from delta.exceptions import ConcurrentTransactionException

from clickstream import account, bronze, lake, silver
from clickstream.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyspark.sql import DataFrame, SparkSession

    from clickstream.settings import Settings


class Stream:
    """The real query, over a Delta table with Kafka's columns in the place of the topic."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self.spark, self.settings = spark, settings
        self.source = f"{settings.lake_uri}/topic"
        # One for all runs, so that it has to tell them apart; in silver's tests each run has its own.
        self.writer = bronze.writer(settings)

    def run(self, *, sink: bool = False) -> None:
        """A batch a file; `sink` has Delta's own sink write them, as Bronze did at first."""
        records = self.spark.readStream.format("delta").option("maxFilesPerTrigger", 1).load(self.source)
        query = bronze.query(records, self.settings, self.writer)
        if sink:
            query = (
                bronze.archive(records)
                .writeStream.queryName(bronze.QUERY)
                .format("delta")
                .option("checkpointLocation", self.settings.checkpoint(bronze.QUERY))
                .option("path", self.settings.table(bronze.CLICKSTREAM.name))
            )
        query.trigger(availableNow=True).start().awaitTermination()

    @property
    def checkpoint(self) -> Path:
        return Path(self.settings.checkpoint(bronze.QUERY).removeprefix("file://"))

    def rows(self) -> list[tuple[int, bytes]]:
        rows = bronze.CLICKSTREAM.read(self.spark, self.settings).select("offset", "value").collect()
        return sorted((row["offset"], bytes(row["value"])) for row in rows)


@pytest.fixture
def stream(spark: SparkSession, settings: Settings) -> Stream:
    return Stream(spark, settings)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("sink", [False, True])
def test_a_replayed_batch_changes_nothing(stream: Stream, topic: Topic, batches: int, sink: bool) -> None:
    """Nor one that Delta's own sink wrote before an upgrade; and the next go on behind it."""
    for _ in range(batches):
        topic.append(stream.source, [event(1), b"rubbish"])
    stream.run(sink=sink)
    before = stream.rows()
    assert [offset for offset, _ in before] == list(range(2 * batches))
    assert before[1][1] == b"rubbish"
    forget_last_commit(stream.checkpoint)
    stream.run()
    assert stream.rows() == before
    topic.append(stream.source, [b"more"])
    stream.run()
    assert stream.rows() == [*before, (2 * batches, b"more")]


def test_a_checkpoint_that_was_taken_back_doubles_nothing(stream: Stream, topic: Topic) -> None:
    for _ in range(3):
        topic.append(stream.source, [event(1), b"rubbish"])
        stream.run()
    before = stream.rows()
    for _ in range(2):
        forget_last_commit(stream.checkpoint)
    stream.run()
    assert stream.rows() == before


@pytest.mark.parametrize("append", [lake.append_next, lake.append_once])
def test_of_two_drivers_one_gives_way(
    spark: SparkSession,
    settings: Settings,
    topic: Topic,
    monkeypatch: pytest.MonkeyPatch,
    append: Callable[[DataFrame, str, str, int], None],
) -> None:
    """A driver that was taken for dead wrote the batch while this one was at it."""
    path = settings.table(bronze.CLICKSTREAM.name)
    rows = bronze.archive(topic.records([event(1)]))
    lake.append_next(rows, path, "query", 1)
    begin = lake.delta_log

    class Slow:
        """A table's log, between the start and the end of whose transactions another commits."""

        def __init__(self, log: Any) -> None:
            self._log = log

        def startTransaction(self) -> Any:  # noqa: N802
            begun = self._log.startTransaction()
            monkeypatch.undo()
            lake.append_next(rows, path, "query", 2)
            return begun

    monkeypatch.setattr(lake, "delta_log", lambda *where: Slow(begin(*where)))
    with pytest.raises(ConcurrentTransactionException):
        append(rows, path, "query", 2)
    assert bronze.CLICKSTREAM.read(spark, settings).count() == 2


@pytest.mark.parametrize("checksums", [True, False])
def test_what_is_there_is_not_appended_again(
    spark: SparkSession, settings: Settings, topic: Topic, checksums: bool
) -> None:
    """Whether the log's checksum says so, or the table's state, as after another writer without checksums."""
    path = settings.table(bronze.CLICKSTREAM.name)
    rows = bronze.archive(topic.records([event(1)]))
    for app_id, version in (("one", 3), ("other", 7)):
        lake.append_once(rows, path, app_id, version)
    log = Path(path.removeprefix("file://")) / "_delta_log"
    if not checksums:
        for checksum in log.glob("*.crc"):
            checksum.unlink()
        lake.java_class(spark, f"{lake.DELTA}.DeltaLog").clearCache()
    assert lake.latest(spark, path).checksumOpt().isDefined() == checksums
    assert [lake.last_version(spark, path, name) for name in ("one", "other", "third")] == [3, 7, -1]
    commits = len(list(log.glob("*.json")))
    for version in (2, 3):
        lake.append_once(rows, path, "one", version)
    assert len(list(log.glob("*.json"))) == commits
    lake.append_once(rows, path, "one", 4)
    assert bronze.CLICKSTREAM.read(spark, settings).count() == 3


def test_what_is_appended_has_the_types_of_its_table(spark: SparkSession, settings: Settings, topic: Topic) -> None:
    """`append_once` and `append_next` do not look."""
    records = topic.records([event(1), b"rubbish"])
    raw = bronze.archive(records)
    judged = silver.judge(silver.received(records), settings)
    checked = account.judged(raw, settings)
    for table, rows in (
        (bronze.CLICKSTREAM, raw),
        (silver.EVENTS, silver.events(judged, settings)),
        (silver.REJECTS, silver.rejects(judged, settings)),
        (silver.EVENTS, silver.events(checked, settings)),
        (silver.REJECTS, account.rejects(checked, silver.INVALID, settings)),
    ):
        assert rows.dtypes == [(field.name, field.dataType.simpleString()) for field in table.schema.fields]


def test_a_log_without_a_commit_is_named(spark: SparkSession, bare: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an application that was killed while it made the table."""
    path = bare.table(bronze.CLICKSTREAM.name)
    (Path(path.removeprefix("file://")) / "_delta_log").mkdir(parents=True)
    monkeypatch.setattr(lake, "CREATED_S", 0.5)
    with pytest.raises(JobError, match="a log without a commit"):
        bronze.CLICKSTREAM.ensure(spark, bare)
