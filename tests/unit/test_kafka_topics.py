"""What kafka_topics decides. That brokers do it is the Kafka scenario's to prove."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ansible/plugins/modules"))

from kafka_topics import Found, Plan, TopicsError, expected, kafka_text, make_plan, read_wanted, same


def topic(name: str = "clicks", **options: Any) -> dict[str, Any]:
    return {"name": name, "partitions": None, "replication_factor": None, "configs": {}, "state": "present", **options}


def there(partitions: int = 3, replication_factor: int = 1, **own: str) -> Found:
    kinds = {"retention.ms": "LONG", "cleanup.policy": "LIST", "preallocate": "BOOLEAN"}
    settings = {key.replace("_", "."): value for key, value in own.items()}
    return Found(partitions, replication_factor, True, settings, kinds)


def plan(description: dict[str, Any], found: Found | None, brokers: int = 1, reset: bool = False) -> Plan:
    return make_plan(read_wanted([description]), {"clicks": found} if found else {}, brokers, reset)


def test_a_topic_as_described_needs_nothing() -> None:
    same_topic = topic(partitions=3, replication_factor=1, configs={"retention.ms": 1000, "cleanup.policy": ["delete"]})
    result = plan(same_topic, there(retention_ms="1000", cleanup_policy="delete"))
    assert result == Plan()


def test_what_is_not_described_is_left_alone() -> None:
    assert plan(topic(), there(9, 3, retention_ms="1000"), brokers=3) == Plan()


def test_a_missing_topic_is_created() -> None:
    result = plan(topic(partitions=3, replication_factor=1), None)
    assert [wanted.name for wanted in result.create] == ["clicks"]
    assert result.changes == ["clicks: created with 3 partitions, replication factor 1"]


def test_more_copies_than_brokers_are_refused_before_creating() -> None:
    result = plan(topic(replication_factor=3), None, brokers=2)
    assert not result.create
    assert result.refused == ["clicks: replication_factor is 3 and the cluster has 2 brokers; lower it or add brokers"]


def test_partitions_grow_and_never_shrink() -> None:
    assert plan(topic(partitions=5), there(3)).grow == {"clicks": 5}
    shrunk = plan(topic(partitions=2), there(3))
    assert not shrunk.grow and "cannot be taken away" in shrunk.refused[0]


def test_replicas_are_not_moved() -> None:
    result = plan(topic(replication_factor=3), there(3, 1), brokers=3)
    assert "kafka-reassign-partitions" in result.refused[0] and not result.changes


def test_settings_change_one_by_one() -> None:
    wanted = topic(configs={"retention.ms": 2000, "preallocate": None, "max.message.bytes": 1})
    result = plan(wanted, there(retention_ms="1000", preallocate="true", cleanup_policy="compact"))
    assert result.alter == {"clicks": {"retention.ms": "2000", "preallocate": None, "max.message.bytes": "1"}}
    assert "clicks: preallocate reset" in result.changes


def test_a_setting_to_reset_that_is_not_set_needs_nothing() -> None:
    assert plan(topic(configs={"preallocate": None}), there()) == Plan()


def test_unmanaged_settings_are_reset_only_when_asked_to() -> None:
    wanted, found = topic(configs={"retention.ms": 1000}), there(retention_ms="1000", cleanup_policy="compact")
    assert plan(wanted, found) == Plan()
    assert plan(wanted, found, reset=True).alter == {"clicks": {"cleanup.policy": None}}


def test_an_absent_topic_is_deleted_once() -> None:
    assert plan(topic(state="absent"), there()).delete == ["clicks"]
    assert plan(topic(state="absent"), None) == Plan()


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (604800000, "604800000"), (0.5, "0.5"), (["delete", "compact"], "delete,compact"), (None, None)],
)
def test_values_are_written_as_kafka_writes_them(value: Any, text: str | None) -> None:
    assert kafka_text(value) == text


@pytest.mark.parametrize(
    ("wanted", "found", "kind", "equal"),
    [
        ("TRUE", "true", "BOOLEAN", True),
        ("delete, compact", "delete,compact", "LIST", True),
        ("compact,delete", "delete,compact", "LIST", False),
        ("0.50", "0.5", "DOUBLE", True),
        ("soon", "1", "LONG", False),
        ("Producer", "producer", "STRING", False),
        ("x", None, "STRING", False),
    ],
)
def test_spellings_of_one_value_are_equal(wanted: str, found: str | None, kind: str, equal: bool) -> None:
    assert same(wanted, found, kind) is equal


def test_every_mistake_in_a_description_is_told_at_once() -> None:
    with pytest.raises(TopicsError) as caught:
        read_wanted([topic("a/b"), topic("c", partitions=0), topic("c", configs={"x": {}})])
    message = str(caught.value)
    assert "'a/b' is not a topic name" in message
    assert "c: partitions is 0" in message
    assert "c is described twice" in message
    assert "c: x is a mapping" in message


def test_the_diff_shows_what_is_to_come() -> None:
    wanted = read_wanted([topic(partitions=5, configs={"retention.ms": 2000, "preallocate": None})])
    found = {"clicks": there(3, 1, retention_ms="1000", preallocate="true")}
    after = expected(wanted, found, make_plan(wanted, found, 1, False))
    assert after == {"clicks": {"partitions": 5, "replication_factor": 1, "configs": {"retention.ms": "2000"}}}
