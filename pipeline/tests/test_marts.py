"""The Postgres writer on its own: exact replacement, no needless writes, and a server that goes away."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from clickstream import gold, marts
from clickstream.marts import Difference, MartWriter, Part

if TYPE_CHECKING:
    from collections.abc import Iterator

MART = gold.FUNNEL_1M.mart
NOON = datetime(2025, 11, 29, 12, 0, tzinfo=UTC)


def row(product: str, views: int, start: datetime = NOON, *, final: bool = False) -> tuple[Any, ...]:
    end = start + timedelta(minutes=1)
    return (start, end, product, "Home", views, 0, 0, Decimal("0.00"), 1, 1, start, final)


@pytest.fixture
def writer(postgres: str) -> Iterator[MartWriter]:
    writer = MartWriter(postgres, application_name="unit")
    writer.ensure(MART)
    yield writer
    writer.close()
    with psycopg.connect(postgres) as connection:
        connection.execute("DROP SCHEMA gold CASCADE")


def rows(dsn: str, columns: str = "product_id, views") -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(f"SELECT {columns} FROM gold.product_funnel_1m ORDER BY 1").fetchall()  # type: ignore[arg-type,call-overload]


def test_windows_are_replaced_whole(writer: MartWriter, postgres: str) -> None:
    later = NOON + timedelta(minutes=1)
    writer.replace_windows(MART, [NOON, later], [row("prod_0001", 1), row("prod_0002", 1), row("prod_0003", 1, later)])
    writer.replace_windows(MART, [NOON], [row("prod_0001", 5)])
    assert rows(postgres) == [("prod_0001", 5), ("prod_0003", 1)]


def test_a_row_that_is_the_same_is_not_written(writer: MartWriter, postgres: str) -> None:
    writer.replace_windows(MART, [NOON], [row("prod_0001", 1), row("prod_0002", 1)])
    before = dict(rows(postgres, "product_id, updated_at"))
    writer.replace_windows(MART, [NOON], [row("prod_0001", 1), row("prod_0002", 2)])
    after = dict(rows(postgres, "product_id, updated_at"))
    assert before["prod_0001"] == after["prod_0001"]
    assert before["prod_0002"] < after["prod_0002"]


def test_windows_by_finality(writer: MartWriter) -> None:
    later = NOON + timedelta(minutes=1)
    writer.replace_windows(MART, [NOON, later], [row("prod_0001", 1, final=True), row("prod_0001", 1, later)])
    assert writer.windows(MART, final=True) == {NOON}
    assert writer.windows(MART, final=False) == {later}
    assert writer.windows(MART, final=True, since=later) == set()


def test_a_range_is_compared_and_replaced(writer: MartWriter, postgres: str) -> None:
    later, after = NOON + timedelta(minutes=1), NOON + timedelta(minutes=2)
    served = [row("prod_0001", 1), row("prod_0002", 2), row("prod_0003", 3, later), row("prod_0001", 9, after)]
    writer.replace_windows(MART, [NOON, later, after], served)
    computed = [row("prod_0001", 1), row("prod_0002", 7), row("prod_0004", 4, later)]
    computed = [(*figures, True) for *figures, _ in computed]

    def reconcile(*, swap: bool) -> Difference:
        (found,) = writer.reconcile([Part(MART, lambda: computed, NOON, after)], swap=swap)
        return found

    found = reconcile(swap=False)
    assert found == Difference(1, 1, 1, [(NOON, "prod_0002"), (later, "prod_0003"), (later, "prod_0004")])
    assert reconcile(swap=True) == found
    assert reconcile(swap=True) == Difference(0, 0, 0, [])
    assert set(rows(postgres, "product_id, views, is_final")) == {
        ("prod_0001", 1, True),
        ("prod_0002", 7, True),
        ("prod_0004", 4, True),
        ("prod_0001", 9, False),
    }


def test_a_lost_connection_is_made_again(writer: MartWriter, postgres: str) -> None:
    with psycopg.connect(postgres) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'unit'")
    writer.replace_windows(MART, [NOON], [row("prod_0001", 1)])
    assert rows(postgres) == [("prod_0001", 1)]


def test_a_server_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marts, "RETRY_SECONDS", 0.1)
    with pytest.raises(psycopg.OperationalError):
        MartWriter("host=/nonexistent").ensure(MART)


def test_a_wrong_row_is_an_error_at_once_and_leaves_nothing(writer: MartWriter, postgres: str) -> None:
    with pytest.raises(psycopg.Error):
        writer.replace_windows(MART, [NOON], [row("prod_0001", 1), (None,) * len(MART.columns)])
    assert rows(postgres) == []


def test_applications_may_start_together(postgres: str) -> None:
    errors: list[BaseException] = []

    def ensure() -> None:
        try:
            MartWriter(postgres).ensure(MART)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ensure) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with psycopg.connect(postgres) as connection:
        connection.execute("DROP SCHEMA gold CASCADE")
