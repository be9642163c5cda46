"""gold.sessions: what a visit is."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from conftest import CASES, as_text, csv_events

from clickstream import sessions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def test_golden(spark: SparkSession) -> None:
    """Events and the visits they make, side by side in tests/cases/gold."""
    visits = sessions.sessions(csv_events(spark, CASES / "gold" / "sessions.events.csv"))
    with (CASES / "gold" / "sessions.expected.csv").open() as lines:
        expected = list(csv.DictReader(lines))
    rows = visits.collect()
    assert sorted(as_text(row, expected[0]) for row in rows) == sorted(list(row.values()) for row in expected)
