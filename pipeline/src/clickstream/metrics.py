"""What a Prometheus can scrape of the streams in this process.

Counters begin at 0 with each start of a service, and a batch that is replayed after a crash is counted again: the
ledger of `clickstream account` is the truth, not these.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram

from clickstream import bronze

if TYPE_CHECKING:
    from collections.abc import Mapping

ROWS_READ = Counter("clickstream_rows_read", "Rows that a query read from its source.", ["query"])
ROWS_WRITTEN = Counter(
    "clickstream_rows_written",
    "Rows that a query appended to a table of Bronze or Silver, or wrote to one of Gold, final or live.",
    ["table"],
)
REJECTS = Counter("clickstream_rejects", "Rejected records by rule; one record may fail several.", ["code"])
# Batches take from some tenths of a second to, in a catch-up, minutes.
BATCH_SECONDS = Histogram(
    "clickstream_batch_seconds",
    "How long a query's batches took, with the rest after them (gold_hourly).",
    ["query"],
    buckets=(0.25, 0.5, 1, 2, 3, 5, 10, 30, 60, 300),
)
WATERMARK = Gauge("clickstream_watermark_timestamp_seconds", "A query's watermark, in seconds of Unix time.", ["query"])
NEWEST_EVENT = Gauge(
    "clickstream_newest_event_timestamp_seconds", "The newest event that reached Gold, in seconds of Unix time."
)
OFFSETS_BEHIND = Gauge(
    "clickstream_offsets_behind_latest", "Offsets between a query and the end of its farthest partition.", ["query"]
)


def observe(name: str, progress: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Take over what Spark says of a query's batch, by the names of its JSON, and what the query says of itself."""
    rows = max(0, progress["numInputRows"])
    ROWS_READ.labels(name).inc(rows)
    if name == bronze.QUERY:
        # It keeps what it reads, all of it.
        ROWS_WRITTEN.labels(bronze.CLICKSTREAM.name).inc(rows)
    BATCH_SECONDS.labels(name).observe(progress["batchDuration"] / 1000)
    watermark = progress.get("eventTime", {}).get("watermark")
    # Before the first event it is 1970.
    if watermark and (seconds := datetime.fromisoformat(watermark).timestamp()) > 0:
        WATERMARK.labels(name).set(seconds)
    behind = [source.get("metrics", {}).get("maxOffsetsBehindLatest") for source in progress["sources"]]
    if behind and behind[0] is not None:
        OFFSETS_BEHIND.labels(name).set(float(behind[0]))
    if extra.get("last_event_at"):
        NEWEST_EVENT.set(datetime.fromisoformat(extra["last_event_at"]).timestamp())
