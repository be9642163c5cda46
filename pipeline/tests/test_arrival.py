"""When events are due, and that the pace is kept."""

from __future__ import annotations

import itertools
import math

import pytest

from clickstream.arrival import DAY, KINDS, Pacer, arrivals, day_curve

MIDNIGHT = 1764374400.0  # 2025-11-29


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_even_is_exact() -> None:
    assert list(arrivals("even", 5.0, 60.0)) == pytest.approx([n / 5 for n in range(300)])


@pytest.mark.parametrize("kind", KINDS)
def test_arrivals_go_on_without_a_duration_and_repeat_with_a_seed(kind: str) -> None:
    one, two, other = (list(itertools.islice(arrivals(kind, 5.0, seed=seed), 2_000)) for seed in (1, 1, 2))
    assert one == two == sorted(one)
    assert (one == other) == (kind == "even")


@pytest.mark.parametrize("seed", range(3))
def test_poisson_gaps_are_exponential(seed: int) -> None:
    """Kolmogorov-Smirnov against 1 - exp(-rate t); the critical value at 0.1 % is 1.95 / sqrt(n)."""
    due = list(arrivals("poisson", 5.0, 2_000.0, seed=seed))
    assert due[-1] < 2_000
    gaps = sorted(b - a for a, b in itertools.pairwise([0.0, *due]))
    count = len(gaps)
    assert abs(count - 10_000) < 4 * 100
    distance = max(
        max((place + 1) / count - expected, expected - place / count)
        for place, expected in enumerate(1 - math.exp(-5.0 * gap) for gap in gaps)
    )
    assert distance < 1.95 / math.sqrt(count)


def test_the_curve_of_the_day_has_mean_1_and_is_highest_at_16_utc() -> None:
    values = [day_curve(MIDNIGHT + minute * 60) for minute in range(1440)]
    assert math.fsum(values) / 1440 == pytest.approx(1.0)
    assert max(values) == values[16 * 60] == pytest.approx(1.8)
    assert min(values) == pytest.approx(values[4 * 60]) == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(3))
def test_a_day_has_its_hours(seed: int) -> None:
    """Chi-square over 24 hours, whose sum varies too; 51.18 is the upper 0.1 % point for 24 degrees of freedom."""
    counts = [0] * 24
    for due in arrivals("day", 1.0, DAY, seed=seed, at=lambda due: MIDNIGHT + due):
        counts[int(due // 3600)] += 1
    middle = [3600 * day_curve(MIDNIGHT + (hour + 0.5) * 3600) for hour in range(24)]
    # an hour's mean is a little nearer to 1 than its middle: the cosine's integral
    expected = [3600 + (value - 3600) * math.sin(math.pi / 24) / (math.pi / 24) for value in middle]
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)) < 51.18


def test_the_pace_is_even_and_does_not_drift() -> None:
    clock = Clock()
    pacer = Pacer(clock)
    sent = []
    for due in arrivals("even", 5.0, 60.0):
        clock.now += pacer.delay(due)
        sent.append(clock.now)
        clock.now += 0.003  # sending takes time
    assert sent[0] == 100.0
    assert sent == pytest.approx([100 + i / 5 for i in range(300)])


def test_after_a_stall_at_most_a_second_is_made_up() -> None:
    clock = Clock()
    pacer = Pacer(clock, lambda: 1000.0)
    due = arrivals("even", 10.0)
    pacer.delay(next(due))
    assert pacer.at(5.0) == 1005.0
    clock.now += 60
    at_once = sum(1 for _ in range(50) if pacer.delay(next(due)) == 0)
    assert at_once == 11  # the second behind, and the one that is due now
    assert pacer.at(5.0) == pytest.approx(1005.0 + 60 - 1 - 0.1)
