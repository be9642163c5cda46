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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clickstream.settings import Settings

POLL_S = 0.2
# How long after the last event a missing one is waited for.
GRACE_S = 60
# Live rows only: an event is in them when the row's newest event is not older than it.
QUERY = """
    SELECT product_id, window_start, last_event_at FROM gold.product_funnel_1m
    WHERE window_start >= clock_timestamp() - interval '10 minutes'
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


def measure(settings: Settings, seconds: float) -> dict[str, float]:
    """Watch the topic for some seconds and the mart until every event seen is in it.

    Returns events, missing (not in the mart after a minute), skipped (no events at all), and p50_s, p99_s, max_s.
    An event counts as seen once its product's row has reached its timestamp; two events of one product in one minute
    that come out of order may make the earlier one's figure too small. The clocks of producer and node have to agree.
    """
    consumer = KafkaConsumer(bootstrap_servers=settings.bootstrap_servers.split(","))
    partitions = [TopicPartition(settings.topic, p) for p in consumer.partitions_for_topic(settings.topic) or ()]
    consumer.assign(partitions)
    consumer.seek_to_end()
    for partition in partitions:
        consumer.position(partition)
    pending: list[Seen] = []
    latencies: list[float] = []
    skipped = 0
    end = time.monotonic() + seconds
    with psycopg.connect(settings.marts_dsn, autocommit=True) as marts:
        while time.monotonic() < end or (pending and time.monotonic() < end + GRACE_S):
            for records in consumer.poll(timeout_ms=int(POLL_S * 1000)).values():
                for record in records if time.monotonic() < end else ():
                    try:
                        event = json.loads(record.value)
                        pending.append(Seen(event["product_id"], datetime.fromisoformat(event["timestamp"])))
                    except (TypeError, ValueError, KeyError):
                        skipped += 1
            newest = {(product, start.astimezone(UTC)): last for product, start, last in marts.execute(QUERY)}
            now = datetime.now(UTC)
            for event in counted(pending, newest):
                pending.remove(event)
                latencies.append((now - event.at) / timedelta(seconds=1))
    consumer.close()
    return {
        "events": len(latencies) + len(pending),
        "missing": len(pending),
        "skipped": skipped,
        "p50_s": round(percentile(latencies, 0.50), 2),
        "p99_s": round(percentile(latencies, 0.99), 2),
        "max_s": round(max(latencies, default=math.nan), 2),
    }
