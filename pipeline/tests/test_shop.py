"""The shop: its shares and rates, its walks and sessions, and ids that never meet."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from datetime import UTC, datetime
from math import isclose
from typing import TYPE_CHECKING

import pytest

from clickstream import catalogue, shop
from clickstream.event import FIELDS, SESSION_GAP_SECONDS, iso_millis
from clickstream.shop import Shop

if TYPE_CHECKING:
    from clickstream.event import Event

# Upper 0.1 % points of the chi-square distribution: a seeded run passes or fails for ever.
CHI2_999 = {1: 10.83, 2: 13.82, 14: 36.12}
STAR = catalogue.HIGH_INTEREST_PRODUCT


def take(count: int, **options: object) -> list[Event]:
    return list(itertools.islice(Shop(**options), count))  # type: ignore[arg-type]


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def sessions(events: list[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        found[event["session_id"]].append(event)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_high_interest_product_has_its_share_and_its_weights(seed: int) -> None:
    events = take(20_000, seed=seed)
    star = [e for e in events if e["product_id"] == STAR]
    assert chi_square([len(star), len(events) - len(star)], [4_000, 16_000]) < CHI2_999[1]
    kinds = Counter(e["event_type"] for e in star)
    expected = [len(star) * weight / 100 for weight in (95, 4, 1)]
    assert chi_square([kinds[t] for t in catalogue.EVENT_TYPES], expected) < CHI2_999[2]


def test_a_shop_without_it_has_ordinary_walks_only() -> None:
    assert STAR not in {e["product_id"] for e in take(5_000, seed=1, high_interest_share=0.0)}


@pytest.mark.parametrize("seed", range(3))
def test_a_category_converts_at_its_rates(seed: int) -> None:
    """Of each category's views and carts, those that led further: a binomial each, and their sum is chi-square."""
    reached: Counter[tuple[str, str]] = Counter()
    for event in take(50_000, seed=seed):
        if event["product_id"] != STAR:
            reached[event["product_category"], event["event_type"]] += 1
    statistic = 0.0
    for name, category in catalogue.CATEGORIES.items():
        views, carts, purchases = (reached[name, kind] for kind in catalogue.EVENT_TYPES)
        for tried, succeeded, rate in ((views, carts, category.cart_rate), (carts, purchases, category.buy_rate)):
            statistic += (succeeded - tried * rate) ** 2 / (tried * rate * (1 - rate))
    assert statistic < CHI2_999[14]


def test_a_walk_goes_from_view_to_cart_to_purchase() -> None:
    """Each step but a view is of the product, the user and the session of the step before."""
    before = {"add_to_cart": "view", "purchase": "add_to_cart"}
    checked = Counter[str]()
    for events in sessions(take(20_000, seed=1)).values():
        walk = [e for e in events if e["product_id"] != STAR]
        for last, event in itertools.pairwise([{}, *walk]):
            if event["event_type"] in before:
                checked[event["event_type"]] += 1
                assert last["event_type"] == before[event["event_type"]]
                assert last["product_id"] == event["product_id"]
                assert last["user_id"] == event["user_id"]
    assert min(checked["add_to_cart"], checked["purchase"]) > 1_000


def test_most_who_buy_the_high_interest_product_had_it_in_the_cart() -> None:
    carted, bought = set(), Counter[bool]()
    for event in take(50_000, seed=1):
        if event["product_id"] == STAR:
            if event["event_type"] == "add_to_cart":
                carted.add(event["session_id"])
            elif event["event_type"] == "purchase":
                bought[event["session_id"] in carted] += 1
    assert bought[True] > 2 * bought[False]


def test_500_users_and_100_products_appear() -> None:
    events = take(50_000, seed=1)
    assert {e["user_id"] for e in events} == {f"user_{n:04d}" for n in range(1, 501)}
    assert {e["product_id"] for e in events} == {f"prod_{n:04d}" for n in range(1, 101)}
    assert {e["event_type"] for e in events} == {"view", "add_to_cart", "purchase"}
    assert {e["device_type"] for e in events} == set(catalogue.DEVICE_TYPES)


def test_an_event_has_the_ten_fields_of_the_contract() -> None:
    (event,) = take(1, seed=1, clock=lambda: 1764419696.7894)
    assert tuple(event) == FIELDS
    assert event["event_id"] == "evt_00000001"
    assert event["timestamp"] == "2025-11-29T12:34:56.789Z"
    assert event["page_url"] == f"/product/{event['product_id']}"
    assert event["product_category"] in catalogue.CATEGORIES
    assert event["device_type"] in catalogue.DEVICE_TYPES
    assert json.loads(json.dumps(event["price"])) == event["price"] > 0


def test_prices_start_at_the_catalogues_and_stay_near() -> None:
    base = {p.product_id: (p.category, float(p.price)) for p in catalogue.products(100)}
    seen: dict[str, list[float]] = defaultdict(list)
    for event in take(200_000, seed=1):
        category, price = base[event["product_id"]]
        assert event["product_category"] == category
        assert abs(event["price"] - price) <= price * shop.MAX_DRIFT + 0.005
        assert event["price"] == round(event["price"], 2) > 0
        if event["price"] not in seen[event["product_id"]][-1:]:
            seen[event["product_id"]].append(event["price"])
    assert seen.pop(STAR) == [299.99]
    assert sum(len(prices) > 1 for prices in seen.values()) > 90  # they move,
    for product, prices in seen.items():  # and by small steps
        first = base[product][1]
        assert all(abs(two - one) <= first * shop.STEP + 0.01 for one, two in itertools.pairwise([first, *prices]))


@pytest.mark.parametrize("users", [1, 3, 500])
def test_a_session_is_one_user_on_one_device_and_a_user_is_in_one_at_a_time(users: int) -> None:
    events = take(20_000, seed=3, users=users)
    assert len({e["session_id"] for e in events}) == len(
        {(e["session_id"], e["device_type"], e["user_id"]) for e in events}
    )
    by_user: dict[str, list[str]] = defaultdict(list)
    for event in events:
        by_user[event["user_id"]].append(event["session_id"])
    for ids in by_user.values():
        runs = [session for session, _ in itertools.groupby(ids)]
        assert len(runs) == len(set(runs))


def test_sessions_interleave() -> None:
    assert sum(a["session_id"] != b["session_id"] for a, b in itertools.pairwise(take(1_000, seed=1))) > 900


@pytest.mark.parametrize("gap", [60.0, 1_799.0, 1_800.0])
def test_a_session_has_ended_after_half_an_hour(gap: float) -> None:
    """Whatever the pace; at the slowest every event is a session's first."""
    ticks = itertools.count(1764419696.0, gap)
    last: dict[str, datetime] = {}
    for event in take(3_000, seed=1, clock=lambda: next(ticks)):
        now = datetime.fromisoformat(event["timestamp"])
        before = last.get(event["session_id"])
        assert before is None or (now - before).total_seconds() < SESSION_GAP_SECONDS
        last[event["session_id"]] = now
    assert (len(last) == 3_000) == (gap >= SESSION_GAP_SECONDS)


def test_a_seeded_shop_repeats_but_for_the_clock() -> None:
    assert take(1_000, seed=7, clock=lambda: 0.0) == take(1_000, seed=7, clock=lambda: 0.0)
    assert take(100, seed=7, clock=lambda: 0.0) != take(100, seed=8, clock=lambda: 0.0)
    moving = itertools.count(0.0, 0.2)
    assert [e | {"timestamp": ""} for e in take(1_000, seed=7, clock=lambda: next(moving))] == [
        e | {"timestamp": ""} for e in take(1_000, seed=7, clock=lambda: 0.0)
    ]


def test_ids_of_two_runs_never_meet() -> None:
    one, two = take(5_000), take(5_000)
    ids = [e["event_id"] for e in one + two]
    assert len(set(ids)) == 10_000
    assert all(re.fullmatch(r"evt_\d{8,20}", i) for i in ids)
    assert not {e["session_id"] for e in one} & {e["session_id"] for e in two}


def test_first_id_can_be_chosen() -> None:
    assert take(2, first_id=42)[1]["event_id"] == "evt_00000043"


@pytest.mark.parametrize("millis", [0, 1, 999, 1764419696789])
def test_iso_millis(millis: int) -> None:
    text = iso_millis(millis / 1000)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    assert isclose(datetime.fromisoformat(text).timestamp() * 1000, millis, abs_tol=1)


def test_utc_is_what_the_clock_says() -> None:
    (event,) = take(1, seed=1)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(event["timestamp"])).total_seconds()) < 5
