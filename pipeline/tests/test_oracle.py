"""Gold's figures against DuckDB, which is told what they mean in SQL; in whatever order the events come."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clickstream import gold, sessions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COLUMNS = {
    "event_id": "STRING",
    "event_time": "TIMESTAMP",
    "user_id": "STRING",
    "session_id": "STRING",
    "product_id": "STRING",
    "product_category": "STRING",
    "device_type": "STRING",
    "event_type": "STRING",
    "price": "DECIMAL(12,2)",
}
COUNTS = """
    count(*) FILTER (event_type = 'view'), count(*) FILTER (event_type = 'add_to_cart'),
    count(*) FILTER (event_type = 'purchase'),
    coalesce(sum(price) FILTER (event_type = 'purchase'), 0)::DECIMAL(22, 2)"""


def _funnel(unit: str) -> str:
    return f"""
        SELECT date_trunc('{unit}', event_time), date_trunc('{unit}', event_time) + INTERVAL 1 {unit}, product_id,
               last(product_category ORDER BY event_time, event_id), {COUNTS},
               count(DISTINCT user_id), count(DISTINCT session_id), max(event_time)
        FROM event GROUP BY 1, 2, 3"""


ORACLES = {
    gold.FUNNEL_1M.figures: _funnel("minute"),
    gold.FUNNEL_1H.figures: _funnel("hour"),
    gold.CONVERSION_1H.figures: f"""
        WITH by_value AS (
            SELECT *, 'category' AS dimension, product_category AS value FROM event
            UNION ALL SELECT *, 'device', device_type FROM event),
        hours AS (
            SELECT *, date_trunc('hour', event_time) AS hour, user_id || '/' || session_id AS session FROM by_value),
        bought AS (
            SELECT DISTINCT hour, dimension, value, session, true AS bought FROM hours WHERE event_type = 'purchase')
        SELECT hour, hour + INTERVAL 1 HOUR, dimension, value, {COUNTS},
               count(DISTINCT session) FILTER (event_type = 'view') AS seen,
               count(DISTINCT session) FILTER (event_type = 'view' AND bought) AS converted,
               count(*) FILTER (event_type = 'purchase') / nullif(count(*) FILTER (event_type = 'view'), 0),
               converted / nullif(seen, 0)
        FROM hours LEFT JOIN bought USING (hour, dimension, value, session) GROUP BY 1, 2, 3, 4""",
    # Without numbering: an event begins a visit when there is none before it for half an hour, and belongs to the
    # visit that began last.
    sessions.sessions: f"""
        WITH visit AS (
            SELECT user_id, session_id, event_time AS start FROM event e WHERE NOT EXISTS (
                SELECT 1 FROM event b WHERE b.user_id = e.user_id AND b.session_id = e.session_id
                AND b.event_time > e.event_time - INTERVAL 30 MINUTE
                AND (b.event_time < e.event_time OR b.event_time = e.event_time AND b.event_id < e.event_id)))
        SELECT start, max(event_time), e.user_id, e.session_id, first(device_type ORDER BY event_time, event_id),
               count(*), {COUNTS},
               CASE max(CASE event_type WHEN 'purchase' THEN 3 WHEN 'add_to_cart' THEN 2 ELSE 1 END)
                    WHEN 3 THEN 'purchase' WHEN 2 THEN 'cart' ELSE 'view' END,
               epoch(max(event_time)) - epoch(start),
               first(product_id ORDER BY event_time, event_id), last(product_id ORDER BY event_time, event_id)
        FROM event e ASOF JOIN visit v
             ON e.user_id = v.user_id AND e.session_id = v.session_id AND e.event_time >= v.start
        WHERE event_time < start + INTERVAL 24 HOUR GROUP BY start, e.user_id, e.session_id""",
}


def made_up(count: int = 400) -> list[tuple[Any, ...]]:
    """Events on a grid of ten minutes, so that instants coincide and pauses are exactly half an hour; and a robot
    whose visit lasts longer than a day."""
    rng = random.Random(42)
    begin = datetime(2025, 11, 29, 22)

    def one(number: int, at: timedelta, user: str) -> tuple[Any, ...]:
        product = rng.randrange(6)
        return (
            f"evt_{rng.randrange(10**6):06d}{number:06d}",
            begin + at,
            user,
            f"session_{rng.randrange(2)}" if user != "robot" else "session_0",
            f"prod_{product}",
            ("Home", "Toys")[product % 2],
            rng.choice(("mobile", "desktop")),
            rng.choices(("view", "add_to_cart", "purchase"), (6, 2, 2))[0],
            Decimal(rng.randrange(1, 10_000)) / 100,
        )

    people = [one(n, timedelta(minutes=10 * rng.randrange(200)), f"user_{rng.randrange(5)}") for n in range(count)]
    return people + [one(count + n, timedelta(minutes=29 * n), "robot") for n in range(60)]


EVENTS = made_up()


@pytest.fixture(scope="module")
def expected() -> dict[Any, list[tuple[Any, ...]]]:
    database = duckdb.connect()
    database.execute(f"CREATE TABLE event ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())})")
    database.executemany(f"INSERT INTO event VALUES ({', '.join('?' * len(COLUMNS))})", EVENTS)
    return {figures: sorted(database.execute(sql).fetchall(), key=str) for figures, sql in ORACLES.items()}


def test_the_robot_is_cut_after_a_day(expected: dict[Any, list[tuple[Any, ...]]]) -> None:
    (row,) = (row for row in expected[sessions.sessions] if row[2] == "robot")
    assert row[5] == 50  # every 29 minutes


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(len(EVENTS))))
def test_any_order_gives_what_the_oracle_says(
    spark: SparkSession, expected: dict[Any, list[tuple[Any, ...]]], order: list[int]
) -> None:
    schema = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    events = spark.createDataFrame([EVENTS[n] for n in order], schema)
    for figures, rows in expected.items():
        assert sorted(map(tuple, figures(events).collect()), key=str) == rows
