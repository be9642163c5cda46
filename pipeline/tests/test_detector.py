"""The detector: what it calls an episode, that a stored state changes nothing, and how often it is right."""

from __future__ import annotations

import csv
import json
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CASES, NOW
from hypothesis import given
from hypothesis import strategies as st

from clickstream import catalogue
from clickstream.detector import (
    MINUTE,
    Detector,
    Episode,
    Parameters,
    interest_z,
    wilson_upper,
)
from clickstream.limits import ParameterError
from clickstream.producer import Shop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Row = tuple[str, int, int, int]

STAR = catalogue.HIGH_INTEREST_PRODUCT
# Small enough to follow by hand: five minutes, four other products, two minutes to close.
SMALL = Parameters(window_minutes=5, min_views=40, min_catalogue_purchases=20, min_products=4, close_minutes=2)


def others(views: int = 10, purchases: int = 2, count: int = 5) -> list[Row]:
    return [(f"prod_{n:04d}", views, 0, purchases) for n in range(1, count + 1)]


def star(views: int = 60, purchases: int = 0) -> Row:
    return (STAR, views, 0, purchases)


def fold(detector: Detector, minutes: Iterable[Iterable[Row]], start: datetime = NOW) -> list[Episode]:
    return [e for n, rows in enumerate(minutes) for e in detector.minute(start + n * MINUTE, rows)]


def opened(minutes: Iterable[Iterable[Row]], parameters: Parameters = SMALL) -> list[str]:
    return [e.product_id for e in fold(Detector(parameters), minutes) if e.closed_at is None]


GOLDEN = CASES / "detector"


def golden_parameters() -> Parameters:
    return Parameters(**json.loads((GOLDEN / "parameters.json").read_text()))


def golden_minutes() -> list[tuple[datetime, str, int, int, int]]:
    with (GOLDEN / "minutes.csv").open() as lines:
        return [
            (
                datetime.fromisoformat(line["minute"]),
                line["product_id"],
                int(line["views"]),
                int(line["carts"]),
                int(line["purchases"]),
            )
            for line in csv.DictReader(lines)
        ]


def golden_episodes() -> list[dict[str, str]]:
    with (GOLDEN / "episodes.expected.csv").open() as lines:
        return [{k: v for k, v in line.items() if k != "why"} for line in csv.DictReader(lines)]


def as_text(values: dict[str, Any]) -> dict[str, str]:
    """As the golden file writes them."""

    def text(value: Any) -> str:
        if isinstance(value, datetime):
            return f"{value:%Y-%m-%dT%H:%M:%SZ}"
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    return {name: text(value) for name, value in values.items()}


def test_golden_episodes() -> None:
    """The minutes of a shop and its episodes, side by side in tests/cases/detector."""
    detector = Detector(golden_parameters())
    for start, rows in groupby(golden_minutes(), key=itemgetter(0)):
        detector.minute(start, (row[1:] for row in rows))
    assert [as_text(asdict(e)) for e in detector.episodes] == golden_episodes()


@pytest.mark.parametrize(
    ("successes", "trials", "bound"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 95 % two-sided, so 97.5 % one-sided.
    [(81, 263, 0.3662), (15, 148, 0.1605), (0, 20, 0.1611), (1, 29, 0.1718), (0, 0, 1.0), (7, 7, 1.0)],
)
def test_wilsons_bound(successes: int, trials: int, bound: float) -> None:
    assert wilson_upper(successes, trials, 1.959964) == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize("views", [100, 200])
def test_the_bound_is_below_the_true_rate_no_more_often_than_it_says(views: int) -> None:
    """Exactly, by the binomial distribution, for every rate up to 0.19."""
    parameters = Parameters()
    bounds = [wilson_upper(k, views, parameters.confidence_z) for k in range(views)]
    for rate in (n / 1000 for n in range(1, 191)):
        wrong = sum(
            math.comb(views, k) * rate**k * (1 - rate) ** (views - k) for k, bound in enumerate(bounds) if bound < rate
        )
        assert wrong <= 1 - parameters.confidence


def test_the_z_of_a_catalogue_that_differs_is_smaller() -> None:
    assert interest_z(100, [10] * 9) == pytest.approx(2 * (math.sqrt(100.375) - math.sqrt(10.375)))
    assert 0 < interest_z(100, [1, 5, 10, 40, 90]) < 3


def test_high_interest_and_low_conversion_open_an_episode() -> None:
    (episode,) = fold(Detector(SMALL), [[*others(), star()]] * 3)
    assert (episode.product_id, episode.opened_at, episode.closed_at) == (STAR, NOW + 2 * MINUTE, None)
    assert (episode.views, episode.purchases, episode.interest_ratio, episode.catalogue_rate) == (120, 0, 6.0, 0.2)
    assert episode.conversion_upper < 0.1


@pytest.mark.parametrize(
    ("why", "rows"),
    [
        ("views as the others", [*others(views=60, purchases=12), star()]),
        ("views under three times the median", [*others(views=21, purchases=4), star()]),
        ("a conversion as the others'", [*others(), star(purchases=12)]),
        ("more purchases than views", [*others(), star(purchases=200)]),
        ("no views, only purchases", [*others(), (STAR, 0, 0, 60)]),
        ("too few others", [*others(count=3), star()]),
        ("one product only", [star()]),
        ("no events", []),
        ("rows of zeros", [*others(0, 0), star(0)]),
        ("a catalogue without purchases", [*others(purchases=0), star()]),
        ("a catalogue with purchases only", [*others(views=0), star()]),
        (
            "a catalogue of products as different",
            [("a", 1, 0, 9), ("b", 5, 0, 9), ("c", 9, 0, 9), ("d", 99, 0, 50), star()],
        ),
    ],
)
def test_no_episode(why: str, rows: list[Row]) -> None:
    assert opened([rows] * 10) == []


@pytest.mark.parametrize(
    ("name", "value"), [("min_views", 181), ("min_catalogue_purchases", 31), ("min_products", 6), ("interest_z", 16.0)]
)
def test_each_minimum_counts(name: str, value: float) -> None:
    minutes = [[*others(), star()]] * 3
    assert opened(minutes) == [STAR]
    assert opened(minutes, replace(SMALL, **{name: value})) == []
    # One less is enough.
    assert opened(minutes, replace(SMALL, **{name: value - 1})) == [STAR]


def test_rows_of_one_product_add_up_in_any_order() -> None:
    rows = [*others(), star()]
    split = [(name, 1, 0, 0) for name, *_ in rows] + [(n, v - 1, c, p) for n, v, c, p in rows]
    random.Random(1).shuffle(split)
    assert fold(Detector(SMALL), [split] * 3) == fold(Detector(SMALL), [rows] * 3) != []


def test_two_such_products_do_not_hide_each_other() -> None:
    assert set(opened([[*others(), ("prod_0099", 80, 0, 0), star()]] * 3)) == {STAR, "prod_0099"}


def test_products_that_open_together_are_in_order_of_name() -> None:
    rows = [*others(count=9), ("prod_0099", 60, 0, 0), ("prod_0050", 60, 0, 0)]
    assert opened([rows] * 3) == opened([rows[::-1]] * 3) == ["prod_0050", "prod_0099"]


def test_a_product_never_seen_before_is_judged_by_its_own_evidence() -> None:
    quiet = [others()] * 30
    assert opened([*quiet, [*others(), star(20)]]) == []
    assert opened([*quiet, [*others(), star(400)]]) == [STAR]


def test_a_product_at_the_limits_opens_once() -> None:
    """It hovers between what opens an episode and what keeps it open."""
    above, below = [*others(), star(40)], [*others(), star(20, 1)]
    minutes = [[*others(), star(60)]] * 3 + ([above] * 3 + [below] * 3) * 20
    detector = Detector(SMALL)
    assert len(fold(detector, minutes)) == 1
    # It did cross the limits that open: without the hysteresis there are many episodes.
    eager = replace(SMALL, close_ratio=SMALL.interest_ratio, close_fraction=SMALL.conversion_fraction, close_minutes=1)
    assert len(opened(minutes, eager)) > 10


def test_one_good_minute_keeps_an_episode_open() -> None:
    patient = replace(SMALL, window_minutes=1, close_minutes=3)
    bad, good = [*others(), star(100)], others()
    assert len(fold(Detector(patient), [[*others(20, 4), star(200)], *[good, good, bad] * 5])) == 1
    episodes = fold(Detector(patient), [[*others(20, 4), star(200)], good, good, good, bad])
    assert [(e.opened_at, e.closed_at) for e in episodes] == [
        (NOW + MINUTE, None),
        (NOW + MINUTE, NOW + 4 * MINUTE),
    ]


def test_an_episode_that_closed_may_open_again() -> None:
    busy, quiet = [[*others(), star()]] * 3, [others()] * 10
    detector = Detector(SMALL)
    fold(detector, [*busy, *quiet, *busy])
    assert [bool(e.closed_at) for e in detector.episodes] == [True, False]


def test_a_gap_ends_what_was_before_it() -> None:
    detector = Detector(SMALL)
    fold(detector, [[*others(), star()]] * 3)
    (closed,) = detector.minute(NOW + timedelta(days=400), others())
    # The window is empty when its last minute is five behind; the second minute after that closes.
    assert closed.closed_at == NOW + 9 * MINUTE
    assert detector.next == NOW + timedelta(days=400) + MINUTE


@pytest.mark.parametrize(
    ("start", "rows", "message"),
    [
        (NOW, [], "was folded already"),
        (NOW + 5 * MINUTE, [(STAR, 1, -1, 0)], f"{STAR} has a count below 0"),
        (NOW.replace(second=30) + MINUTE, [], "not the start of a minute"),
        (datetime(2025, 11, 29, 12, 5), [], "with a zone"),
    ],
)
def test_a_wrong_minute_is_refused_and_changes_nothing(start: datetime, rows: list[Row], message: str) -> None:
    detector = Detector(SMALL)
    fold(detector, [[*others(), star()]] * 3)
    before = detector.state
    with pytest.raises(ValueError, match=message):
        detector.minute(start, rows)
    assert detector.state == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_minutes", 0),
        ("window_minutes", 1441),
        ("window_minutes", 1.5),
        ("min_views", True),
        ("min_views", "50"),
        ("close_minutes", -1),
        ("interest_z", math.nan),
        ("interest_z", 0.0),
        ("interest_ratio", 1.9),
        ("confidence", 0.5),
        ("confidence", 1),
        ("conversion_fraction", 0.8),
        ("close_fraction", 1.1),
        ("close_ratio", math.inf),
    ],
)
def test_wrong_parameters_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}: .*; \w+"):
        Parameters(**{name: value})


TINY = Parameters(
    window_minutes=3,
    min_views=5,
    min_catalogue_purchases=2,
    min_products=2,
    close_minutes=2,
    confidence=0.8,
    interest_z=1.0,
)
COUNTS = st.tuples(st.sampled_from([0, 1, 3, 20]), st.integers(0, 2), st.sampled_from([0, 0, 1, 5]))
MINUTES = st.lists(st.dictionaries(st.sampled_from("abcde"), COUNTS), max_size=25)


def rows_of(minute: dict[str, tuple[int, int, int]]) -> list[Row]:
    return [(name, *counts) for name, counts in minute.items()]


@given(MINUTES, st.sets(st.integers(0, 25)))
def test_a_stored_state_and_minutes_left_out_change_nothing(
    minutes: list[dict[str, tuple[int, int, int]]], saves: set[int]
) -> None:
    whole = Detector(TINY)
    expected = fold(whole, map(rows_of, minutes))
    detector, changes, ended = Detector(TINY), [], []
    for number, minute in enumerate(minutes):
        if number in saves:
            ended += [e for e in detector.episodes if e.closed_at]
            detector = Detector(TINY, json.loads(json.dumps(detector.state)))
        # The last one is given, or the two would not have come to the same minute.
        if any(map(any, minute.values())) or number == len(minutes) - 1:
            changes += detector.minute(NOW + number * MINUTE, rows_of(minute))
    assert changes == expected
    assert detector.state == whole.state
    assert sorted([*ended, *detector.episodes], key=lambda e: (e.opened_at, e.product_id)) == whole.episodes


@given(MINUTES)
def test_episodes_of_a_product_follow_each_other(minutes: list[dict[str, tuple[int, int, int]]]) -> None:
    detector = Detector(TINY)
    changes = fold(detector, map(rows_of, minutes))
    for name in "abcde":
        mine = [e for e in changes if e.product_id == name]
        assert [e.closed_at is None for e in mine] == [n % 2 == 0 for n in range(len(mine))]
        times = [e.closed_at or e.opened_at for e in mine]
        assert times == sorted(set(times))


# ---- How often it is right: 200 seeded shops of each kind, at the 5 events a second ----

SHOPS = 200
RATE = 5
TARGET = 0.99
# About the mix of the shop's events that are not the star's.
ORDINARY_WEIGHTS = (70, 20, 10)
KINDS = {kind: place for place, kind in enumerate(catalogue.EVENT_TYPES)}


def shop_minutes(seed: int) -> Iterator[list[Row]]:
    """The minutes of the producer's own shop."""
    now = NOW.timestamp()
    shop = Shop(seed=seed, clock=lambda: now)
    while True:
        counts: dict[str, list[int]] = {}
        for _ in range(RATE * 60):
            event = next(shop)
            counts.setdefault(event["product_id"], [0, 0, 0])[KINDS[event["event_type"]]] += 1
            now += 1 / RATE
        yield [(name, *numbers) for name, numbers in counts.items()]  # type: ignore[misc]


def ordinary_minutes(seed: int, popularity: Sequence[float]) -> Iterator[list[Row]]:
    """The minutes of a shop where all products convert alike.

    Each minute's counts are drawn from the multinomial distribution, which is the law of counting that many events
    drawn one by one, as the shop draws them.
    """
    rng = random.Random(seed)
    cells = [(f"prod_{n:04d}", kind) for n in range(1, len(popularity) + 1) for kind in range(3)]
    weights = [p * weight for p in popularity for weight in ORDINARY_WEIGHTS]
    while True:
        counts: dict[str, list[int]] = {}
        for (name, kind), number in Counter(rng.choices(cells, weights, k=RATE * 60)).items():
            counts.setdefault(name, [0, 0, 0])[kind] = number
        yield [(name, *numbers) for name, numbers in counts.items()]  # type: ignore[misc]


def first_alarm(minutes: Iterator[list[Row]], until: int) -> Episode | None:
    detector = Detector()
    for number in range(until):
        changes = detector.minute(NOW + number * MINUTE, next(minutes))
        if changes:
            return changes[0]
    return None


def test_the_star_is_found_within_five_minutes(record_property: Callable[[str, object], None]) -> None:
    alarms = [first_alarm(shop_minutes(seed), 15) for seed in range(SHOPS)]
    delays = [(e.opened_at - NOW) / MINUTE if e and e.product_id == STAR else math.inf for e in alarms]
    rate = sum(delay <= 5 for delay in delays) / SHOPS
    report = f"{STAR} alerted within 5 minutes in {rate:.1%} of {SHOPS} shops, median {median(delays):g} minutes"
    record_property("detector", report)
    print(report)
    assert rate >= TARGET


@pytest.mark.parametrize("times", [1, 3])
def test_an_ordinary_shop_raises_no_alarm(times: int, record_property: Callable[[str, object], None]) -> None:
    """A hundred equal products; and with one that is looked at three times as often, and bought as often a view."""
    alarms = [first_alarm(ordinary_minutes(seed, [times, *[1] * 99]), 60) for seed in range(SHOPS)]
    rate = alarms.count(None) / SHOPS
    report = f"no alarm in an hour in {rate:.1%} of {SHOPS} shops whose first product has {times} x the views"
    record_property("detector", report)
    print(report)
    assert rate >= TARGET


def test_an_hour_with_the_star_is_one_episode() -> None:
    for seed in range(3):
        detector, minutes = Detector(), shop_minutes(seed)
        fold(detector, (next(minutes) for _ in range(60)))
        assert [(e.product_id, e.closed_at) for e in detector.episodes] == [(STAR, None)]
