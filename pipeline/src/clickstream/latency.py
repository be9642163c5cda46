"""Measures, as a dashboard would see it, the seconds from an event's own timestamp to its place in the mart."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
from confluent_kafka import Consumer, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clickstream.settings import Settings

POLL_S = 0.2
# How long after the last event a missing one is waited for.
GRACE_S = 60
# Records read at once at most, and how many of them are looked at: reading JSON must not be what is measured.
CONSUMED = 20_000
LOOKED_AT = 100
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


def _positions(consumer: Consumer, topic: str) -> list[TopicPartition]:
    """The end of each partition."""
    partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
    found = [TopicPartition(topic, partition) for partition in partitions]
    for position in found:
        position.offset = consumer.get_watermark_offsets(position, timeout=30)[1]
    return found


def measure(settings: Settings, seconds: float) -> dict[str, float]:
    """Watch the topic for some seconds and the mart until every event looked at is in it.

    Returns records, events (those looked at: all of a slow topic, evenly spaced ones of a fast one), missing (not in
    the mart after a minute: refused by the rules, or too late), skipped (no events at all), and p50_s, p99_s, max_s.
    An event counts as seen once its product's row has reached its timestamp; two events of one product in one minute
    that come out of order may make the earlier one's figure too small. The clocks of producer and node have to agree.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": settings.bootstrap_servers,
            # The client wants a name; nothing is committed under it.
            "group.id": "clickstream-latency",
            "enable.auto.commit": False,
        }
    )
    consumer.assign(_positions(consumer, settings.topic))
    pending: list[Seen] = []
    latencies: list[float] = []
    read = skipped = 0
    end = time.monotonic() + seconds
    with psycopg.connect(settings.marts_dsn, autocommit=True) as marts:
        while (watching := time.monotonic() < end) or (pending and time.monotonic() < end + GRACE_S):
            records = [record for record in consumer.consume(CONSUMED, POLL_S) if record.error() is None]
            if watching:
                read += len(records)
                for record in records[:: max(1, len(records) // LOOKED_AT)]:
                    try:
                        event = json.loads(record.value() or b"")
                        pending.append(Seen(event["product_id"], datetime.fromisoformat(event["timestamp"])))
                    except (TypeError, ValueError, KeyError):
                        skipped += 1
            newest = {(product, start.astimezone(UTC)): last for product, start, last in marts.execute(QUERY)}
            now = datetime.now(UTC)
            there = set(map(id, counted(pending, newest)))
            latencies += [(now - event.at) / timedelta(seconds=1) for event in pending if id(event) in there]
            pending = [event for event in pending if id(event) not in there]
    consumer.close()
    return {
        "records": read,
        "events": len(latencies) + len(pending),
        "missing": len(pending),
        "skipped": skipped,
        "p50_s": round(percentile(latencies, 0.50), 2),
        "p99_s": round(percentile(latencies, 0.99), 2),
        "max_s": round(max(latencies, default=math.nan), 2),
    }
