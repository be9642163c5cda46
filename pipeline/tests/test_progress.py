"""A stream's position as a consumer group: the latest one gets there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from kafka.errors import KafkaTimeoutError

from clickstream import progress
from clickstream.progress import GroupPublisher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kafka.structs import OffsetAndMetadata, TopicPartition


class Broker:
    """What KafkaConsumer does with positions; it fails while the broker is away."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.failures = 0
        self.came, self.failed, self.go_on = threading.Event(), threading.Event(), threading.Event()
        self.go_on.set()

    def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata], timeout_ms: int) -> None:
        self.came.set()
        assert self.go_on.wait(20)
        if self.failures:
            self.failures -= 1
            self.failed.set()
            raise KafkaTimeoutError
        self.positions += [position.offset for position in offsets.values()]

    def close(self, timeout_ms: int) -> None: ...


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    broker = Broker()

    def consumer(**_: Any) -> Broker:
        return broker

    monkeypatch.setattr(progress, "KafkaConsumer", consumer)
    return broker


def test_a_position_that_was_not_committed_is_tried_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "RETRY_SECONDS", 0.01)
    broker.failures = 3
    group = GroupPublisher("nowhere:1", "ecom-bronze")
    group.publish({"clicks": {"0": 7}})
    for _ in range(2000):
        if broker.positions:
            break
        threading.Event().wait(0.01)
    group.close()
    assert broker.positions == [7]
    assert len(caplog.records) == 1


def test_the_end_does_not_lose_the_latest_position(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "RETRY_SECONDS", 60.0)
    broker.go_on.clear()
    group = GroupPublisher("nowhere:1", "ecom-bronze")
    group.publish({"clicks": {"0": 7}})
    assert broker.came.wait(20)
    group.publish({"clicks": {"0": 8}})  # while the one before is on its way
    group.publish({"clicks": {"0": 9}})
    threading.Timer(0.1, broker.go_on.set).start()
    group.close()
    assert broker.positions == [7, 9]


def test_the_end_waits_for_no_retry(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "RETRY_SECONDS", 60.0)
    broker.failures = 1
    group = GroupPublisher("nowhere:1", "ecom-bronze")
    group.publish({"clicks": {"0": 7}})
    assert broker.failed.wait(20)
    group.close()
    assert broker.positions == [7]
