"""When an event counts as seen in the mart."""

from __future__ import annotations

import math
from collections import namedtuple
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from kafka.errors import KafkaTimeoutError

from clickstream import cli, latency
from clickstream.errors import JobError
from clickstream.latency import Seen, Watch, counted, measure, parsed, percentile
from clickstream.settings import Settings

if TYPE_CHECKING:
    from kafka import TopicPartition

Record = namedtuple("Record", "offset value")


def at(second: float) -> datetime:
    return datetime(2026, 1, 1, 12, 0, int(second), int(second % 1 * 1_000_000), UTC)


def test_an_event_is_counted_when_its_own_window_has_reached_it() -> None:
    early, late, other = Seen("prod_0001", at(1)), Seen("prod_0001", at(9)), Seen("prod_0002", at(1))
    newest = {("prod_0001", at(0)): at(5), ("prod_0002", at(0).replace(minute=1)): at(0).replace(minute=1, second=7)}
    assert counted([early, late, other], newest) == [early]


def test_what_is_no_event_of_the_mart_is_skipped() -> None:
    good = b'{"product_id": "prod_0001", "timestamp": "2026-01-01T12:00:01.000Z"}'
    assert parsed(good) == Seen("prod_0001", at(1))
    for value in (
        None,
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"product_id": "prod_0001"}',
        good.replace(b'"prod_0001"', b'["prod_0001"]'),
        good.replace(b'"prod_0001"', b"null"),
        good.replace(b"Z", b""),
        good.replace(b'"2026-01-01T12:00:01.000Z"', b"1"),
    ):
        assert parsed(value) is None


def test_percentiles_are_nearest_rank() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1)) == (50, 99, 100)
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))


class Topic:
    """What KafkaConsumer does, as far as it is asked: a topic of one partition, whose values are their offsets."""

    def __init__(self, **_: Any) -> None:
        self.end, self.at, self.away = 100, 0, False

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return {0} if topic == "clicks" else None

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.partitions = partitions

    def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        if self.away:
            raise KafkaTimeoutError
        return dict.fromkeys(partitions, self.end)

    def seek(self, _: TopicPartition, offset: int) -> None:
        self.at = offset

    def position(self, _: TopicPartition) -> int:
        return self.at

    def close(self) -> None: ...

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[Record]]:
        """Three at a time, also beyond what is asked for."""
        came = [Record(offset, b"%d" % offset) for offset in range(self.at, min(self.at + 3, self.end))]
        self.at += len(came)
        return {self.partitions[0]: came}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[Watch, Topic]:
    topic = Topic()
    monkeypatch.setattr(latency, "KafkaConsumer", lambda **_: topic)
    return Watch(Settings(lake_uri="file:///unused", topic="clicks")), topic


def test_a_slow_topic_is_looked_at_whole_and_a_fast_one_at_both_ends(watch: tuple[Watch, Topic]) -> None:
    looks, topic = watch
    assert looks.look() == []
    for end, seen in (
        (104, [100, 101, 102, 103]),
        (112, [*range(104, 112)]),
        (1112, [112, 113, 114, 115, 116, 1107, 1108, 1109, 1110, 1111]),
    ):
        topic.end = end
        assert looks.look() == [b"%d" % offset for offset in seen]
    assert looks.records == 1012


def test_a_topic_or_a_broker_that_is_not_there_is_said(watch: tuple[Watch, Topic]) -> None:
    with pytest.raises(JobError, match="topic other does not exist"):
        Watch(Settings(lake_uri="file:///unused", topic="other"))
    looks, topic = watch
    topic.away = True
    with pytest.raises(JobError, match="Kafka does not answer any more"):
        looks.look()


def test_a_broker_that_sends_nothing_is_not_waited_for_without_end(
    watch: tuple[Watch, Topic], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, topic = watch
    topic.end = 104
    monkeypatch.setattr(latency, "BROKER_S", 0)
    monkeypatch.setattr(topic, "poll", lambda timeout_ms: {})
    with pytest.raises(JobError, match="Kafka has sent nothing"):
        looks.look()


@pytest.mark.parametrize("command", [["latency", "--seconds", "1"], ["show"], ["show", "--count"]])
def test_marts_that_are_away_are_told_in_a_line(
    watch: tuple[Watch, Topic], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--lake-uri", "file:///unused", "--topic", "clicks", "--marts-dsn", "host=/nonexistent"]
    assert cli.main([*command, *settings]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("clickstream: the marts cannot be used with 'host=/nonexistent'")
    assert not said.out


def test_a_mart_that_is_not_there_yet_is_told(watch: tuple[Watch, Topic], dsn: str) -> None:
    with pytest.raises(JobError, match=r"gold\.product_funnel_1m does not exist yet"):
        measure(Settings(lake_uri="file:///unused", topic="clicks", marts_dsn=dsn), 1)
