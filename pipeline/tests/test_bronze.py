"""Bronze as a stream: the records as they came, each once, whoever wrote the batches before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import Topic, event, forget_last_commit

from clickstream import bronze

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from clickstream.settings import Settings


class Stream:
    """The real query, over a Delta table with Kafka's columns in the place of the topic."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self.spark, self.settings = spark, settings
        self.source = f"{settings.lake_uri}/topic"

    def run(self, *, sink: bool = False) -> None:
        """A batch a file; `sink` has Delta's own sink write them, as Bronze did at first."""
        records = self.spark.readStream.format("delta").option("maxFilesPerTrigger", 1).load(self.source)
        query = bronze.query(records, self.settings, bronze.writer(self.settings))
        if sink:
            query = (
                bronze.archive(records)
                .writeStream.queryName(bronze.QUERY)
                .format("delta")
                .option("checkpointLocation", self.settings.checkpoint(bronze.QUERY))
                .option("path", self.settings.table(bronze.CLICKSTREAM.name))
            )
        query.trigger(availableNow=True).start().awaitTermination()

    def forget_last_commit(self) -> None:
        forget_last_commit(Path(self.settings.checkpoint(bronze.QUERY).removeprefix("file://")))

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
    stream.forget_last_commit()
    stream.run()
    assert stream.rows() == before
    topic.append(stream.source, [b"more"])
    stream.run()
    assert stream.rows() == [*before, (2 * batches, b"more")]
