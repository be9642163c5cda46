"""Live windows: whatever batches bring, and in whatever order the table shows it, they are what their events say."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CASES, csv_events
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import functions as F  # noqa: N812
from test_gold import Gold, at

from clickstream import gold, silver
from clickstream.gold import window_start
from clickstream.live import GROUP_ENTRIES, LiveWindows, Shares, Touched, touched

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyspark.sql import SparkSession

    from clickstream.settings import Settings

MINUTE = timedelta(minutes=1)
START = datetime(2025, 11, 29, 12, tzinfo=UTC)
TOPIC = "topic"

# An event as LiveWindows sees it: its minute, its partition and offset, its product and its visitor.
Event = tuple[int, int, int, str, str]


def shares_of(events: Iterable[Event]) -> list[Any]:
    """What Spark would make of these events."""
    # A group may have several rows: here one for each partition.
    rows: dict[tuple[int, str, int], dict[str, Any]] = {}
    for minute, partition, offset, product, user in events:
        row = rows.setdefault(
            (minute, product, partition),
            {
                "window_start": START + minute * MINUTE,
                "product": product,
                "events": 0,
                "latest": offset,
                "users": [],
            },
        )
        row["events"] += 1
        row["users"] = [*{*row["users"], hash(user)}]
        row["latest"] = max(row["latest"], offset)
    return list(rows.values())


def touched_of(events: Iterable[Event]) -> dict[datetime, Touched]:
    found: dict[datetime, Touched] = {}
    for minute, partition, offset, _, _ in events:
        start = START + minute * MINUTE
        window = found.setdefault(start, Touched(0, start, {}, {}))
        first = window.first | {(TOPIC, partition): min(offset, window.first.get((TOPIC, partition), offset))}
        last = window.last | {(TOPIC, partition): max(offset, window.last.get((TOPIC, partition), offset))}
        found[start] = Touched(window.events + 1, start, first, last)
    return found


def figures_of(events: Iterable[Event]) -> dict[datetime, set[tuple[Any, ...]]]:
    groups: dict[tuple[datetime, str], list[Event]] = {}
    for event in events:
        groups.setdefault((START + event[0] * MINUTE, event[3]), []).append(event)
    found: dict[datetime, set[tuple[Any, ...]]] = {}
    for (start, product), of in groups.items():
        # The offset stands for the moment: of several partitions the greatest counts.
        row = (product, len(of), max(event[2] for event in of), len({event[4] for event in of}))
        found.setdefault(start, set()).add(row)
    return found


SHARES = Shares(
    of=lambda events, _: events,
    key=("product",),
    sums=("events",),
    greatest=("latest",),
    sets=("users",),
    figures=lambda groups: (
        {"product": key[0], "events": values["events"], "latest": values["latest"], "users": len(values["users"])}
        for key, values in groups.items()
    ),
)


def add(live: LiveWindows, events: Iterable[Event]) -> None:
    events = list(events)
    live.add({start: window.last for start, window in touched_of(events).items()}, shares_of(events))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[Event]], int, list[int], int]:
    """Batches, how many of them are over at the start, how far the table is ahead at each other one, and a limit."""
    next_offset = [0, 0]
    batches = []
    for _ in range(draw(st.integers(1, 8))):
        batch = []
        for _ in range(draw(st.integers(0, 6))):
            partition = draw(st.integers(0, 1))
            minute = draw(st.integers(0, 3))
            batch.append((minute, partition, next_offset[partition], draw(st.sampled_from("ab")), f"u{len(batch) % 3}"))
            next_offset[partition] += 1
        batches.append(batch)
    # The accounting job adds what came late: an offset from before, in any later batch.
    if draw(st.booleans()):
        late = draw(st.integers(0, len(batches) - 1))
        if batches[late]:
            moved = batches[late].pop(draw(st.integers(0, len(batches[late]) - 1)))
            batches[draw(st.integers(late, len(batches) - 1))].append(moved)
    began = draw(st.integers(0, len(batches)))
    ahead = draw(st.lists(st.integers(0, 3), min_size=len(batches), max_size=len(batches)))
    return batches, began, ahead, draw(st.sampled_from((0, 2 * GROUP_ENTRIES, 1000 * GROUP_ENTRIES)))


@given(histories())
def test_any_history_gives_the_figures_of_its_events(
    history: tuple[list[list[Event]], int, list[int], int],
) -> None:
    batches, began, ahead, limit = history

    def table(number: int) -> list[Event]:
        """What it shows while a batch is at work."""
        return [event for batch in batches[: number + 1 + ahead[number]] for event in batch]

    known = [START + event[0] * MINUTE for event in table(began)] if began < len(batches) else []
    brought: dict[tuple[str, int], int] = {}
    live = LiveWindows(SHARES, MINUTE, limit, until=max(known, default=None))
    served: dict[datetime, set[tuple[Any, ...]]] = {}
    for number in range(began, len(batches)):
        new = touched_of(batches[number])
        for _, partition, offset, _, _ in table(began) if number == began else batches[number]:
            brought[TOPIC, partition] = max(offset, brought.get((TOPIC, partition), -1))
        followed = {start for start, batch in new.items() if live.follows(start, batch)}
        add(live, (event for event in batches[number] if START + event[0] * MINUTE in followed))
        for start in new.keys() - followed:
            live.forget(start)
            there = [event for event in table(number) if event[2] <= brought.get((TOPIC, event[1]), -1)]
            live.add({start: brought}, shares_of(event for event in there if START + event[0] * MINUTE == start))
        for start in new:
            served[start] = {(row["product"], row["events"], row["latest"], row["users"]) for row in live.rows(start)}
        live.trim()
    truth = figures_of(event for batch in batches for event in batch)
    touched = {start for batch in batches[began:] for start in touched_of(batch)}
    assert served == {start: truth[start] for start in touched}


@pytest.mark.parametrize(
    ("windowed", "events_file"),
    [
        (gold.FUNNEL_1M, "funnel.events.csv"),
        (gold.FUNNEL_1H, "hours.events.csv"),
        (gold.CONVERSION_1H, "hours.events.csv"),
    ],
)
def test_shares_of_any_parts_add_up_to_the_figures(
    spark: SparkSession, windowed: gold.Windowed, events_file: str
) -> None:
    events = csv_events(spark, CASES / "gold" / events_file).select(
        "*",
        F.lit(TOPIC).alias("topic"),
        F.pmod(F.hash("user_id"), F.lit(3)).alias("partition"),
        F.monotonically_increasing_id().alias("offset"),
        F.pmod(F.hash("event_id", "session_id", F.lit(1)), F.lit(3)).alias("part"),
    )
    live = LiveWindows(windowed.shares, windowed.length, 1000 * GROUP_ENTRIES, until=None)
    for part in range(3):
        of_part, window = events.where(F.col("part") == part), window_start(windowed.length)
        last = {start: found.last for start, found in touched(of_part, window).items()}
        live.add(last, windowed.shares.rows(of_part, window))
    expected = {gold.in_utc(row) for row in windowed.figures(events).collect()}
    columns = windowed.mart.columns[:-1]
    starts = {row[0] for row in expected}
    assert {tuple(row[name] for name in columns) for start in starts for row in live.rows(start)} == expected


def test_what_does_not_fit_is_forgotten_oldest_first() -> None:
    live = LiveWindows(SHARES, MINUTE, 2 * GROUP_ENTRIES - 1, until=None)
    for number, minute in enumerate((0, 1, 2)):
        add(live, [(minute, 0, 2 * number, "a", "u1"), (minute, 0, 2 * number + 1, "a", "u2")])
    live.trim()
    new = Touched(1, START, {(TOPIC, 0): 99}, {})
    assert [live.follows(START + minute * MINUTE, new) for minute in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("limit", "added", "followed"),
    [
        (1_000_000, 1_000_000, 1_000_000),
        # All is followed, some in parts; only small batches are followed; few windows fit.
        (1_000_000, 3, 1_000_000),
        (1_000_000, 1_000_000, 3),
        (3 * GROUP_ENTRIES, 1_000_000, 1_000_000),
    ],
)
def test_the_table_may_be_ahead_of_the_stream(
    spark: SparkSession,
    settings: Settings,
    dsn: str,
    limit: int,
    added: int,
    followed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The writer gets commits in order, some of them together and most of them late: the table shows them before."""
    monkeypatch.setattr(gold, "ADDED", added)
    monkeypatch.setattr(gold, "FOLLOWED", followed)
    shop = Gold(spark, replace(settings, live_entries=limit), dsn)
    writer = gold.GoldWriter(spark, shop.settings, shop.marts, shop.tables)
    rng = random.Random(7)
    pending: list[tuple[int, int]] = []
    number = 0
    for commit in range(8):
        last = number + rng.randint(1, 5)
        shop.append(
            *(
                at(n, f"12:{n // 6:02d}:{n % 6 * 10:02d}", user_id=f"user_000{n % 4}", product_id=f"prod_000{n % 2}")
                for n in range(number, last)
            )
        )
        pending.append((number, last))
        number = last
        while pending and (commit == 7 or rng.random() < 0.4):
            taken = pending[: rng.randint(1, 2)]
            del pending[: len(taken)]
            events = silver.EVENTS.read(spark, shop.settings)
            writer(events.where(F.col("offset").between(taken[0][0], taken[-1][1] - 1)), commit)
    shop.check()


def test_a_window_that_was_taken_up_is_followed_from_then_on(
    spark: SparkSession, settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the table is always ahead of the stream."""
    shop = Gold(spark, settings, dsn)
    writer = gold.GoldWriter(spark, shop.settings, shop.marts, shop.tables)
    whole: list[int] = []
    events_of = writer._events
    monkeypatch.setattr(writer, "_events", lambda windows: (whole.append(number), events_of(windows))[1])
    for number in range(5):
        shop.append(at(number, f"12:00:{number:02d}", user_id=f"user_000{number}"))
        if number:  # the commit before this one
            writer(silver.EVENTS.read(spark, shop.settings).where(F.col("offset") == number - 1), number)
    # At the start, and when the stream brought what the table had then.
    assert whole == [1, 2]
    writer(silver.EVENTS.read(spark, shop.settings).where(F.col("offset") == 4), 5)
    shop.check()
