"""When an event counts as seen in the mart."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from clickstream.latency import Seen, counted, percentile


def at(second: float) -> datetime:
    return datetime(2026, 1, 1, 12, 0, int(second), int(second % 1 * 1_000_000), UTC)


def test_an_event_is_counted_when_its_own_window_has_reached_it() -> None:
    early, late, other = Seen("prod_0001", at(1)), Seen("prod_0001", at(9)), Seen("prod_0002", at(1))
    newest = {("prod_0001", at(0)): at(5), ("prod_0002", at(0).replace(minute=1)): at(0).replace(minute=1, second=7)}
    assert counted([early, late, other], newest) == [early]


def test_percentiles_are_nearest_rank() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1)) == (50, 99, 100)
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))
