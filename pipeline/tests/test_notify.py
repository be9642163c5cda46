"""What people are told: found in real marts by evidence and put into the outbox once."""

from __future__ import annotations

import csv
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import CASES

from clickstream import alerts, checks, cli, gold, notify
from clickstream.limits import NotifyLimits
from clickstream.marts import MartWriter
from clickstream.notify import Hour, Purchases

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2025, 11, 29, 12, 30, tzinfo=UTC)
MINUTE, HOUR, DAY = (timedelta(minutes=n) for n in (1, 60, 1440))
LIMITS = NotifyLimits()


def table(path: Path) -> list[dict[str, str | None]]:
    with path.open() as lines:
        return [{name: value or None for name, value in row.items()} for row in csv.DictReader(lines)]


def at(text: str | None) -> datetime:
    assert text
    return datetime.fromisoformat(text)


def fill(marts: MartWriter) -> None:
    """The marts of the golden case, apart from the figures that nobody asks for here."""
    case = CASES / "notify"
    for mart in (gold.FUNNEL_1M.mart, gold.CONVERSION_1H.mart, alerts.ALERTS_MART, checks.CHECKS):
        marts.ensure(mart)

    def work(connection: psycopg.Connection[Any]) -> None:
        with connection.cursor() as cursor:
            for row in table(case / "purchases.csv"):
                start = at(row["window_start"])
                cursor.execute(
                    "INSERT INTO gold.product_funnel_1m VALUES "
                    "(%s, %s, 'prod_0001', 'Home', %s, 0, %s, 0, 1, 1, %s, true)",
                    (start, start + MINUTE, row["views"], row["purchases"], start),
                )
            for row in table(case / "conversion.csv"):
                start = at(row["window_start"])
                figures = (row["sessions_with_view"], row["sessions_converted"])
                cursor.execute(
                    "INSERT INTO gold.conversion_1h VALUES (%s, %s, 'category', %s, 9, 9, 9, 0, %s, %s, 1, 1, true)",
                    (start, start + HOUR, row["category"], *figures),
                )
            for name, file in (("gold.product_alerts", "episodes.csv"), ("quality.checks", "checks.csv")):
                rows = table(case / file)
                columns, values = ", ".join(rows[0]), ", ".join(f"%({column})s" for column in rows[0])
                cursor.executemany(f"INSERT INTO {name} ({columns}) VALUES ({values})", rows)  # type: ignore[arg-type]

    marts.transact(work)


def outbox(dsn: str) -> list[dict[str, str]]:
    with psycopg.connect(dsn, row_factory=psycopg.rows.dict_row) as connection:
        return connection.execute("SELECT alert_key, kind, subject, message FROM alerts.outbox ORDER BY 1").fetchall()


def test_golden(marts: MartWriter, dsn: str) -> None:
    """Input: what the marts have. Expected: the outbox after one run, and after three."""
    fill(marts)
    new = notify.update(marts, LIMITS, NOW)
    assert outbox(dsn) == table(CASES / "notify/expected.csv")
    assert {alert.alert_key for alert in new} == {row["alert_key"] for row in outbox(dsn)}
    assert notify.update(marts, LIMITS, NOW) == []
    # Ten minutes later: nothing of it is news, however long the stall and the failure go on.
    assert notify.update(marts, LIMITS, NOW + 10 * MINUTE) == []
    assert outbox(dsn) == table(CASES / "notify/expected.csv")


def test_runs_at_the_same_time_tell_each_once(marts: MartWriter, dsn: str) -> None:
    fill(marts)
    together = threading.Barrier(4)

    def run(_: int) -> list[str]:
        writer = MartWriter(dsn)
        together.wait()
        try:
            return [alert.alert_key for alert in notify.update(writer, LIMITS, NOW)]
        finally:
            writer.close()

    with ThreadPoolExecutor(4) as pool:
        told = [key for keys in pool.map(run, range(4)) for key in keys]
    assert sorted(told) == [row["alert_key"] for row in outbox(dsn)]


def test_nothing_in_the_marts_is_nothing_to_tell(marts: MartWriter, dsn: str) -> None:
    assert notify.update(marts, LIMITS, NOW) == []
    assert outbox(dsn) == []


def test_what_is_delivered_leaves_after_its_retention(marts: MartWriter, dsn: str) -> None:
    fill(marts)
    first, second, third, *_ = sorted(alert.alert_key for alert in notify.update(marts, LIMITS, NOW))
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "INSERT INTO alerts.deliveries VALUES (%s, 'file', 1, NULL, now()), (%s, 'file', 9, 'refused', NULL)",
            [first, second],
        )
    notify.update(marts, LIMITS, NOW + 91 * DAY)
    left = {row["alert_key"] for row in outbox(dsn)}
    assert second in left
    assert not {first, third} & left
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT alert_key FROM alerts.deliveries").fetchall() == [(second,)]


def purchases(*spans: tuple[datetime, int, int]) -> list[Purchases]:
    """So many minutes from a time, so many purchases in each."""
    return [Purchases(start + n * MINUTE, each) for start, length, each in spans for n in range(length)]


@pytest.mark.parametrize(
    ("silent", "each", "stalled"),
    [
        # 60 minutes of one purchase a minute: ten minutes of silence have 0.03 % of probability, 20 have 3e-8
        (9, 10, False),
        (10, 10, True),
        (10, 1, False),
        (30, 1, True),
    ],
)
def test_a_stall_needs_evidence_and_a_least_time(silent: int, each: int, stalled: bool) -> None:
    minutes = purchases((NOW - 60 * MINUTE, 60, each))
    found = notify.revenue_stall(minutes, NOW - 60 * MINUTE, NOW + silent * MINUTE, LIMITS)
    assert (found is not None) == stalled
    if found:
        expected = (60 / (60 + silent)) ** (60 * each + 0.5)
        assert math.isclose(found.numbers["probability"], expected, rel_tol=0.01)
        assert found.numbers["expected_purchases"] == silent * each
        assert found.alert_key == "revenue:2025-11-29T12:30Z:stalled"


def test_a_night_that_is_always_silent_is_no_stall() -> None:
    """Four purchases a minute by day, none from 20:00 to 8:00: the same time of day on earlier days is the history."""
    morning = NOW.replace(hour=8, minute=0)
    days = purchases(*((morning - n * DAY, 720, 4) for n in (3, 2, 1)))
    first = morning - 3 * DAY
    assert notify.revenue_stall(days, first, morning - HOUR, LIMITS) is None
    # Until noon nobody has bought, and these mornings 960 each were sold.
    found = notify.revenue_stall(days, first, morning + 4 * HOUR, LIMITS)
    assert found is not None
    assert found.numbers["silent_minutes"] == 16 * 60
    assert found.numbers["expected_purchases"] == 960


def test_no_purchase_ever_is_no_stall() -> None:
    assert notify.revenue_stall([], NOW - DAY, NOW, LIMITS) is None


def hours(category: str, *figures: tuple[int, int]) -> list[Hour]:
    return [Hour(NOW + n * HOUR, category, *each) for n, each in enumerate(figures)]


@pytest.mark.parametrize(
    ("figures", "dropped"),
    [
        ([(400, 80)] * 4 + [(400, 20)], [4]),
        # a drop that goes on is told once, and again when there was an hour as usual in between
        ([(400, 80)] * 4 + [(400, 20)] * 3, [4]),
        ([(400, 80)] * 4 + [(400, 20), (400, 80), (400, 20)], [4, 6]),
        # no evidence: few sessions, an unlucky hour, a short history
        ([(400, 80)] * 4 + [(30, 0)], []),
        ([(400, 80)] * 4 + [(400, 60)], []),
        ([(100, 20), (200, 5)], []),
    ],
)
def test_a_drop_needs_evidence_on_both_sides(figures: list[tuple[int, int]], dropped: list[int]) -> None:
    found = notify.conversion_drops(hours("Home", *figures), LIMITS, 3.09, NOW)
    assert [alert.numbers["window_start"] for alert in found] == [notify.at(NOW + n * HOUR) for n in dropped]
    later = notify.conversion_drops(hours("Home", *figures), LIMITS, 3.09, NOW + 5 * HOUR)
    assert len(later) == len([n for n in dropped if n >= 5])


def test_the_history_of_a_category_is_its_own_and_ends() -> None:
    busy = hours("Books", *[(200, 40)] * 5)
    poor = hours("Home", *[(200, 5)] * 5)
    assert notify.conversion_drops([*busy, *poor], LIMITS, 3.09, NOW) == []
    drop = [*hours("Home", *[(200, 40)] * 4), Hour(NOW + 8 * DAY, "Home", 200, 5)]
    assert notify.conversion_drops(drop, LIMITS, 3.09, NOW) == []
    assert len(notify.conversion_drops(drop, replace(LIMITS, history_days=9), 3.09, NOW)) == 1


def test_the_command(marts: MartWriter, dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(marts)
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE gold.product_alerts SET opened_at = now() WHERE product_id = 'prod_0042'")
        connection.execute("DELETE FROM gold.product_funnel_1m")
    command = ["notify", "--lake-uri", "file:///lake", "--marts-dsn", dsn]
    assert cli.main([*command, "--json"]) == 0
    (new,) = json.loads(capsys.readouterr().out)["new"]
    assert (new["kind"], new["subject"], new["numbers"]["views"]) == ("episode_opened", "prod_0042", 220)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "nothing new\n"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("clickstream.marts.RETRY_SECONDS", 0.1)
    command = ["notify", "--lake-uri", "file:///lake"]
    assert cli.main(command) == 2
    assert "CLICKSTREAM_MARTS_DSN: it is not set; export it" in capsys.readouterr().err
    assert cli.main([*command, "--marts-dsn", "host=/nonexistent"]) == 1
    assert "run it again when PostgreSQL answers" in capsys.readouterr().err
    monkeypatch.setenv("CLICKSTREAM_NOTIFY_CONFIDENCE", "99")
    assert cli.main([*command, "--marts-dsn", "host=/nonexistent"]) == 2
    assert "CLICKSTREAM_NOTIFY_CONFIDENCE: 99.0 is not between 0.5 and 1; write 0.99" in capsys.readouterr().err
