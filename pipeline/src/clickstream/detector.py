"""Finds products that many people look at and too few buy: a pure fold over the product funnel per minute.

After each minute every product seen in the last hour is judged against the other products of that hour. An episode
opens when both questions below are answered yes by enough evidence. All depends on counts alone, so it is the same
for a quiet shop and a busy one, and an unlucky hour of an ordinary product is no alert.

**Is the interest high?** The product's views against those of the others: their ratio to the others' median, which
says how much, and a robust z-score, which says that it is not chance:

    z = (A(views) - median A(others)) / max(1, 1.4826 * MAD A(others)),    A(x) = 2 * sqrt(x + 3/8)

A makes the standard deviation of a Poisson count 1, whatever its mean (F. J. Anscombe, The transformation of Poisson,
binomial and negative-binomial data, Biometrika 35, 1948). 1.4826 * MAD estimates the standard deviation of the
catalogue and, as the median does, ignores the products that stand out (B. Iglewicz and D. Hoaglin, How to Detect and
Handle Outliers, 1993). It is the larger one when products differ in popularity; the 1 is what chance alone does, when
they do not, or when half of them have the same count. The mean and the usual deviation would not do: two such products
would hide each other behind the deviation that each of them causes.

**Is the conversion low?** Conversion is purchases per view. The upper confidence bound of the product's is compared
with a fraction of the pooled rate of the others, so few views are never a low conversion, they are no evidence. The
bound is E. B. Wilson's (Probable inference, the law of succession, and statistical inference, JASA 22, 1927), which
L. Brown, T. Cai and A. DasGupta (Interval estimation for a binomial proportion, Statistical Science 16, 2001) recommend
where the usual one fails, near 0:

    (p + z^2/2n + z * sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

At this confidence and for rates below 0.19 it is below the true rate no more often than it says; the tests compute it
exactly.

**Many looks.** A hundred products judged each minute are 6,000 looks an hour, so what happens once in a hundred looks
would be an alarm every minute. By chance alone a look finds a z of 5 three times in ten million. The confidence of 0.99
is for a product that converts at just the fraction of the catalogue's rate; one that converts as the others do is twice
as far away. At a rate of 1 in 7, its bound is below half of that in 1 look of 100,000 at 100 views, the minimum, and in
1 of 10 million at 200; and only a product with high interest is asked. Looks a minute apart share their window but for
a minute, which makes chance alarms rarer still. The rate of the catalogue is an estimate as well:
`min_catalogue_purchases` holds its standard error at 1/sqrt(50), 14 %. The tests simulate all of it.

**Hysteresis.** An open episode has limits of its own, easier to meet than those that opened it, and closes after
`close_minutes` in a row in which they are not met; until then the product is not alerted again. The minimum samples are
for opening only: with fewer views the bound rises by itself, and an episode that loses its evidence closes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from clickstream.limits import Limits
from clickstream.settings import PREFIX

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

ALERT_PREFIX = f"{PREFIX}ALERT_"
MINUTE = timedelta(minutes=1)
# Of a normal distribution: standard deviation / median absolute deviation from the median.
_MAD_SCALE = 1.4826


@dataclass(frozen=True)
class Parameters(Limits):
    """What counts as high interest, low conversion and enough evidence."""

    prefix: ClassVar[str] = ALERT_PREFIX

    # The sliding window, minutes.
    window_minutes: int = 60
    # High interest: at least so many times the median views of the other products, ...
    interest_ratio: float = 3.0
    # ... and so many standard deviations above it.
    interest_z: float = 5.0
    # Low conversion: the upper bound is below this fraction of the other products' rate, ...
    conversion_fraction: float = 0.5
    # ... at this one-sided confidence.
    confidence: float = 0.99
    # The minimum sample, in the window: views of the product, purchases of the others, how many others.
    min_views: int = 100
    min_catalogue_purchases: int = 50
    min_products: int = 10
    # What keeps an episode open, and how many minutes in a row without it close it.
    close_ratio: float = 2.0
    close_fraction: float = 0.75
    close_minutes: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_minutes > 24 * 60:
            self._fail("window_minutes", f"{self.window_minutes} is more than a day", "give it at most 1440")
        self._confidence("confidence")
        if self.close_fraction > 1:
            self._fail("close_fraction", f"{self.close_fraction} is above the catalogue's rate", "give it at most 1")
        if self.conversion_fraction > self.close_fraction:
            self._fail(
                "conversion_fraction",
                f"{self.conversion_fraction} is above close_fraction, {self.close_fraction}: an episode would close "
                "on what opened it",
                "lower it, or raise close_fraction",
            )
        if self.interest_ratio < self.close_ratio:
            self._fail(
                "interest_ratio",
                f"{self.interest_ratio} is below close_ratio, {self.close_ratio}: an episode would close on what "
                "opened it",
                "raise it, or lower close_ratio",
            )

    @cached_property
    def confidence_z(self) -> float:
        """The normal quantile of the confidence."""
        return NormalDist().inv_cdf(self.confidence)


def parameters(env: Mapping[str, str] | None = None) -> Parameters:
    """The detector's parameters, each from CLICKSTREAM_ALERT_ and its name; an error names the variable."""
    return Parameters.from_env(env)


class Counts(NamedTuple):
    """A product in a minute, or in a window."""

    views: int
    carts: int
    purchases: int

    def plus(self, other: Counts, sign: int = 1) -> Counts:
        return Counts(
            self.views + sign * other.views,
            self.carts + sign * other.carts,
            self.purchases + sign * other.purchases,
        )


NOTHING = Counts(0, 0, 0)


@dataclass(frozen=True)
class Episode:
    """From when to when a product had high interest and low conversion, and what its window held as it opened.

    `opened_at` and `closed_at` are the ends of the minutes that decided it; `closed_at` is None while it is open.
    """

    product_id: str
    opened_at: datetime
    closed_at: datetime | None
    views: int
    carts: int
    purchases: int
    # The views by the median of the other products, and how many standard deviations they are above it.
    interest_ratio: float
    interest_z: float
    # Purchases per view: of this product at most, of the others together.
    conversion_upper: float
    catalogue_rate: float


def wilson_upper(successes: int, trials: int, z: float) -> float:
    """The upper bound of Wilson's score interval; 1 when nothing was tried."""
    if trials == 0:
        return 1.0
    p = successes / trials
    centre = p + z * z / (2 * trials)
    margin = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return min(1.0, (centre + margin) / (1 + z * z / trials))


def anscombe(count: float) -> float:
    return 2 * math.sqrt(count + 0.375)


def interest_z(views: int, others: Sequence[int]) -> float:
    """How many standard deviations these views are above the other products'."""
    stable = [anscombe(count) for count in others]
    middle = median(stable)
    spread = _MAD_SCALE * median([abs(value - middle) for value in stable])
    return (anscombe(views) - middle) / max(1.0, spread)


class _Catalogue:
    """The window's products, as each of them sees the others."""

    def __init__(self, products: Collection[Counts]) -> None:
        self._views = sorted(counts.views for counts in products)
        self._total_views = sum(self._views)
        self._total_purchases = sum(counts.purchases for counts in products)

    def others(self, counts: Counts) -> list[int]:
        """The views of the other products, sorted."""
        place = bisect_left(self._views, counts.views)
        return self._views[:place] + self._views[place + 1 :]

    def ratio(self, counts: Counts) -> float:
        """The product's views by the median of the others'; 0 when there are no others."""
        others = self.others(counts)
        if not others:
            return 0.0
        middle = len(others) // 2
        # Not statistics.median: it sorts again, and this is asked for each product each minute.
        median_views = others[middle] if len(others) % 2 else (others[middle - 1] + others[middle]) / 2
        # A median below one view counts as one: a ratio to nothing says nothing.
        return counts.views / max(1.0, median_views)

    def purchases(self, counts: Counts) -> int:
        """The purchases of the other products."""
        return self._total_purchases - counts.purchases

    def rate(self, counts: Counts) -> float:
        """The other products' purchases per view, all of them pooled."""
        views = self._total_views - counts.views
        return self.purchases(counts) / views if views else 0.0


class Detector:
    """The fold. Give it every minute in order; one without events may be left out.

    `state` is what a detector must know to go on where this one is: JSON's types only, and bounded by the window.
    """

    def __init__(self, parameters: Parameters | None = None, state: dict[str, Any] | None = None) -> None:
        self.parameters = parameters or Parameters()
        self._window: deque[tuple[datetime, dict[str, Counts]]] = deque()
        self._totals: dict[str, Counts] = {}
        self._next: datetime | None = None
        self._open: dict[str, Episode] = {}
        # Of each open episode, the minutes in a row that did not support it.
        self._unsupported: dict[str, int] = {}
        self._closed: list[Episode] = []
        if state is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"] and datetime.fromisoformat(state["next"])
        for start, products in state["window"]:
            minute = {name: Counts(*counts) for name, counts in products.items()}
            self._window.append((datetime.fromisoformat(start), minute))
            self._add(minute, 1)
        for saved in state["open"]:
            episode = Episode(**saved | {"opened_at": datetime.fromisoformat(saved["opened_at"])})
            self._open[episode.product_id] = episode
        self._unsupported = dict(state["unsupported"])

    @property
    def state(self) -> dict[str, Any]:
        return {
            "next": self._next and self._next.isoformat(),
            "window": [
                [start.isoformat(), {name: list(counts) for name, counts in products.items()}]
                for start, products in self._window
            ],
            "open": [asdict(episode) | {"opened_at": episode.opened_at.isoformat()} for episode in self._open.values()],
            "unsupported": dict(self._unsupported),
        }

    @property
    def next(self) -> datetime | None:
        """The first minute that is not folded yet; None at the very start."""
        return self._next

    @property
    def episodes(self) -> list[Episode]:
        """By time and product: those open, also from the state, and those this detector closed."""
        return sorted([*self._closed, *self._open.values()], key=lambda e: (e.opened_at, e.product_id))

    def minute(self, start: datetime, counts: Iterable[tuple[str, int, int, int]]) -> list[Episode]:
        """Folds the minute that begins at `start`: (product_id, views, carts, purchases) of each product in it.

        Returns the episodes that opened or closed, also in the minutes left out before it. The rows of one product
        add up, and a minute of no rows is a minute without events.
        """
        if start.tzinfo is None or start.second or start.microsecond:
            raise ValueError(
                f"{start.isoformat()} is not the start of a minute with a zone; pass one such as 12:34:00Z"
            )
        start = start.astimezone(UTC)
        if self._next is not None and start < self._next:
            raise ValueError(
                f"the minute {start.isoformat()} was folded already; go on with {self._next.isoformat()}, "
                "or begin anew without a state"
            )
        products: dict[str, Counts] = {}
        for name, *numbers in counts:
            row = Counts(*numbers)
            if min(row) < 0:
                raise ValueError(f"{name} has a count below 0 in the minute {start.isoformat()}; correct its row")
            if max(row) > 0:
                products[name] = products[name].plus(row) if name in products else row
        changed = []
        # Once the window is empty and nothing is open, a minute without events changes nothing.
        while self._next is not None and self._next < start and (self._window or self._open):
            changed += self._fold(self._next, {})
        return changed + self._fold(start, products)

    def _fold(self, start: datetime, products: dict[str, Counts]) -> list[Episode]:
        self._next = start + MINUTE
        if products:
            self._window.append((start, products))
            self._add(products, 1)
        oldest = self._next - self.parameters.window_minutes * MINUTE
        while self._window and self._window[0][0] < oldest:
            self._add(self._window.popleft()[1], -1)
        return self._judge(self._next)

    def _add(self, products: dict[str, Counts], sign: int) -> None:
        """A product that has no event in the window any more is not in the catalogue."""
        for name, counts in products.items():
            total = self._totals.get(name, NOTHING).plus(counts, sign)
            if total == NOTHING:
                del self._totals[name]
            else:
                self._totals[name] = total

    def _judge(self, now: datetime) -> list[Episode]:
        limits = self.parameters
        catalogue = _Catalogue(self._totals.values())
        changed = []
        for name in sorted(self._totals.keys() | self._open.keys()):
            counts = self._totals.get(name, NOTHING)
            episode = self._open.get(name)
            if episode is None:
                opened = self._opened(name, counts, catalogue, now)
                if opened:
                    self._open[name] = opened
                    self._unsupported[name] = 0
                    changed.append(opened)
            elif self._stands_out(counts, catalogue, limits.close_ratio, limits.close_fraction):
                self._unsupported[name] = 0
            else:
                self._unsupported[name] += 1
                if self._unsupported[name] >= limits.close_minutes:
                    closed = replace(episode, closed_at=now)
                    self._closed.append(closed)
                    changed.append(closed)
                    del self._open[name], self._unsupported[name]
        return changed

    def _upper(self, counts: Counts) -> float:
        # More purchases than views there are when the views were before the window, or were lost.
        return wilson_upper(min(counts.purchases, counts.views), counts.views, self.parameters.confidence_z)

    def _stands_out(self, counts: Counts, catalogue: _Catalogue, ratio: float, fraction: float) -> bool:
        return catalogue.ratio(counts) >= ratio and self._upper(counts) < fraction * catalogue.rate(counts)

    def _opened(self, name: str, counts: Counts, catalogue: _Catalogue, now: datetime) -> Episode | None:
        limits = self.parameters
        if counts.views < limits.min_views or len(self._totals) <= limits.min_products:
            return None
        if catalogue.purchases(counts) < limits.min_catalogue_purchases:
            return None
        if not self._stands_out(counts, catalogue, limits.interest_ratio, limits.conversion_fraction):
            return None
        z = interest_z(counts.views, catalogue.others(counts))
        if z < limits.interest_z:
            return None
        return Episode(
            name,
            now,
            None,
            *counts,
            interest_ratio=catalogue.ratio(counts),
            interest_z=z,
            conversion_upper=self._upper(counts),
            catalogue_rate=catalogue.rate(counts),
        )
