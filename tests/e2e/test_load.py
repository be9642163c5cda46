"""How fast and how large, `make load`: latency at four rates, a backlog, and the files that the streams leave.

Everything is on one guest, the producer too. The figures are printed, beside their goals; they are the machine's as
much as ours. What is asserted holds on any machine: nothing is lost, and nothing grows past its bounds.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from typing import Any

import pytest
from platform_under_test import Platform, wait_until

pytestmark = pytest.mark.load

# Events a second, and the goal in seconds for the 99th percentile.
RATES = {5: 10, 500: 10, 5_000: 10, 20_000: 15}
SECONDS = 60
BACKLOG = 2_000_000
MIB = 2**20


@pytest.mark.parametrize("rate", RATES)
def test_latency(platform: Platform, rate: int) -> None:
    platform.healthy()
    before = sum(platform.end_offsets().values())
    if rate > 5:
        platform.produce("ecom-load", f"--rate {rate - 5} --duration {SECONDS * 2.5:g}")
    wait_until(
        lambda: sum(platform.end_offsets().values()) - before > rate * SECONDS / 2, 180, f"{rate} events a second flow"
    )
    report = json.loads(platform.run(f"sudo -u pipeline clickstream latency --seconds {SECONDS} --json", timeout=600))
    platform.run("sudo systemctl stop ecom-load 2>/dev/null || true")
    seen = report["records"] / SECONDS
    verdict = "" if report["p99_s"] <= RATES[rate] else f"  MISSED: goal {RATES[rate]} s"
    platform.figures.append(
        f"latency at {rate:>6,} events a second ({seen:,.0f} read): p50 {report['p50_s']} s, p99 {report['p99_s']} s,"
        f" greatest {report['max_s']} s{verdict}"
    )
    assert report["missing"] == 0 and seen > rate * 0.9, report


class Memory(threading.Thread):
    """The greatest resident memory of services while the block runs, in bytes by service."""

    def __init__(self, platform: Platform, *services: str) -> None:
        super().__init__(daemon=True)
        self._platform, self._services = platform, services
        self._over = threading.Event()
        self.most: Counter[str] = Counter()

    def run(self) -> None:
        """Ask every five seconds."""
        while not self._over.wait(5):
            for row in self._platform.status()["services"]:
                if row["name"] in self._services:
                    self.most[row["name"]] = max(self.most[row["name"]], row["memory_bytes"] or 0)

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def test_a_backlog_is_caught_up_within_the_memory(platform: Platform) -> None:
    platform.quiesce(600)
    platform.run("sudo systemctl stop ecom-streams; sudo systemctl reset-failed ecom-streams spark-worker")
    before = platform.end_offsets()
    platform.produce("ecom-backlog", f"--rate 40000 --duration {BACKLOG / 40_000:g}")
    platform.wait_for_producer("ecom-backlog", 600)
    assert sum(platform.end_offsets().values()) - sum(before.values()) == BACKLOG
    (counted,) = platform.mart("SELECT sum(views + carts + purchases) FROM gold.product_funnel_1m")[0]
    began = time.monotonic()
    with Memory(platform, "ecom-streams", "spark-worker") as memory:
        platform.run("sudo systemctl start ecom-streams", timeout=900)

        def caught_up() -> bool:
            (now,) = platform.mart("SELECT sum(views + carts + purchases) FROM gold.product_funnel_1m")[0]
            assert now - counted >= BACKLOG, f"Gold has {now - counted} of {BACKLOG} more"
            return True

        wait_until(caught_up, 900, "the backlog is in Gold")
        took = time.monotonic() - began
    platform.wait_for_streams(600)
    state = int(platform.run("sudo du -sb /var/lib/lake/_checkpoints/silver/state | cut -f1"))
    limits: dict[str, Any] = {}
    for unit in ("ecom-streams", "spark-worker"):
        shown = platform.run(f"systemctl show {unit} --property MemoryMax,Result,NRestarts").splitlines()
        limits[unit] = dict(line.split("=", 1) for line in shown)
        assert memory.most[unit] < int(limits[unit]["MemoryMax"]), (unit, memory.most, limits)
        # A service that was killed and came back has a result of its own.
        assert (limits[unit]["Result"], limits[unit]["NRestarts"]) == ("success", "0"), limits
    used = ", ".join(
        f"{unit} {memory.most[unit] / MIB:.0f} of {int(limits[unit]['MemoryMax']) / MIB:.0f} MiB" for unit in limits
    )
    platform.figures.append(
        f"a backlog of {BACKLOG:,} events is in Gold {took:.0f} s after the start of the streams:"
        f" {BACKLOG / took:,.0f} a second; at most {used}; Silver's state {state / MIB:.0f} MiB"
    )


def test_files_that_the_streams_leave(platform: Platform) -> None:
    """By kind, over five minutes at 5 events a second."""
    platform.resume()
    platform.healthy()

    def files() -> dict[str, int]:
        kinds = {"data": "-name '*.parquet' -not -path '*/_delta_log/*'", "log": "-path '*/_delta_log/*'"}
        kinds["checkpoints"] = "-path '*/_checkpoints/*'"
        return {
            kind: int(platform.run(f"sudo find /var/lib/lake -type f {tests} | wc -l")) for kind, tests in kinds.items()
        }

    before, began = files(), platform.end_offsets()
    wait_until(
        lambda: sum(platform.end_offsets().values()) - sum(began.values()) >= 1_500, 600, "five minutes of events"
    )
    after = files()
    grown = ", ".join(f"{kind} {(after[kind] - before[kind]) / 5:+.0f}" for kind in after)
    platform.figures.append(f"files of the lake, a minute at 5 events a second: {grown}")
