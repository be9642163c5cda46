"""What the streams' runner does around the queries."""

from __future__ import annotations

import json
import queue
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from conftest import Silver, event

from clickstream import streams
from clickstream.progress import ProgressListener

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Topic
    from pyspark.sql import SparkSession

    from clickstream.settings import Settings


def test_the_status_is_what_spark_says_of_the_batch(
    spark: SparkSession, settings: Settings, topic: Topic, tmp_path: Path
) -> None:
    told = queue.Queue[str]()
    listener = ProgressListener(str(tmp_path), {}, {"silver": lambda: {"last_event_at": None}}, told.put)
    stream = Silver(spark, settings)
    topic.append(stream.source, [event(1), b"rubbish"])
    spark.streams.addListener(listener)
    try:
        batches = stream.run().recentProgress
        assert [told.get(timeout=60) for _ in batches] == ["silver"] * len(batches)
    finally:
        spark.streams.removeListener(listener)
    assert sum(batch["numInputRows"] for batch in batches) == 2
    status, last = json.loads((tmp_path / "silver.json").read_text()), batches[-1]
    said = {
        "batch_id": last["batchId"],
        "batch_at": last["timestamp"],
        "input_rows": last["numInputRows"],
        "batch_ms": last["batchDuration"],
        "durations_ms": last["durationMs"],
        "watermark": last["eventTime"]["watermark"],
        "end_offsets": json.loads(last["sources"][0]["endOffset"]),
        "last_event_at": None,
    }
    assert {name: status[name] for name in said} == said


@pytest.mark.parametrize(("end", "published"), [({"clicks": {"0": 5}}, [{"clicks": {"0": 5}}]), (None, [])])
def test_a_batch_of_which_spark_says_little(tmp_path: Path, end: object, published: list[object]) -> None:
    """As of Bronze, which has no watermark, and of a batch that took no time."""
    found = list[object]()
    group = SimpleNamespace(publish=found.append)
    listener = ProgressListener(str(tmp_path), {"bronze": group}, {}, lambda _: None)  # type: ignore[dict-item]
    batch = {"id": "an id", "name": "bronze", "batchId": 3, "timestamp": "2025-11-29T12:00:00.000Z"}
    batch |= {"numInputRows": 0, "batchDuration": 0, "sources": [{"endOffset": end}]}
    listener.on_batch(batch)
    status = json.loads((tmp_path / "bronze.json").read_text())
    assert (status["batch_id"], status["rows_per_second"], status["watermark"]) == (3, None, None)
    assert status["end_offsets"] == end
    assert found == published
    listener.on_batch(batch | {"name": None})
    assert (tmp_path / "an id.json").is_file()


@pytest.mark.parametrize(("work", "percent", "rest"), [(5, 20, 20), (5, 50, 5), (5, 100, 0), (300, 20, 600)])
def test_the_hours_rest_for_the_minutes(
    monkeypatch: pytest.MonkeyPatch, work: float, percent: int, rest: float
) -> None:
    clock, rests = [0.0], list[float]()
    monkeypatch.setattr(streams.time, "monotonic", lambda: clock[0])

    def write(_batch: object, _number: int) -> None:
        clock[0] += work

    streams.sparing(write, percent, rests.append)(None, 0)  # type: ignore[arg-type]
    assert rests == [pytest.approx(rest)]


def test_a_batch_that_failed_does_not_rest() -> None:
    rests: list[float] = []

    def write(_batch: object, _number: int) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        streams.sparing(write, 20, rests.append)(None, 0)  # type: ignore[arg-type]
    assert rests == []


def test_a_query_says_until_when_it_rests(tmp_path: Path) -> None:
    ProgressListener(str(tmp_path), {}, {}, lambda _: None).rests("gold_hourly", 90)
    status = json.loads((tmp_path / "gold_hourly.json").read_text())
    left = datetime.fromisoformat(status["rests_until"]) - datetime.now(UTC)
    assert timedelta(seconds=80) < left <= timedelta(seconds=90)
