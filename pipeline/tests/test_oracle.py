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
from oracle import COLUMNS, ORACLES

from clickstream import gold, sessions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

FIGURES = {windowed.table.name: windowed.figures for windowed in gold.WINDOWED} | {
    sessions.TABLE.name: sessions.sessions
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
def expected() -> dict[str, list[tuple[Any, ...]]]:
    database = duckdb.connect()
    database.execute(f"CREATE TABLE event ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())})")
    database.executemany(f"INSERT INTO event VALUES ({', '.join('?' * len(COLUMNS))})", EVENTS)
    return {name: sorted(database.execute(sql).fetchall(), key=str) for name, sql in ORACLES.items()}


def test_the_robot_is_cut_after_a_day(expected: dict[str, list[tuple[Any, ...]]]) -> None:
    (row,) = (row for row in expected["gold.sessions"] if row[2] == "robot")
    assert row[5] == 50  # every 29 minutes


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(len(EVENTS))))
def test_any_order_gives_what_the_oracle_says(
    spark: SparkSession, expected: dict[str, list[tuple[Any, ...]]], order: list[int]
) -> None:
    schema = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    events = spark.createDataFrame([EVENTS[n] for n in order], schema)
    for name, rows in expected.items():
        assert sorted(map(tuple, FIGURES[name](events).collect()), key=str) == rows
