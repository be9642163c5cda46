"""Measures, as a dashboard would see it, the seconds from an event's own timestamp to its place in the mart."""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from clickstream.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from clickstream.settings import Settings

POLL_S = 0.2
# How long after the last event a missing one is waited for.
GRACE_S = 60
# At a look, of what is new in each partition the oldest and the newest records, so many of each, and a fetch no larger
# than they need: what watches must not be what is measured.
LOOKED_AT = 5
FETCH_BYTES = 16 * 1024
BROKER_S = 60
MART = "gold.product_funnel_1m"
# Live rows only: an event is in them when the row's newest event is not older than it.
QUERY = f"""
    SELECT product_id, window_start, last_event_at FROM {MART}
    WHERE window_start >= clock_timestamp() - interval '5 minutes'
"""

Window = tuple[str, datetime]


@dataclass(frozen=True)
class Seen:
    """An event read from the topic."""

    product_id: str
    at: datetime

    @property
    def window(self) -> Window:
        return self.product_id, self.at.replace(second=0, microsecond=0)


def parsed(value: bytes | None) -> Seen | None:
    """The event that a record's value is; None when it is none that could get into the mart."""
    try:
        event = json.loads(value or b"")
        product, at = event["product_id"], datetime.fromisoformat(event["timestamp"])
    except (TypeError, ValueError, KeyError, RecursionError):
        return None
    return Seen(product, at) if isinstance(product, str) and at.tzinfo else None


def counted(pending: list[Seen], newest: Mapping[Window, datetime]) -> list[Seen]:
    """Those of the pending events that the mart's rows, by their newest event, contain."""
    return [event for event in pending if (last := newest.get(event.window)) is not None and last >= event.at]


def percentile(values: list[float], part: float) -> float:
    """Nearest-rank percentile; `part` from 0 to 1, NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


class Watch:
    """The topic from now on; of a fast one a sample. `records` are those that came, looked at or not."""

    def __init__(self, settings: Settings) -> None:
        """JobError when there is no broker or no topic."""
        try:
            # No group: nothing is committed.
            self._consumer = KafkaConsumer(
                bootstrap_servers=settings.bootstrap_servers.split(","), max_partition_fetch_bytes=FETCH_BYTES
            )
            numbers = self._consumer.partitions_for_topic(settings.topic)
            if not numbers:
                raise JobError(f"topic {settings.topic} does not exist; describe it in kafka_topics")
            partitions = [TopicPartition(settings.topic, number) for number in numbers]
            self._consumer.assign(partitions)
            self._next = self._consumer.end_offsets(partitions)
        except KafkaError as error:
            raise JobError(f"Kafka at {settings.bootstrap_servers} does not answer ({error}): make status") from error
        self.records = 0

    def look(self) -> list[bytes | None]:
        """Values of records that came since the last look. JobError when the broker no longer answers."""
        try:
            ends = self._consumer.end_offsets(list(self._next))
            oldest = {p: (start, min(start + LOOKED_AT, ends[p])) for p, start in self._next.items()}
            newest = {p: (max(stop, ends[p] - LOOKED_AT), ends[p]) for p, (_, stop) in oldest.items()}
            values = [value for ranges in (oldest, newest) for value in self._read(ranges)]
        except KafkaError as error:
            raise JobError(f"Kafka does not answer any more ({error}): make status") from error
        self.records += sum(end - self._next[partition] for partition, end in ends.items())
        self._next = ends
        return values

    def _read(self, ranges: Mapping[TopicPartition, tuple[int, int]]) -> Iterator[bytes | None]:
        """The values of these offsets, the second of each range excluded."""
        deadline = time.monotonic() + BROKER_S
        for partition, (start, _) in ranges.items():
            self._consumer.seek(partition, start)
        while any(self._consumer.position(partition) < stop for partition, (_, stop) in ranges.items()):
            if time.monotonic() > deadline:
                raise JobError(f"Kafka has sent nothing for {BROKER_S} s: make status")
            for partition, records in self._consumer.poll(timeout_ms=1000).items():
                start, stop = ranges[partition]
                yield from (record.value for record in records if start <= record.offset < stop)

    def close(self) -> None:
        self._consumer.close()


def measure(settings: Settings, seconds: float) -> dict[str, float]:
    """Watch the topic for some seconds and the mart until every event looked at is in it.

    Returns records, events (those looked at: all of a slow topic, of a fast one the first and the last that came since
    the look before), missing (not in the mart after a minute: refused by the rules, or too late), skipped (no events
    at all), and p50_s, p99_s, max_s. JobError when Kafka does not answer or there is no mart yet.
    An event counts as seen once its product's row has reached its timestamp; two events of one product in one minute
    that come out of order may make the earlier one's figure too small. The clocks of producer and node have to agree.
    """
    pending: list[Seen] = []
    latencies: list[float] = []
    skipped = 0
    end = time.monotonic() + seconds
    with closing(Watch(settings)) as watch, psycopg.connect(settings.marts_dsn, autocommit=True) as marts:
        while (watching := time.monotonic() < end) or (pending and time.monotonic() < end + GRACE_S):
            if watching:
                for value in watch.look():
                    if event := parsed(value):
                        pending.append(event)
                    else:
                        skipped += 1
            try:
                rows = marts.execute(QUERY).fetchall()
            except psycopg.errors.UndefinedTable:
                raise JobError(f"{MART} does not exist yet; the gold stream makes it when it starts") from None
            newest = {(product, start.astimezone(UTC)): last for product, start, last in rows}
            now = datetime.now(UTC)
            there = set(map(id, counted(pending, newest)))
            latencies += [(now - event.at) / timedelta(seconds=1) for event in pending if id(event) in there]
            pending = [event for event in pending if id(event) not in there]
            time.sleep(POLL_S)
    return {
        "records": watch.records,
        "events": len(latencies) + len(pending),
        "missing": len(pending),
        "skipped": skipped,
        "p50_s": round(percentile(latencies, 0.50), 2),
        "p99_s": round(percentile(latencies, 0.99), 2),
        "max_s": round(max(latencies, default=math.nan), 2),
    }
