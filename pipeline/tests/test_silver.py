"""Silver as a stream: golden cases, deduplication, the watermark, and what a replay must not change."""

from __future__ import annotations

import csv
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import CASES, KAFKA_COLUMNS, NOW, Silver, Topic, batches, event, full_disk
from prometheus_client import REGISTRY
from pyspark.sql import functions as F  # noqa: N812

from clickstream import lake, metrics, silver
from clickstream.session import batch_clock

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession

    from clickstream.settings import Settings


class Stream(Silver):
    """With what the tests ask of it."""

    def events(self) -> list[tuple[int, str]]:
        rows = silver.EVENTS.read(self.spark, self.settings).select("offset", "event_id").collect()
        return sorted((row["offset"], row["event_id"]) for row in rows)

    def rejects(self) -> list[tuple[int, list[str]]]:
        rows = silver.REJECTS.read(self.spark, self.settings).select("offset", "codes").collect()
        return sorted((row["offset"], row["codes"]) for row in rows)


@pytest.fixture
def stream(spark: SparkSession, settings: Settings) -> Stream:
    return Stream(spark, settings)


@pytest.mark.parametrize("case", sorted(path.stem for path in (CASES / "silver").glob("*.jsonl")))
def test_golden(case: str, stream: Stream, topic: Topic) -> None:
    """Input: a record a line, in batches. Expected: every offset, and where it ended."""
    total = 0
    for at, values in batches(CASES / "silver" / f"{case}.jsonl"):
        topic.append(stream.source, values, at=at)
        stream.run()
        total += len(values)
    ended = dict.fromkeys(range(total), ("dropped", ""))
    ended |= {offset: ("events", event_id) for offset, event_id in stream.events()}
    ended |= {offset: ("rejects", " ".join(codes)) for offset, codes in stream.rejects()}
    with (CASES / "silver" / f"{case}.expected.csv").open() as lines:
        expected = {int(row["offset"]): (row["table"], row["detail"]) for row in csv.DictReader(lines)}
    assert ended == expected


def test_typed_columns(stream: Stream, topic: Topic) -> None:
    topic.append(stream.source, [event(event_type="purchase", price=299.99)])
    stream.run()
    row = silver.EVENTS.read(stream.spark, stream.settings).selectExpr("*", "cast(price as string) text").first()
    assert row is not None
    assert row["text"] == "299.99"
    assert row["event_time"] == row["kafka_timestamp"] == datetime(2025, 11, 29, 12, 0)
    assert str(row["event_date"]) == "2025-11-29"
    assert (row["topic"], row["partition"], row["offset"], row["ruleset_version"]) == ("topic", 0, 0, 1)


def test_state_is_kept_between_runs(stream: Stream, topic: Topic) -> None:
    topic.append(stream.source, [event(1), event(2)])
    stream.run()
    topic.append(stream.source, [event(2), event(3)])
    stream.run()
    assert stream.events() == [(0, "evt_00000001"), (1, "evt_00000002"), (3, "evt_00000003")]


def test_invalid_records_are_kept_however_equal(stream: Stream, topic: Topic) -> None:
    """They pass the stateful operator with no event time: this pins that Spark keeps such rows."""
    topic.append(stream.source, [b"rubbish", b"rubbish", None, None, b"", event(1, price=-1), event(1, price=-1)])
    stream.run()
    topic.append(stream.source, [b"rubbish", event(1, price=-1), event(1)])
    stream.run()
    assert [offset for offset, _ in stream.rejects()] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert stream.events() == [(9, "evt_00000001")]


def test_invalid_records_after_the_watermark_moved_on(stream: Stream, topic: Topic) -> None:
    topic.append(stream.source, [event(1, timestamp="2025-11-29T12:00:00Z")])
    stream.run()
    topic.append(stream.source, [event(2, timestamp="2025-11-29T15:00:00Z")], at=NOW + timedelta(hours=3))
    stream.run()
    topic.append(stream.source, [b"rubbish", None], at=NOW + timedelta(hours=3))
    stream.run()
    assert [offset for offset, _ in stream.rejects()] == [2, 3]


def test_a_bad_clock_does_not_move_the_watermark(stream: Stream, topic: Topic) -> None:
    topic.append(
        stream.source,
        [
            event(1),
            event(2, timestamp="2025-11-29T13:00:00Z"),
            event(3, timestamp="9999-01-01T00:00:00Z"),
            event(4, timestamp="1999-01-01T00:00:00Z"),
            event(5, timestamp="2025-11-29T13:00:00Z", price=-1),
        ],
    )
    stream.run()
    topic.append(stream.source, [event(6, timestamp="2025-11-29T11:55:00Z")])
    query = stream.run()
    assert stream.events() == [(0, "evt_00000001"), (5, "evt_00000006")]
    progress = query.lastProgress
    assert progress is not None
    assert progress.eventTime["watermark"] == "2025-11-29T11:50:00.000Z"


def test_state_is_bounded_by_the_watermark(stream: Stream, topic: Topic) -> None:
    for hour in range(4):
        at = NOW + timedelta(hours=hour)
        stamp = f"{at:%Y-%m-%dT%H:%M:%S}.000Z"
        topic.append(stream.source, [event(hour * 100 + n, timestamp=stamp) for n in range(50)], at=at)
    stream.run()
    topic.append(stream.source, [b"rubbish"] * 50, at=NOW + timedelta(hours=3))
    stream.run()
    states = stream.spark.read.format("statestore").load(stream.settings.checkpoint("silver"))
    assert states.count() <= 100  # the last hour's ids and at most the last batch's rejects


@pytest.mark.parametrize("batches", [1, 3])
def test_a_replayed_batch_changes_nothing(stream: Stream, topic: Topic, batches: int) -> None:
    """Also one that was not the first of its run, and so was written without a look at what is there."""
    for number in range(batches):
        topic.append(stream.source, [event(10 * number + 1), event(10 * number + 2), b"rubbish"])
    stream.run()
    assert (len(stream.events()), len(stream.rejects())) == (2 * batches, batches)
    before = stream.events(), stream.rejects()
    stream.forget_last_commit()
    stream.run()
    assert (stream.events(), stream.rejects()) == before


def test_a_crash_between_the_two_tables_loses_and_doubles_nothing(stream: Stream, topic: Topic) -> None:
    topic.append(stream.source, [event(1), b"rubbish", event(2)])
    with full_disk(lake, "append_next", "rejects"):
        stream.run()
    assert (len(stream.events()), len(stream.rejects())) == (2, 0)
    stream.run()
    assert stream.events() == [(0, "evt_00000001"), (2, "evt_00000002")]
    assert stream.rejects() == [(1, ["not_json_object"])]


def test_a_new_checkpoint_is_a_new_writer(stream: Stream, topic: Topic) -> None:
    """Batch numbers start again with a new checkpoint; they must not be taken for a replay of the old ones."""
    topic.append(stream.source, [event(1)])
    stream.run()
    moved = stream.checkpoint()
    moved.rename(moved.with_name("old"))
    stream.run()
    assert len(stream.events()) == 2


def test_a_prometheus_sees_what_became_of_the_records(stream: Stream, topic: Topic) -> None:
    names = [
        ("clickstream_rows_read_total", {"query": "silver"}),
        ("clickstream_rows_written_total", {"table": "silver.events"}),
        ("clickstream_rows_written_total", {"table": "silver.rejects"}),
        ("clickstream_rejects_total", {"code": "not_json_object"}),
        ("clickstream_rejects_total", {"code": "device_unknown"}),
        ("clickstream_rejects_total", {"code": "price_not_positive"}),
        ("clickstream_batch_seconds_count", {"query": "silver"}),
    ]

    def values() -> list[float]:
        return [REGISTRY.get_sample_value(name, labels) or 0 for name, labels in names]

    before = values()
    topic.append(stream.source, [event(1), event(1), b"rubbish", event(2, device_type="fridge", price=-1)])
    progress = stream.run().recentProgress
    for batch in progress:
        metrics.observe("silver", batch, {"last_event_at": None})
    assert [b - a for a, b in zip(before, values(), strict=True)] == [4, 1, 2, 1, 1, 1, len(progress)]
    topic.append(stream.source, [event(3)])
    metrics.observe("silver", stream.run().recentProgress[0], {"last_event_at": "2025-11-29T12:00:00+00:00"})
    watermark = REGISTRY.get_sample_value("clickstream_watermark_timestamp_seconds", {"query": "silver"})
    assert watermark == (NOW - timedelta(minutes=10)).timestamp()
    assert REGISTRY.get_sample_value("clickstream_newest_event_timestamp_seconds") == NOW.timestamp()


def test_empty_batches_write_nothing(stream: Stream, topic: Topic) -> None:
    topic.append(stream.source, [event(1)])
    stream.run()
    log = Path(stream.settings.table("silver.events").removeprefix("file://")) / "_delta_log"
    before = sorted(path.name for path in log.glob("*.json"))
    stream.run()
    assert sorted(path.name for path in log.glob("*.json")) == before


def test_ensure_is_idempotent_and_applies_a_changed_retention(spark: SparkSession, bare: Settings) -> None:
    from dataclasses import replace

    from delta.tables import DeltaTable

    silver.EVENTS.ensure(spark, bare)
    silver.EVENTS.ensure(spark, bare)
    table = DeltaTable.forPath(spark, bare.table("silver.events"))
    assert table.history().count() == 1
    silver.EVENTS.ensure(spark, replace(bare, retention_hours=72))
    detail = table.detail().first()
    assert detail is not None
    assert detail["properties"]["delta.logRetentionDuration"] == "interval 72 hours"


def test_a_table_of_an_older_release_gets_its_new_columns(stream: Stream, topic: Topic) -> None:
    path = stream.settings.table("silver.events")
    topic.append(stream.source, [event(1)])
    stream.run()
    rows = stream.spark.read.format("delta").load(path).drop("event_hour", "session_key")
    rows.write.format("delta").mode("overwrite").option("overwriteSchema", "true").partitionBy("event_date").save(path)
    silver.EVENTS.ensure(stream.spark, stream.settings)
    topic.append(stream.source, [event(2)])
    stream.run()
    found = silver.EVENTS.read(stream.spark, stream.settings).orderBy("offset")
    assert [tuple(row) for row in found.select("event_id", "event_hour", "session_key").collect()] == [
        ("evt_00000001", None, None),
        ("evt_00000002", 12, "user_0001/session_1001"),
    ]


def test_the_time_of_a_batch_makes_no_other_code(spark: SparkSession, topic: Topic) -> None:
    """Each batch has its time as a constant; written into generated code it would have Spark compile every batch."""
    records = spark.createDataFrame(topic.records([event(1)]).rdd, KAFKA_COLUMNS)
    debug = spark._jvm.org.apache.spark.sql.execution.debug.package  # type: ignore[union-attr]

    def code(clock: Column) -> str:
        plan = records.select(clock.alias("at"))._jdf.queryExecution().executedPlan()
        return re.sub(r"#\d+L?", "", str(debug.codegenString(plan)).split("Generated code:")[1])

    compiled = {"spark.sql.codegen.wholeStage": "true", "spark.sql.codegen.factoryMode": "FALLBACK"}
    before = {name: spark.conf.get(name) for name in compiled}
    for name, value in compiled.items():
        spark.conf.set(name, value)
    try:
        assert "references" in code(batch_clock())
        assert code(batch_clock()) == code(batch_clock())
        assert code(F.current_timestamp()) != code(F.current_timestamp())
    finally:
        for name, text in before.items():
            spark.conf.set(name, text)
