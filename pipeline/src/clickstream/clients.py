"""The two Kafka clients behind one small interface, with the same promises.

kafka-python is the default; confluent-kafka (librdkafka) is the fast path and is imported only when it is chosen. Both
wait for all in-sync replicas, retry three times without duplicates, and put a key into the same partition. Neither
compresses: every reader can read it, also one that lacks a codec, as kafka-python does without its extras.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from kafka import KafkaProducer
from kafka.errors import KafkaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    # Called once for each record, in any thread: the error or None, then the partition and the offset.
    Done = Callable[["ClientError | None", int, int], None]
    # Called with what the client reports beside the records, such as brokers that are away.
    Complain = Callable[["ClientError"], None]

log = logging.getLogger("ecom-producer")

NAMES: Final = ("kafka-python", "confluent")
RETRIES = 3
RETRY_BACKOFF_MS = 500
DELIVERY_TIMEOUT_MS = 120_000
# Records wait this long for others to fill a batch, which makes many small requests few.
LINGER_MS = 20
# How long a client may take to end, after the time it has for its answers.
CLOSE_SECONDS = 5.0
# What the clients and the broker say of a record that no retry would make them take, by either client's name for it.
REFUSALS: Final = frozenset(
    {
        *("MSG_SIZE_TOO_LARGE", "INVALID_RECORD"),
        *("MessageSizeTooLargeError", "RecordListTooLargeError", "InvalidRecordError"),
    }
)
BATCH_BYTES = 256 * 1024


class ClientError(Exception):
    """A record could not be handed over, or no broker answered; `fatal` when the client has to be made anew."""

    def __init__(self, cause: str, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.fatal = fatal

    @property
    def refused(self) -> bool:
        """Whether it is the record that is at fault, so that trying it again is of no use."""
        return self.cause in REFUSALS

    @classmethod
    def of_kafka_python(cls, error: BaseException) -> ClientError:
        # The client does not leave the state of an error that is not retriable by itself.
        return cls(type(error).__name__, str(error), fatal=not getattr(error, "retriable", False))

    @classmethod
    def of_librdkafka(cls, error: Any) -> ClientError:
        # What it says of each record after a fatal error is not marked as one: the first was told already.
        return cls(error.name(), error.str(), fatal=error.fatal() or error.name() == "_FATAL")


def answer(done: Done, error: ClientError | None, partition: int = -1, offset: int = -1) -> None:
    """Gives an answer; what goes wrong in there is told, and must not end or be lost in the client's own thread."""
    try:
        done(error, partition, offset)
    except Exception:
        log.exception("an answer of Kafka was not handled")


class Client(Protocol):
    def send(self, key: bytes, value: bytes | None, done: Done) -> None:
        """Hands a record over; ClientError when the client does not take it."""

    def close(self, timeout: float) -> None:
        """Waits for answers as long as that; what has none by then may never get one."""


class KafkaPython:
    def __init__(self, servers: Sequence[str], topic: str) -> None:
        self._topic = topic
        try:
            self._producer = KafkaProducer(
                bootstrap_servers=list(servers),
                client_id="ecom-producer",
                acks="all",
                retries=RETRIES,
                retry_backoff_ms=RETRY_BACKOFF_MS,
                delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
                enable_idempotence=True,
                allow_auto_create_topics=False,
                bootstrap_timeout_ms=10_000,
                reconnect_backoff_max_ms=2_000,
                max_block_ms=5_000,
                linger_ms=LINGER_MS,
                batch_size=BATCH_BYTES,
            )
        except KafkaError as error:
            raise ClientError.of_kafka_python(error) from error

    def send(self, key: bytes, value: bytes | None, done: Done) -> None:
        try:
            future = self._producer.send(self._topic, key=key, value=value)
        except KafkaError as error:
            raise ClientError.of_kafka_python(error) from error
        future.add_callback(lambda metadata: answer(done, None, metadata.partition, metadata.offset))
        future.add_errback(lambda error: answer(done, ClientError.of_kafka_python(error)))

    def close(self, timeout: float) -> None:
        with contextlib.suppress(KafkaError):  # what has no answer by then gets one below
            self._producer.flush(timeout=timeout)
        try:
            self._producer.close(timeout=CLOSE_SECONDS)
        except KafkaError:
            # It waits for answers once more, and gives up before it has closed anything. Its thread does not end, and
            # may answer after the account is closed: what has no answer gets one now, that it is given up.
            self._producer._sender.force_close()
            self._producer._sender.join(CLOSE_SECONDS)


class Confluent:
    def __init__(self, servers: Sequence[str], topic: str, complain: Complain) -> None:
        try:
            from confluent_kafka import KafkaException, Producer
        except ModuleNotFoundError as error:
            raise SystemExit(f"--client confluent: {error}; pip install confluent-kafka") from error

        self._topic = topic
        self._complain = complain
        self._error: type[Exception] = KafkaException
        quiet = logging.getLogger("confluent")
        quiet.setLevel(logging.CRITICAL)  # every cause comes as an error too, and is told once
        self._producer = Producer(
            {
                "bootstrap.servers": ",".join(servers),
                "client.id": "ecom-producer",
                "acks": "all",
                "enable.idempotence": True,
                "retries": RETRIES,
                "retry.backoff.ms": RETRY_BACKOFF_MS,
                "delivery.timeout.ms": DELIVERY_TIMEOUT_MS,
                "allow.auto.create.topics": False,
                "reconnect.backoff.max.ms": 2_000,
                "linger.ms": LINGER_MS,
                "batch.size": BATCH_BYTES,
                "compression.type": "none",
                # The other client's, which is Java's; librdkafka's own is another hash.
                "partitioner": "murmur2_random",
                "error_cb": lambda error: complain(ClientError.of_librdkafka(error)),
            },
            logger=quiet,
        )
        try:
            found = self._producer.list_topics(topic, timeout=10).topics[topic].error
        except KafkaException as error:
            raise ClientError.of_librdkafka(error.args[0]) from error
        if found:
            raise ClientError.of_librdkafka(found)
        self._closed = threading.Event()
        # Answers come while somebody polls, also between two events of a slow shop.
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()

    def _poll(self) -> None:
        while not self._closed.is_set():
            self._wait(self._producer.poll, 0.1)

    def _wait(self, call: Callable[[float], int], timeout: float) -> None:
        """Gives answers while it waits. A fatal error is raised here, and by nothing else: no error_cb gets it."""
        try:
            call(timeout)
        except self._error as error:
            self._complain(ClientError.of_librdkafka(error.args[0]))
        except Exception:  # without the poller's thread no answer comes any more
            log.exception("an answer of Kafka was not handled")

    def send(self, key: bytes, value: bytes | None, done: Done) -> None:
        def answered(error: Any, message: Any) -> None:
            if error is None:
                answer(done, None, message.partition(), message.offset())
            else:
                answer(done, ClientError.of_librdkafka(error))

        try:
            self._producer.produce(self._topic, value, key, on_delivery=answered)
        except BufferError as error:
            raise ClientError("BufferError", str(error)) from error
        except self._error as error:
            raise ClientError.of_librdkafka(error.args[0]) from error

    def close(self, timeout: float) -> None:
        self._wait(self._producer.flush, timeout)
        self._closed.set()
        self._poller.join()
        # What has no answer gets one now: that it is given up.
        self._producer.purge()
        self._wait(self._producer.flush, CLOSE_SECONDS)


def connect(name: str, servers: Sequence[str], topic: str, complain: Complain) -> Client:
    """A client that has spoken to a broker; ClientError when none answers."""
    return Confluent(servers, topic, complain) if name == "confluent" else KafkaPython(servers, topic)
