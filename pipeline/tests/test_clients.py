"""The fast client: real librdkafka against its own mock cluster, and the promises both clients make."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import confluent_kafka
import pytest
from confluent_kafka import Consumer, KafkaError, Producer
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import MessageSizeTooLargeError
from kafka.future import Future
from kafka.partitioner.default import murmur2

from clickstream import clients, producer
from clickstream.clients import ClientError
from clickstream.producer import parse_args
from clickstream.shop import Shop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOPIC = "clicks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The addresses of a mock cluster that has the topic, with as many partitions as it gives one by itself."""
    owner = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})
    found = owner.list_topics(TOPIC, timeout=10)
    yield ",".join(f"{broker.host}:{broker.port}" for broker in found.brokers.values())
    del owner


def stored_as_the_other_client_reads(cluster: str, count: int) -> list[bytes]:
    # The mock cluster does not say which requests it knows as a broker does.
    consumer = KafkaConsumer(
        bootstrap_servers=cluster, api_version=(2, 1), auto_offset_reset="earliest", enable_auto_commit=False
    )
    consumer.assign([TopicPartition(TOPIC, number) for number in consumer.partitions_for_topic(TOPIC)])
    found: list[bytes] = []
    while len(found) < count:
        messages = consumer.poll(20_000)
        assert messages, f"{len(found)} of {count} records are there"
        found += [message.value for batch in messages.values() for message in batch]
    consumer.close()
    return found


def as_the_mock_cluster_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "KafkaProducer", partial(KafkaProducer, api_version=(2, 1)))


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
    # It has no codec here, as in the environment that is deployed.
    assert sorted(stored_as_the_other_client_reads(cluster, 1000)) == sorted(value for _, value in there.values())


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


def test_an_exception_in_an_answer_is_told_and_the_next_one_comes(
    cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = clients.connect("confluent", [cluster], TOPIC, ignore)
    answered = [threading.Event(), threading.Event()]
    for event in answered:

        def done(error: ClientError | None, partition: int, offset: int, event: threading.Event = event) -> None:
            event.set()
            raise ValueError("no such record")

        client.send(b"user_0001", b"{}", done)
        assert event.wait(20)
    client.close(20)
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == ["no such record"] * 2


def test_an_exception_in_an_answer_of_the_default_client_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def done(error: ClientError | None, partition: int, offset: int) -> None:
        raise ValueError("no such record")

    class Ready:
        def send(self, topic: str, **record: bytes) -> Future:
            return Future().success(SimpleNamespace(partition=0, offset=0))

    client = object.__new__(clients.KafkaPython)
    client._topic, client._producer = TOPIC, Ready()
    client.send(b"user_0001", b"{}", done)
    assert [record.name for record in caplog.records] == ["ecom-producer"]  # the command silences kafka's own


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_a_run_outlives_the_reader_of_its_lines(cluster: str, flags: list[str], tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    options = ["--client", "confluent", "--topic", TOPIC, "--bootstrap-servers", cluster, "--truth", str(truth)]
    command = [sys.executable, "-m", "clickstream.producer", *options, "--rate", "500", "--duration", "1", *flags]
    package = str(Path(producer.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        try:
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
        assert process.stderr.read() == b""
    assert len(truth.read_text().splitlines()) == 500


def too_large_for_kafka_python(topic: str, **record: bytes) -> Future:
    if len(record["value"]) > 1_000_000:
        raise MessageSizeTooLargeError("too large")
    return Future().success(SimpleNamespace(partition=0, offset=0))


@pytest.mark.parametrize("name", clients.NAMES)
def test_a_record_that_is_too_large_fails_alone(
    name: str,
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        clients,
        "KafkaProducer",
        lambda **_: SimpleNamespace(send=too_large_for_kafka_python, flush=lambda timeout: 0, close=lambda timeout: 0),
    )
    events = list(itertools.islice(Shop(seed=1), 9))
    for place in (2, 5):
        events[place]["page_url"] = "/" * 1_100_000
    path, state = tmp_path / "events.jsonl", tmp_path / "state"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    argv = [str(path), "--client", name, "--topic", TOPIC, "--bootstrap-servers", cluster, "--speed", "0"]
    assert producer.run(producer.parse_replay([*argv, "--resume", str(state)]), threading.Event()) == 1
    assert "Total events sent: 7" in capfd.readouterr().out
    assert len(caplog.records) == 2
    assert caplog.records[-1].getMessage() == "2 events were not acknowledged"
    assert json.loads(state.read_text())["rows"] == 9


@contextlib.contextmanager
def a_broker_that_leaves() -> Iterator[tuple[str, Callable[[], None]]]:
    """A mock cluster's only address, and what takes it away."""
    owners = [Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})]
    (broker,) = owners[0].list_topics(TOPIC, timeout=10).brokers.values()
    yield f"{broker.host}:{broker.port}", owners.clear


def test_what_no_broker_took_is_answered_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "DELIVERY_TIMEOUT_MS", 1_000)
    complaints: list[ClientError] = []
    with a_broker_that_leaves() as (address, leave):
        client = clients.connect("confluent", [address], TOPIC, complaints.append)
        leave()
        answers: list[ClientError | None] = []
        for number in range(10):
            client.send(b"user_%04d" % number, b"{}", lambda error, *_: answers.append(error))
        client.close(20)
    assert [error and error.cause for error in answers] == ["_MSG_TIMED_OUT"] * 10
    assert {error.cause for error in complaints} >= {"_ALL_BROKERS_DOWN"}


@pytest.mark.parametrize("name", clients.NAMES)
def test_a_client_whose_broker_has_left_is_closed_and_every_record_answered(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CLOSE_SECONDS", 1.0)
    as_the_mock_cluster_is_asked(monkeypatch)
    answers: list[ClientError | None] = []
    with a_broker_that_leaves() as (address, leave):
        client = clients.connect(name, [address], TOPIC, ignore)
        answered = threading.Event()
        client.send(b"user_0001", b"{}", lambda error, *_: answered.set())
        assert answered.wait(20)
        leave()
        for number in range(10):
            client.send(b"user_%04d" % number, b"{}", lambda error, *_: answers.append(error))
        client.close(0.2)
    assert len([error for error in answers if error]) == 10


def fail_for_good(client: clients.Client, message: bytes) -> None:
    """Makes librdkafka meet a fatal error, by its own function for tests."""
    assert isinstance(client, clients.Confluent)
    (path,) = (Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs").glob("librdkafka*")
    library = ctypes.CDLL(str(path))
    library.rd_kafka_test_fatal_error.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p]
    handle = ctypes.c_void_p.from_address(id(client._producer) + object.__basicsize__)  # the object's first field
    library.rd_kafka_test_fatal_error(handle, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, message)


def test_an_endless_run_goes_on_with_a_new_client_after_a_fatal_error(
    cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[clients.Client] = []
    connect = clients.connect

    def watched(*arguments: Any) -> clients.Client:
        made.append(connect(*arguments))
        return made[-1]

    monkeypatch.setattr(clients, "connect", watched)
    stop = threading.Event()
    options = parse_args(
        ["--client", "confluent", "--topic", TOPIC, "--bootstrap-servers", cluster, "--duration", "0", "--quiet"]
    )
    sender = producer.Sender(options, stop, producer.Console())
    assert sender.connect()
    records = options.records()
    fail_for_good(made[0], b"made up")
    assert sender.send(records)
    sender.close()
    assert len(made) == 2
    assert (sender.sent, sender.failed) == (1, 0)
    assert "OUT_OF_ORDER_SEQUENCE_NUMBER: test_fatal_error: made up" in [r.getMessage() for r in caplog.records]


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


@pytest.mark.parametrize(("failing", "code"), [(0, 0), (1, 1)])
def test_an_endless_run_that_lost_a_record_says_so_when_it_is_stopped(
    failing: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    answers: Iterator[ClientError | None] = itertools.chain(
        [ClientError("NOT_ENOUGH_REPLICAS", "too few copies")] * failing, itertools.repeat(None, 5)
    )

    class Stopping:
        def send(self, key: bytes, value: bytes | None, done: clients.Done) -> None:
            try:
                done(next(answers), 0, 0)
            except StopIteration:
                stop.set()
                done(None, 0, 0)

        def close(self, timeout: float) -> None: ...

    monkeypatch.setattr(clients, "connect", lambda *_: Stopping())
    assert producer.run(parse_args(["--duration", "0", "--rate", "1000", "--quiet"]), stop) == code


def test_a_cause_among_successes_is_told_once_until_it_was_away_for_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[ClientError | None] = itertools.cycle([ClientError("LEADER_NOT_AVAILABLE", "no leader"), None])

    class Half:
        def send(self, key: bytes, value: bytes | None, done: clients.Done) -> None:
            done(next(answers), 0, 0)

        def close(self, timeout: float) -> None: ...

    monkeypatch.setattr(clients, "connect", lambda *_: Half())
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(producer, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    options = parse_args(["--duration", "0", "--quiet"])
    sender = producer.Sender(options, threading.Event(), producer.Console())
    assert sender.connect()
    records = options.records()
    for pause, lines in ((0, 1), (200, 1), (200, 1), (400, 2)):
        clock.now += pause
        for _ in range(20):
            assert sender.send(records)
        assert [record.getMessage() for record in caplog.records] == ["LEADER_NOT_AVAILABLE: no leader"] * lines
    assert (sender.sent, sender.failed) == (40, 40)


def test_the_default_imports_neither_the_other_client_nor_spark() -> None:
    code = (
        "import sys; from clickstream import producer; producer.main(['--dry-run', '--duration', '1']);"
        "assert not {'confluent_kafka', 'pyspark'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(producer.__file__).parents[1], capture_output=True
    )
