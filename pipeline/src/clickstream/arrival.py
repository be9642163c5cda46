"""When events are due: evenly, at random (Poisson), or at random with the hours of the day."""

from __future__ import annotations

import itertools
import math
import random
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS: Final = ("even", "poisson", "day")
DAY = 24 * 3600.0
# The day's curve: the rate swings by this share around its mean, and is highest at this hour (UTC).
SWING = 0.8
PEAK_HOUR = 16.0


def day_curve(moment: float) -> float:
    """The rate's factor at a moment (Unix seconds): 1 + SWING cos(2π (h - PEAK_HOUR) / 24), h the hour of the day, UTC.

    Its mean over a day is 1: 0.2 at 4 o'clock, 1.8 at 16 o'clock.
    """
    return 1 + SWING * math.cos(2 * math.pi * (moment / DAY - PEAK_HOUR / 24))


def arrivals(
    kind: str,
    rate: float,
    duration: float = 0.0,
    *,
    seed: int | None = None,
    at: Callable[[float], float] = lambda due: due,
) -> Iterator[float]:
    """Seconds from the start at which events are due; without a duration there is no end.

    even      n / rate: exactly rate x duration events
    poisson   exponential gaps with mean 1 / rate
    day       a Poisson process whose rate follows `day_curve`, by thinning: of the arrivals at the highest rate each is
              kept with the probability curve / (1 + SWING) (Lewis and Shedler, "Simulation of nonhomogeneous Poisson
              processes by thinning", Naval Research Logistics Quarterly 26(3), 1979)

    `at` gives the Unix time of such a second, which may move while the run waits for a broker.
    """
    if kind == "even":
        yield from (n / rate for n in (range(round(rate * duration)) if duration else itertools.count()))
        return
    # One of its own: the shop makes the same events whenever they are due.
    rng = random.Random(None if seed is None else f"arrivals {seed}")
    highest = rate * (1 + SWING) if kind == "day" else rate
    due = 0.0
    while True:
        due += rng.expovariate(highest)
        if duration and due >= duration:
            return
        if kind == "poisson" or rng.random() * (1 + SWING) < day_curve(at(due)):
            yield due


class Pacer:
    """Keeps a schedule on the monotonic clock: no drift, and after a stall at most a second's worth at once."""

    MAX_LAG = 1.0

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._origin = clock()
        # What to add to the monotonic clock for Unix time.
        self._epoch = wall() - self._origin

    def delay(self, due: float) -> float:
        """Seconds until what is due then, in seconds from the start; after a stall the start moves."""
        now = self._clock()
        if now - due - self._origin > self.MAX_LAG:
            self._origin = now - due - self.MAX_LAG
        return max(0.0, self._origin + due - now)

    def at(self, due: float) -> float:
        """The Unix time at which something is due."""
        return self._epoch + self._origin + due
