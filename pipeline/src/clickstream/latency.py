"""Measures, as a dashboard would see it, the seconds from an event's own timestamp to its place in the mart."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
from kafka import KafkaConsumer, TopicPartition

from clickstream.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clickstream.settings import Settings

POLL_S = 0.2
# How long after the last event a missing one is waited for.
GRACE_S = 60
# Of each partition the newest records at a look, at most so many, and a fetch no larger than they need: what watches
# must not be what is measured.
LOOKED_AT = 10
FETCH_BYTES = 16 * 1024
# Live rows only: an event is in them when the row's newest event is not older than it.
QUERY = """
    SELECT product_id, window_start, last_event_at FROM gold.product_funnel_1m
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
        # By the client itself the offsets would be committed to a group; it has none.
        self._consumer = KafkaConsumer(
            bootstrap_servers=settings.bootstrap_servers.split(","), max_partition_fetch_bytes=FETCH_BYTES
        )
        partitions = [
            TopicPartition(settings.topic, p) for p in self._consumer.partitions_for_topic(settings.topic) or ()
        ]
        if not partitions:
            raise JobError(f"topic {settings.topic} does not exist; describe it in kafka_topics")
        self._consumer.assign(partitions)
        self._next = self._consumer.end_offsets(partitions)
        self.records = 0

    def look(self) -> list[bytes | None]:
        """Values of records that came since the last look."""
        ends = self._consumer.end_offsets(list(self._next))
        for partition, end in ends.items():
            self.records += end - self._next[partition]
            self._consumer.seek(partition, max(self._next[partition], end - LOOKED_AT))
        self._next = ends
        values: list[bytes | None] = []
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            for partition, records in self._consumer.poll(timeout_ms=1000).items():
                values += [record.value for record in records if record.offset < ends[partition]]
        return values

    def close(self) -> None:
        self._consumer.close()


def measure(settings: Settings, seconds: float) -> dict[str, float]:
    """Watch the topic for some seconds and the mart until every event looked at is in it.

    Returns records, events (those looked at: all of a slow topic, the newest at each look of a fast one), missing (not
    in the mart after a minute: refused by the rules, or too late), skipped (no events at all), and p50_s, p99_s, max_s.
    An event counts as seen once its product's row has reached its timestamp; two events of one product in one minute
    that come out of order may make the earlier one's figure too small. The clocks of producer and node have to agree.
    """
    watch = Watch(settings)
    pending: list[Seen] = []
    latencies: list[float] = []
    skipped = 0
    end = time.monotonic() + seconds
    with psycopg.connect(settings.marts_dsn, autocommit=True) as marts:
        while (watching := time.monotonic() < end) or (pending and time.monotonic() < end + GRACE_S):
            if watching:
                for value in watch.look():
                    try:
                        event = json.loads(value or b"")
                        pending.append(Seen(event["product_id"], datetime.fromisoformat(event["timestamp"])))
                    except (TypeError, ValueError, KeyError):
                        skipped += 1
            newest = {(product, start.astimezone(UTC)): last for product, start, last in marts.execute(QUERY)}
            now = datetime.now(UTC)
            there = set(map(id, counted(pending, newest)))
            latencies += [(now - event.at) / timedelta(seconds=1) for event in pending if id(event) in there]
            pending = [event for event in pending if id(event) not in there]
            time.sleep(POLL_S)
    watch.close()
    return {
        "records": watch.records,
        "events": len(latencies) + len(pending),
        "missing": len(pending),
        "skipped": skipped,
        "p50_s": round(percentile(latencies, 0.50), 2),
        "p99_s": round(percentile(latencies, 0.99), 2),
        "max_s": round(max(latencies, default=math.nan), 2),
    }
