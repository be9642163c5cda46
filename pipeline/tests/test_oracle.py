"""Silver and Gold against the oracle, which is told a second time what they mean; in whatever order the events come."""

from __future__ import annotations

import itertools
import random
import zlib
from collections import Counter
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import duckdb
import oracle
import pytest
from conftest import KAFKA_COLUMNS, NOW, Topic
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from oracle import COLUMNS, ORACLES
from test_account import Lake

from clickstream import gold, sessions, silver
from clickstream.faults import Faults
from clickstream.shop import Shop

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from clickstream.settings import Settings

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
    oracle.load(database, EVENTS)
    return {name: sorted(oracle.gold(database, name), key=str) for name in ORACLES}


def test_the_robot_is_cut_after_a_day(expected: dict[str, list[tuple[Any, ...]]]) -> None:
    (row,) = (row for row in expected["gold.sessions"] if row[2] == "robot")
    assert row[5] == 50  # every 29 minutes


@examples(max_examples=4, derandomize=True, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(len(EVENTS))))
def test_any_order_gives_what_the_oracle_says(
    spark: SparkSession, expected: dict[str, list[tuple[Any, ...]]], order: list[int]
) -> None:
    schema = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    events = spark.createDataFrame([EVENTS[n] for n in order], schema)
    for name, rows in expected.items():
        assert sorted(map(tuple, FIGURES[name](events).collect()), key=str) == rows


def test_from_bytes_to_figures(spark: SparkSession, settings: Settings) -> None:
    """Faults of every kind, through the stream, the accounting job and Gold: the oracle has nothing but Bronze."""
    began = NOW.timestamp()
    rates = dict.fromkeys(("duplicate", "conflicting", "late", "future"), 0.05) | {"malformed": 0.1}
    # An hour and a half, so that repetitions come before and after the watermark.
    clock = itertools.count(began, 9)
    records = list(itertools.islice(Faults(Shop(seed=3, clock=lambda: next(clock)), rates, seed=3), 600))
    topic, ends = Topic(spark), Counter[int]()
    lake = Lake(spark, settings, topic)
    for part in range(0, len(records), 200):
        rows = []
        for record in records[part : part + 200]:
            # As in Kafka: a partition has all of a key. A producer's clock says when, for a repetition a past moment.
            partition = zlib.crc32(record.key) % 3
            moment = datetime.fromisoformat(record.event["timestamp"])
            at = moment + timedelta(seconds={"late": 1801, "future": -3600 - 299}.get(record.truth.kind, 1))
            rows.append(("topic", partition, ends[partition], at, 0, record.key, record.value, []))
            ends[partition] += 1
        lake.take(spark.createDataFrame(rows, KAFKA_COLUMNS))
    assert lake.account().unexplained == []

    verdicts = lake.verdicts()
    assert lake.placed() == {position: verdict[:2] for position, verdict in verdicts.items()}
    places = Counter(verdict.place for verdict in verdicts.values())
    assert places == Counter({"late": "event"}.get(r.truth.expect, r.truth.expect) for r in records)
    assert set(places) == {"event", "invalid", "duplicate", "conflicting_duplicate"}

    database = duckdb.connect()
    oracle.load(database, oracle.events(verdicts))
    kept = silver.EVENTS.read(spark, settings)
    for name, figures in FIGURES.items():
        rows = sorted(map(tuple, figures(kept).collect()), key=str)
        assert rows == sorted(oracle.gold(database, name), key=str), name
