"""An event as the shop speaks it: the ten fields of the contract. Free of Spark, so that the producer can use it."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

Event = dict[str, Any]

FIELDS: Final = (
    "event_id",
    "user_id",
    "product_id",
    "event_type",
    "timestamp",
    "session_id",
    "product_category",
    "device_type",
    "page_url",
    "price",
)
# Without an event for this long a session has ended: one of exactly so much later is of the next, as in Gold.
SESSION_GAP_SECONDS: Final = 30 * 60.0


def iso_millis(moment: float) -> str:
    """Unix seconds as 2025-11-29T12:34:56.789Z."""
    seconds, millis = divmod(int(moment * 1000), 1000)
    return f"{_iso_seconds(seconds)}.{millis:03d}Z"


@lru_cache(maxsize=64)  # a fast shop has thousands of events a second, and this takes most of an event's time
def _iso_seconds(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"
