"""gold.product_alerts: one run, many runs and runs that stopped half-way end in the same episodes."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from test_detector import as_text, golden_episodes, golden_minutes, golden_parameters

from clickstream import alerts
from clickstream.gold import FUNNEL_1M
from clickstream.marts import MartWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.sql import SparkSession

    from clickstream.settings import Settings


@pytest.fixture
def marts(postgres: str) -> Iterator[MartWriter]:
    writer = MartWriter(postgres, application_name="unit")
    writer.ensure(alerts.ALERTS_MART)
    yield writer
    writer.close()
    with psycopg.connect(postgres) as connection:
        connection.execute("DROP SCHEMA gold CASCADE")


def write(spark: SparkSession, settings: Settings, minutes: list[tuple[datetime, str, int, int, int]]) -> None:
    """Final minutes of the funnel, not in order."""
    FUNNEL_1M.table.ensure(spark, settings)
    rows = [
        (at, at + timedelta(minutes=1), name, "Home", *counts, Decimal(0), 1, 1, at, at.date())
        for at, name, *counts in reversed(minutes)
    ]
    spark.createDataFrame(rows, FUNNEL_1M.table.schema).coalesce(1).write.format("delta").mode("append").save(
        settings.table(FUNNEL_1M.table.name)
    )


def test_runs_in_any_pieces_and_again_give_the_golden_episodes(
    spark: SparkSession, settings: Settings, marts: MartWriter, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ", ".join(golden_episodes()[0])

    def update(**options: Any) -> None:
        alerts.update(spark, settings, marts, options.pop("limits", golden_parameters()), **options)

    def delta() -> list[dict[str, str]]:
        rows = alerts.ALERTS.read(spark, settings).orderBy("opened_at").select(names.split(", ")).collect()
        return [as_text(row.asDict()) for row in rows]

    def mart() -> list[dict[str, str]]:
        with psycopg.connect(postgres, row_factory=psycopg.rows.dict_row) as connection:
            connection.execute("SET TIME ZONE 'UTC'")
            found = connection.execute(f"SELECT {names} FROM gold.product_alerts ORDER BY opened_at").fetchall()  # type: ignore[arg-type]
        return [as_text(row) for row in found]

    minutes = golden_minutes()
    middle = datetime.fromisoformat("2025-11-29T12:05:00Z")
    write(spark, settings, [row for row in minutes if row[0] < middle])
    update()
    first = golden_episodes()[0] | {"closed_at": ""}
    assert delta() == mart() == [first]

    # A run that writes the episodes and stops before the state is done again by the next one.
    write(spark, settings, [row for row in minutes if row[0] >= middle])
    with monkeypatch.context() as patch:
        patch.setattr(alerts, "_save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            update()
    assert delta() == mart() == golden_episodes()
    update()
    assert delta() == mart() == golden_episodes()
    # Nothing new, then everything anew.
    update()
    update(rebuild=True)
    assert delta() == mart() == golden_episodes()
    # What a rebuild does not find again goes away.
    update(limits=replace(golden_parameters(), min_views=10**6), rebuild=True)
    assert delta() == mart() == []
