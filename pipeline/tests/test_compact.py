"""Vacuum: what a stream has yet to read and what a backfill needs to be taken back is not removed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from test_gold import Gold, at

from clickstream import backfill, cli, compact, silver
from clickstream.backfill import BEGUN, DONE, Entry, Range
from clickstream.errors import RefusedError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from clickstream.settings import Settings

HOURS = timedelta(hours=1)


def later(hours: float) -> datetime:
    return datetime.now(UTC) + hours * HOURS


def test_a_stream_that_lags_more_than_the_retention_is_named(
    spark: SparkSession, settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one that is looked at. All of them are compacted beside Gold's stream, see test_gold.
    monkeypatch.setattr(compact, "TABLES", (silver.EVENTS,))
    shop = Gold(spark, settings, dsn)
    compact.guard(spark, settings, later(1000))
    shop.append(at(1, "12:00:10"))
    shop.append(at(3, "12:00:30"))
    shop.run()
    # It has read everything, however long ago; and compaction gives it nothing to read.
    compact.compact_table(spark, settings, silver.EVENTS, vacuum=False)
    compact.guard(spark, settings, later(1000))

    shop.append(at(2, "12:00:20"))
    compact.guard(spark, settings, later(47))
    with pytest.raises(RefusedError, match=r"stream gold has yet to read silver.events from version \d+ \(20") as error:
        compact.guard(spark, settings, later(49))
    assert "kept for 48 hours" in str(error.value)
    assert f"remove its checkpoint {settings.checkpoint('gold')}" in str(error.value)

    # It is refused before anything is done, and Gold reads on when it is back.
    spark.sql(
        f"ALTER TABLE delta.`{settings.table('silver.events')}` SET TBLPROPERTIES "
        "('delta.deletedFileRetentionDuration' = 'interval 0 hours')"
    )
    files = sum(1 for _ in silver.EVENTS.read(spark, settings).inputFiles())
    with pytest.raises(RefusedError):
        compact.compact(spark, settings)
    assert len(silver.EVENTS.read(spark, settings).inputFiles()) == files > 1
    shop.run()
    results = {result.table: result for result in compact.compact(spark, settings)}
    assert results["silver.events"].files_after == 1
    shop.check()


def entry(began: datetime) -> Entry:
    return Entry("id", False, began, 2, [Range("topic", 0, 0, 7)], 0, 0)


def test_a_backfill_that_can_be_taken_back_is_named(spark: SparkSession, settings: Settings) -> None:
    for table in (*silver.TABLES, backfill.BACKFILLS):
        table.ensure(spark, settings)
    compact.guard(spark, settings)
    entry(datetime.now(UTC)).write(spark, settings, BEGUN)
    with pytest.raises(RefusedError, match=r"was interrupted, .*`clickstream backfill --rollback`, then run"):
        compact.guard(spark, settings)
    compact.guard(spark, settings, later(49))
    entry(datetime.now(UTC)).write(spark, settings, DONE)
    # The tables keep what it replaced for as long as it can be taken back; ...
    compact.guard(spark, settings, later(47))
    compact.guard(spark, settings, later(49))
    # ... but not when the setting was raised and the tables do not know it yet.
    longer = replace(settings, retention_hours=96)
    compact.guard(spark, longer, later(47))
    with pytest.raises(RefusedError, match=r"keeps replaced files for 48 hours only.* Restart the streams"):
        compact.guard(spark, longer, later(49))
    compact.guard(spark, longer, later(97))


def test_the_command_ends_with_4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(settings: Settings, vacuum: bool) -> list[dict[str, Any]]:
        raise RefusedError("stream gold has yet to read")

    monkeypatch.setattr(compact, "run", run)
    assert cli.main(["compact", "--vacuum", "--lake-uri", "file:///lake"]) == 4
    assert capsys.readouterr().err == "clickstream: stream gold has yet to read\n"
