"""The fast client: real librdkafka against its own mock cluster, and the promises both clients make."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, Producer
from kafka.partitioner.default import murmur2

from clickstream import clients, producer
from clickstream.clients import ClientError
from clickstream.producer import parse_args

if TYPE_CHECKING:
    from collections.abc import Iterator

TOPIC = "clicks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The addresses of a mock cluster that has the topic, with as many partitions as it gives one by itself."""
    owner = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})
    found = owner.list_topics(TOPIC, timeout=10)
    yield ",".join(f"{broker.host}:{broker.port}" for broker in found.brokers.values())
    del owner


def ignore(error: ClientError) -> None: ...


def run(cluster: str, *argv: str) -> int:
    options = parse_args(["--client", "confluent", "--topic", TOPIC, "--bootstrap-servers", cluster, *argv])
    return producer.run(options, threading.Event())


def stored(cluster: str, count: int) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    consumer = Consumer(
        {"bootstrap.servers": cluster, "group.id": "test", "auto.offset.reset": "earliest", "log_level": 0}
    )
    consumer.subscribe([TOPIC])
    found = {}
    while len(found) < count:
        messages = consumer.consume(count, timeout=20)
        assert messages, f"{len(found)} of {count} records are there"
        found |= {(m.partition(), m.offset()): (m.key(), m.value()) for m in messages}
    consumer.close()
    return found


def test_a_run_sends_what_it_says(cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truth = tmp_path / "truth"
    assert run(cluster, "--rate", "1000", "--duration", "1", "--seed", "1", "--truth", str(truth)) == 0
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == "Producer closed. Total events sent: 1000"
    assert sum(line.startswith("Sent: ") for line in said.out.splitlines()) == 1000
    assert not said.err
    there = stored(cluster, 1000)
    lines = [json.loads(line) for line in truth.read_text().splitlines()]
    assert len(lines) == 1000
    for line in lines:
        key, value = there[line["partition"], line["offset"]]
        event = json.loads(value)
        assert (event["event_id"], event["user_id"]) == (line["event_id"], key.decode())


def test_a_key_is_in_the_partition_the_other_client_would_choose(cluster: str) -> None:
    client = clients.connect("confluent", [cluster], TOPIC, ignore)
    partitions = len(Producer({"bootstrap.servers": cluster}).list_topics(TOPIC, timeout=10).topics[TOPIC].partitions)
    assert partitions > 1
    keys = [f"user_{number:04d}".encode() for number in range(1, 501)]
    found: dict[bytes, int] = {}
    failures = []
    for key in keys:

        def done(error: ClientError | None, partition: int, offset: int, key: bytes = key) -> None:
            if error:
                failures.append(error)
            found[key] = partition

        client.send(key, b"{}", done)
    client.close(20)
    assert not failures
    assert found == {key: (murmur2(key) & 0x7FFFFFFF) % partitions for key in keys}
    assert set(found.values()) == set(range(partitions))


def test_what_no_broker_took_is_answered_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "DELIVERY_TIMEOUT_MS", 1_000)
    owner = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = owner.list_topics(TOPIC, timeout=10).brokers.values()
    complaints: list[ClientError] = []
    client = clients.connect("confluent", [f"{broker.host}:{broker.port}"], TOPIC, complaints.append)
    del owner  # and the broker with it
    answers: list[ClientError | None] = []
    for number in range(10):
        client.send(b"user_%04d" % number, b"{}", lambda error, *_: answers.append(error))
    client.close(20)
    assert [error and error.cause for error in answers] == ["_MSG_TIMED_OUT"] * 10
    assert {error.cause for error in complaints} >= {"_ALL_BROKERS_DOWN"}


def test_a_topic_that_is_not_there_is_named(cluster: str) -> None:
    with pytest.raises(ClientError) as error:
        clients.connect("confluent", [cluster], "other", ignore)
    assert error.value.cause == "UNKNOWN_TOPIC_OR_PART"


@pytest.mark.parametrize("name", clients.NAMES)
def test_a_failed_record_makes_the_run_fail_and_is_told_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        def send(self, key: bytes, value: bytes | None, done: clients.Done) -> None:
            done(ClientError("NOT_ENOUGH_REPLICAS", "too few copies"), -1, -1)

        def close(self, timeout: float) -> None: ...

    monkeypatch.setattr(clients, "connect", lambda chosen, *_: Refusing() if chosen == name else None)
    options = parse_args(["--client", name, "--rate", "1000", "--duration", "0.02"])
    assert producer.run(options, threading.Event()) == 1
    assert "Total events sent: 0" in capfd.readouterr().out
    assert [record.getMessage() for record in caplog.records] == [
        "NOT_ENOUGH_REPLICAS: too few copies",
        "20 events were not acknowledged",
    ]


def test_the_default_imports_neither_the_other_client_nor_spark() -> None:
    code = (
        "import sys; from clickstream import producer; producer.main(['--dry-run', '--duration', '1']);"
        "assert not {'confluent_kafka', 'pyspark'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(producer.__file__).parents[1], capture_output=True
    )
