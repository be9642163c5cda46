"""A simulated shop: visitors who look at products, put some into the cart and buy some of those.

Several visits are open at a time, and each event is of one of them at random. A visit is a session of one user on one
device. It walks from product to product: a view, then by the rates of the product's category an add_to_cart, then a
purchase; after the last product the visitor leaves, and another one comes.

The high-interest product is beside the walks: each event is one of it with probability 0.20 and then a view,
add_to_cart or purchase by its weights, drawn independently, so that its share and its weights are exact in expectation.
A visitor whom the event fits does it: one with the product in the cart buys it, if there is one. Its price stays.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import TYPE_CHECKING

from clickstream import catalogue
from clickstream.event import SESSION_GAP_SECONDS, Event, iso_millis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Visits open at a time: at 5 events a second a visitor does something every 8 seconds.
OPEN_VISITS = 40
# A visitor who is done with a product leaves with this probability: five products a visit.
LEAVE = 0.20
# At a view of an ordinary product its price changes with this probability (at 5 events a second every other hour), by a
# hundredth of the catalogue's, and stays this near to it.
REPRICE = 0.005
STEP = 0.01
MAX_DRIFT = 0.05

VIEW, CART, PURCHASE = range(3)  # places in catalogue.EVENT_TYPES


class Article:
    """A product on sale, with the price of now."""

    __slots__ = ("_base", "page_url", "price", "product")

    def __init__(self, product: catalogue.Product) -> None:
        self.product = product
        self.page_url = product.page_url
        self._base = float(product.price)
        self.price = self._base

    def drift(self, sign: float) -> None:
        low, high = self._base * (1 - MAX_DRIFT), self._base * (1 + MAX_DRIFT)
        self.price = round(min(high, max(low, self.price + sign * STEP * self._base)), 2)


class Visit:
    """One user's session, and how far its walk is."""

    __slots__ = ("article", "device", "last", "session_id", "stage", "star_stage", "user")

    def __init__(self, user: str, device: str, session_id: str, now: float) -> None:
        self.user = user
        self.device = device
        self.session_id = session_id
        self.last = now
        self.article: Article | None = None
        self.stage = VIEW
        self.star_stage = -1  # the furthest it came with the high-interest product


class Shop:
    """An endless iterator of events; with a seed, everything but the clock repeats."""

    def __init__(
        self,
        *,
        users: int = 500,
        products: int = 100,
        seed: int | None = None,
        first_id: int | None = None,
        clock: Callable[[], float] = time.time,
        high_interest_share: float = catalogue.HIGH_INTEREST_SHARE,
    ) -> None:
        self._rng = random.Random(seed)
        self._clock = clock
        self._share = high_interest_share
        if first_id is None:
            # Silver deduplicates on event_id, so ids must differ between runs, also between a run by hand
            # and the service beside it. One event takes a microsecond of id space and never a microsecond
            # of time, so two runs started at different microseconds cannot meet.
            first_id = 1 if seed is not None else time.time_ns() // 1000
        self._ids = itertools.count(first_id)
        articles = {p.product_id: Article(p) for p in catalogue.products(products)}
        self._star = articles.pop(catalogue.HIGH_INTEREST_PRODUCT)
        self._others = list(articles.values())
        self._star_steps = list(itertools.accumulate(catalogue.HIGH_INTEREST_WEIGHTS))
        self._rates = {name: (category.cart_rate, category.buy_rate) for name, category in catalogue.CATEGORIES.items()}
        self._away = [f"user_{n:04d}" for n in range(1, users + 1)]
        self._visits: list[Visit | None] = [None] * min(users, OPEN_VISITS)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        now, number = self._clock(), next(self._ids)
        if self._rng.random() < self._share:
            article = self._star
            stage = self._rng.choices((VIEW, CART, PURCHASE), cum_weights=self._star_steps)[0]
            visit = self._star_visit(stage, now, number)
        else:
            visit = self._walk(now, number)
            assert visit.article is not None
            article, stage = visit.article, visit.stage
        visit.last = now
        product = article.product
        return {
            "event_id": f"evt_{number:08d}",
            "user_id": visit.user,
            "product_id": product.product_id,
            "event_type": catalogue.EVENT_TYPES[stage],
            "timestamp": iso_millis(now),
            "session_id": visit.session_id,
            "product_category": product.category,
            "device_type": visit.device,
            "page_url": article.page_url,
            "price": article.price,
        }

    def _visit(self, place: int, now: float, number: int) -> Visit:
        """The visit at a place, or a new one when that has ended."""
        visit = self._visits[place]
        if visit is None or now - visit.last >= SESSION_GAP_SECONDS:
            visit = self._enter(place, now, number)
        return visit

    def _enter(self, place: int, now: float, number: int) -> Visit:
        """Lets the visitor at a place go and a user come who is not in the shop."""
        left, away = self._visits[place], self._away
        if left is not None:
            away.append(left.user)
        # The order of those who are away means nothing: the last one takes the place of the one who comes.
        chosen = int(self._rng.random() * len(away))
        away[chosen], away[-1] = away[-1], away[chosen]
        device = catalogue.DEVICE_TYPES[int(self._rng.random() * len(catalogue.DEVICE_TYPES))]
        # Named after its first event, so it is as unique as event ids are.
        visit = self._visits[place] = Visit(away.pop(), device, f"session_{number:04d}", now)
        return visit

    def _walk(self, now: float, number: int) -> Visit:
        """A visit, one step of its walk further."""
        random_ = self._rng.random
        place = int(random_() * len(self._visits))
        visit = self._visit(place, now, number)
        article = visit.article
        if article is not None:
            if visit.stage != PURCHASE and random_() < self._rates[article.product.category][visit.stage]:
                visit.stage += 1
                return visit
            if random_() < LEAVE:
                visit = self._enter(place, now, number)
        article = visit.article = self._others[int(random_() * len(self._others))]
        visit.stage = VIEW
        if random_() < REPRICE:
            article.drift(1.0 if random_() < 0.5 else -1.0)
        return visit

    def _star_visit(self, stage: int, now: float, number: int) -> Visit:
        """A visit that the event fits: a purchase to one with the product in its cart. Any, when there is none."""
        visit = None
        if stage != VIEW:
            fitting = [
                v for v in self._visits if v and v.star_stage == stage - 1 and now - v.last < SESSION_GAP_SECONDS
            ]
            if fitting:
                visit = fitting[int(self._rng.random() * len(fitting))]
        if visit is None:
            visit = self._visit(int(self._rng.random() * len(self._visits)), now, number)
        visit.star_stage = max(visit.star_stage, stage)
        return visit
