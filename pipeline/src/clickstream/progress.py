"""What the streams say of themselves: status files for health checks, consumer groups for Kafka's tools."""

from __future__ import annotations

import json
import logging
import os
import threading
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kafka import KafkaConsumer
from kafka.structs import OffsetAndMetadata, TopicPartition
from pyspark import SparkContext
from pyspark.sql.streaming.listener import JStreamingQueryListener, StreamingQueryListener

from clickstream import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from py4j.java_gateway import JavaObject
    from pyspark.sql.streaming.listener import (
        QueryIdleEvent,
        QueryProgressEvent,
        QueryStartedEvent,
        QueryTerminatedEvent,
    )

log = logging.getLogger("clickstream")

Offsets = dict[str, dict[str, int]]

# Between two tries to publish a position.
RETRY_SECONDS = 10.0


class GroupPublisher:
    """Publishes a stream's position as the offsets of a consumer group, for display only.

    The checkpoint is the truth: this runs beside the stream and keeps only the latest position. A failure is logged
    and tried again, since on an idle topic no other position comes.
    """

    def __init__(self, bootstrap_servers: str, group: str) -> None:
        self._servers = bootstrap_servers.split(",")
        self._group = group
        self._changed = threading.Condition()
        self._latest: Offsets | None = None  # that is not published yet
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"group-{group}", daemon=True)
        self._thread.start()

    def publish(self, offsets: Offsets) -> None:
        with self._changed:
            self._latest = offsets
            self._changed.notify()

    def close(self) -> None:
        """Tries once more to publish the latest position, and does not wait long for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        consumer: Any = None
        failing = closed = False
        while not closed:
            with self._changed:
                if failing:
                    self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)
                else:
                    self._changed.wait_for(lambda: self._closed or self._latest is not None)
                closed = self._closed
                offsets, self._latest = self._latest, None
            if offsets is None:
                continue
            try:
                if consumer is None:
                    # It subscribes to nothing and reads nothing: it commits as a member of no one's group.
                    consumer = KafkaConsumer(
                        bootstrap_servers=self._servers,
                        group_id=self._group,
                        client_id=self._group,
                        enable_auto_commit=False,
                    )
                consumer.commit(
                    {
                        TopicPartition(topic, int(partition)): OffsetAndMetadata(offset, "", -1)
                        for topic, partitions in offsets.items()
                        for partition, offset in partitions.items()
                    },
                    timeout_ms=10_000,
                )
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("group %s does not show the stream's position: %s", self._group, error)
                failing = True
                with self._changed:
                    self._latest = self._latest or offsets
                if consumer is not None:
                    consumer.close(timeout_ms=1000)
                    consumer = None
        if consumer is not None:
            consumer.close(timeout_ms=1000)


def write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


class _Events(JStreamingQueryListener):
    """Takes what is said of a batch as one text; not by pyspark's `fromJson`, which fails where a rate is absent.

    Its parent asks the JVM for each of some hundred figures, which took a seventh of the streams' processor time.
    """

    def onQueryProgress(self, jevent: JavaObject) -> None:  # noqa: N802
        self.pylistener.on_batch(json.loads(jevent.progress().json()))


class ProgressListener(StreamingQueryListener):
    """Keeps STATUS_DIR/<query>.json current.

    `seen_at` moves whenever the query shows it is alive, also when idle; `batch_at` only with a batch. Until
    `rests_until` it is silent because it gives way to others.
    """

    def __init__(
        self,
        status_dir: str,
        groups: Mapping[str, GroupPublisher],
        extra: Mapping[str, Callable[[], Mapping[str, Any]]],
        on_trigger: Callable[[str], None],
    ) -> None:
        self._dir = Path(status_dir) if status_dir else None
        if self._dir:
            self._dir.mkdir(parents=True, exist_ok=True)
        self._groups = groups
        self._extra = extra
        self._on_trigger = on_trigger
        self._names: dict[str, str] = {}
        self._status: dict[str, dict[str, Any]] = {}

    @cached_property
    def _jlistener(self) -> JavaObject:
        """What pyspark 4.2 hands to the JVM; a test fails when it does not ask for it any more."""
        jvm = SparkContext._jvm
        assert jvm is not None
        return jvm.PythonStreamingQueryListenerWrapper(_Events(self))

    def _write(self, name: str, **changes: Any) -> None:
        status = self._status.setdefault(name, {"query": name, "pid": os.getpid()})
        status |= changes
        status["seen_at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._dir:
            try:
                write_atomically(self._dir / f"{name}.json", status)
            except OSError as error:
                log.warning("the status of %s cannot be written: %s", name, error)

    def rests(self, name: str, seconds: float) -> None:
        """A query says that it will do nothing for a while."""
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        self._write(name, rests_until=until.isoformat(timespec="milliseconds"))

    def onQueryStarted(self, event: QueryStartedEvent) -> None:  # noqa: N802
        name = event.name or str(event.id)
        self._names[str(event.id)] = name
        self._write(name, state="starting")

    def onQueryProgress(self, event: QueryProgressEvent) -> None:  # noqa: N802
        self.on_batch(json.loads(event.progress.json))

    def on_batch(self, batch: Mapping[str, Any]) -> None:
        """Takes Spark's JSON of a batch's progress.

        A number that is none (a rate over no time) and a map that is empty are left out of it.
        """
        name = batch["name"] or batch["id"]
        end = batch["sources"][0]["endOffset"] if batch["sources"] else None
        rate = batch.get("processedRowsPerSecond")
        extra = dict(self._extra.get(name, dict)())
        metrics.observe(name, batch, extra)
        self._write(
            name,
            state="running",
            batch_id=batch["batchId"],
            batch_at=batch["timestamp"],
            input_rows=batch["numInputRows"],
            rows_per_second=None if rate is None else round(rate, 1),
            batch_ms=batch["batchDuration"],
            durations_ms=batch.get("durationMs", {}),
            watermark=batch.get("eventTime", {}).get("watermark"),
            end_offsets=end,
            **extra,
        )
        if name in self._groups and isinstance(end, dict):
            self._groups[name].publish(end)
        self._on_trigger(name)

    def onQueryIdle(self, event: QueryIdleEvent) -> None:  # noqa: N802
        name = self._names.get(str(event.id))
        if name is not None:
            self._write(name, state="idle")
            self._on_trigger(name)

    def onQueryTerminated(self, event: QueryTerminatedEvent) -> None:  # noqa: N802
        name = self._names.get(str(event.id))
        if name is not None:
            error = event.exception
            state = "stopped" if error is None else "failed"
            self._write(name, state=state, error=error and error.splitlines()[0][:500])
