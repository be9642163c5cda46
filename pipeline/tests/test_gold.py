"""Gold: the figures, when a window is final, and that no crash, replay or correction leaves them wrong."""

from __future__ import annotations

import csv
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import CASES, NOW, Topic, as_text, csv_events, event

from clickstream import compact, gold, silver
from clickstream.marts import MartWriter

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from clickstream.settings import Settings


@pytest.mark.parametrize(
    ("windowed", "events_file", "expected_file"),
    [
        (gold.FUNNEL_1M, "funnel.events.csv", "funnel.expected.csv"),
        (gold.FUNNEL_1H, "hours.events.csv", "funnel_1h.expected.csv"),
        (gold.CONVERSION_1H, "hours.events.csv", "conversion_1h.expected.csv"),
    ],
)
def test_golden(spark: SparkSession, windowed: gold.Windowed, events_file: str, expected_file: str) -> None:
    """Events and the figures they make, side by side in tests/cases/gold; the session's time zone makes no difference,
    not even one whose hours begin at half past."""
    with (CASES / "gold" / expected_file).open() as lines:
        expected = list(csv.DictReader(lines))
    figures = {}
    for zone in ("Asia/Kolkata", "UTC"):
        spark.conf.set("spark.sql.session.timeZone", zone)
        figures[zone] = windowed.figures(csv_events(spark, CASES / "gold" / events_file)).collect()
    for zone, rows in figures.items():
        assert sorted(as_text(row, expected[0]) for row in rows) == [list(row.values()) for row in expected], zone
        assert {row["window_end"] - row["window_start"] for row in rows} == {windowed.length}


class Gold:
    """The real query over a real silver.events, with a real PostgreSQL behind it."""

    def __init__(self, spark: SparkSession, settings: Settings, dsn: str, query: str = gold.QUERY) -> None:
        self.query, self.tables = query, gold.QUERIES[query]
        self.spark, self.settings, self.dsn = spark, replace(settings, marts_dsn=dsn), dsn
        self.topic = Topic(spark)
        self.prepare()

    def prepare(self) -> None:
        marts = gold.prepare(self.spark, self.settings, self.tables)
        assert marts is not None
        self.marts = marts

    def append(self, *events: dict[str, Any], sent: datetime = NOW + timedelta(days=1)) -> None:
        """One commit to silver.events, by Silver's own functions."""
        records = silver.received(self.topic.records(list(events), at=sent))
        rows = silver.events(silver.judge(records, self.settings), self.settings).coalesce(1)
        rows.write.format("delta").mode("append").save(self.settings.table("silver.events"))

    def run(self, writer: gold.GoldWriter | None = None) -> gold.GoldWriter:
        """A service that starts, handles what is there and stops; each start has a writer without memory."""
        writer = writer or gold.GoldWriter(self.spark, self.settings, self.marts, self.tables)
        query = gold.build(self.spark, self.settings, writer, self.query).trigger(availableNow=True).start()
        query.awaitTermination()
        return writer

    def mart(self) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn) as connection:
            return connection.execute(
                "SELECT window_start, product_id, views, carts, purchases, revenue, users, sessions, is_final "
                "FROM gold.product_funnel_1m ORDER BY 1, 2"
            ).fetchall()

    def flags(self) -> dict[str, bool]:
        return {f"{row[0].astimezone(UTC):%H:%M}": row[-1] for row in self.mart()}

    def final(self) -> list[tuple[Any, ...]]:
        rows = gold.FUNNEL_1M.table.read(self.spark, self.settings).orderBy("window_start", "product_id").collect()
        return [
            (
                row["window_start"].replace(tzinfo=UTC),
                *(row[c] for c in ("product_id", "views", "carts", "purchases", "revenue", "users", "sessions")),
                True,
            )
            for row in rows
        ]

    def truth(self) -> list[tuple[Any, ...]]:
        """A plain recount of silver.events, without Spark's aggregation."""
        groups: dict[tuple[datetime, str], list[Any]] = {}
        for e in silver.EVENTS.read(self.spark, self.settings).collect():
            minute = e["event_time"].replace(second=0, microsecond=0, tzinfo=UTC)
            groups.setdefault((minute, e["product_id"]), []).append(e)
        kinds = ("view", "add_to_cart", "purchase")
        return sorted(
            (
                *key,
                *(sum(e["event_type"] == kind for e in es) for kind in kinds),
                sum(e["price"] for e in es if e["event_type"] == "purchase"),
                len({e["user_id"] for e in es}),
                len({e["session_id"] for e in es}),
            )
            for key, es in groups.items()
        )

    def check(self) -> None:
        """The mart equals the recount, and Delta holds exactly what the mart calls final."""
        assert [row[:-1] for row in self.mart()] == self.truth()
        assert [row for row in self.mart() if row[-1]] == self.final()

    def forget_last_commit(self) -> None:
        commits = Path(self.settings.checkpoint("gold").removeprefix("file://")) / "commits"
        last = max(int(path.name) for path in commits.iterdir() if path.name.isdigit())
        (commits / str(last)).unlink()


@pytest.fixture
def shop(spark: SparkSession, settings: Settings, dsn: str) -> Gold:
    return Gold(spark, settings, dsn)


def at(number: int, clock: str, **changes: Any) -> dict[str, Any]:
    return event(number, timestamp=f"2025-11-29T{clock}Z", **changes)


def test_live_then_final(shop: Gold) -> None:
    shop.append(at(1, "12:00:10"), at(2, "12:00:59.999", event_type="purchase"), at(3, "12:01:00"))
    shop.run()
    shop.check()
    assert shop.flags() == {"12:00": False, "12:01": False}
    # one millisecond before the watermark passes the end of the first window
    shop.append(at(4, "12:10:59.999"))
    shop.run()
    shop.check()
    assert shop.flags() == {"12:00": False, "12:01": False, "12:10": False}
    shop.append(at(5, "12:11:00"))
    shop.run()
    shop.check()
    assert shop.flags() == {"12:00": True, "12:01": False, "12:10": False, "12:11": False}


def test_one_running_writer_over_many_batches(shop: Gold) -> None:
    writer = None
    for minute in range(0, 30, 6):
        shop.append(*(at(minute * 10 + n, f"12:{minute + n:02d}:30", user_id=f"user_000{n}") for n in range(6)))
        writer = shop.run(writer)
        shop.check()
    assert sum(shop.flags().values()) == 19  # 12:00 to 12:18; the newest event is 12:29:30


def test_a_late_correction_reaches_a_final_window_in_both(shop: Gold) -> None:
    shop.append(at(1, "12:00:10"), at(2, "12:30:00"))
    shop.run()
    assert shop.flags()["12:00"]
    shop.append(at(3, "12:00:20", event_type="purchase", user_id="user_0002"))
    shop.run()
    shop.check()
    assert shop.mart()[0][2:] == (1, 0, 1, Decimal("19.99"), 2, 1, True)


def test_a_replayed_batch_changes_nothing(shop: Gold) -> None:
    shop.append(at(1, "12:00:10"), at(2, "12:00:20"))
    shop.append(at(3, "12:30:00"))
    shop.run()
    before = shop.mart(), shop.final()
    shop.forget_last_commit()
    shop.run()
    assert (shop.mart(), shop.final()) == before


def test_a_crash_between_delta_and_the_mart_is_made_good(shop: Gold, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.append(at(1, "12:00:10"))
    shop.run()
    shop.append(at(2, "12:30:00"))
    replace_windows = MartWriter.replace_windows

    def crash(marts: MartWriter, mart: Any, windows: Any, rows: Any) -> None:
        if min(windows).minute == 0:
            raise RuntimeError("killed")
        replace_windows(marts, mart, windows, rows)

    with monkeypatch.context() as patch:
        patch.setattr(MartWriter, "replace_windows", crash)
        with pytest.raises(Exception, match="killed"):
            shop.run()
    assert len(shop.final()) == 1
    assert shop.flags() == {"12:00": False, "12:30": False}
    shop.run()
    shop.check()


def test_a_crash_before_any_write_is_made_good_without_the_batch(shop: Gold) -> None:
    """The window became due in a batch that touched other windows: nothing in the checkpoint names it."""
    shop.append(at(1, "12:00:10"))
    shop.run()
    shop.append(at(2, "12:30:00"))
    shop.run()
    # as if the machine had died right after the commit of the checkpoint, with the mart's write lost
    with psycopg.connect(shop.dsn) as connection:
        connection.execute("UPDATE gold.product_funnel_1m SET is_final = false")
    gold.FUNNEL_1M.table.read(shop.spark, shop.settings)
    shop.append(at(3, "12:30:30"))
    shop.run()
    shop.check()


def test_an_emptied_mart_is_filled_again(shop: Gold) -> None:
    shop.append(at(1, "12:00:10"), at(2, "12:30:00"))
    shop.run()
    with psycopg.connect(shop.dsn) as connection:
        connection.execute("DROP SCHEMA gold CASCADE")
    shop.prepare()
    shop.append(at(3, "12:30:30"))
    shop.run()
    shop.check()


def test_hours(spark: SparkSession, settings: Settings, dsn: str) -> None:
    """Live, then final, then corrected: the mart is what the events say, Delta holds what the mart calls final."""
    shop = Gold(spark, settings, dsn, gold.HOURLY_QUERY)

    def finality(*events: dict[str, Any]) -> dict[str, bool]:
        shop.append(*events)
        shop.run()
        flags: dict[str, bool] = {}
        for windowed in shop.tables:
            rows = windowed.figures(silver.EVENTS.read(spark, shop.settings)).collect()
            names = ", ".join(windowed.mart.columns)
            with psycopg.connect(dsn) as connection:
                mart = connection.execute(f"SELECT {names} FROM gold.{windowed.mart.name}").fetchall()  # type: ignore[arg-type,call-overload]
            assert {row[:-1] for row in mart} == set(map(gold.in_utc, rows))
            final = windowed.table.read(spark, shop.settings).drop("event_date").collect()
            assert {row[:-1] for row in mart if row[-1]} == set(map(gold.in_utc, final))
            flags |= {f"{row[0].astimezone(UTC):%H:%M}": row[-1] for row in mart}
        return flags

    bought = {"event_type": "purchase"}
    events = at(1, "12:00:00"), at(2, "12:59:59.999", **bought), at(3, "13:09:59.999")
    assert finality(*events) == {"12:00": False, "13:00": False}
    assert finality(at(4, "13:10:00")) == {"12:00": True, "13:00": False}
    assert finality(at(5, "12:30:00", device_type="desktop", **bought)) == {"12:00": True, "13:00": False}


def test_any_split_into_batches_gives_the_same(spark: SparkSession, tmp_path: Path, dsn: str) -> None:
    from clickstream.settings import Settings

    events = [
        at(n, f"12:{n % 40:02d}:{n % 60:02d}", user_id=f"user_{n % 7:04d}", product_id=f"prod_{n % 3 + 1:04d}")
        for n in range(120)
    ]
    events.sort(key=lambda e: str(e["timestamp"]))
    results = []
    for size in (120, 40):
        shop = Gold(spark, Settings(lake_uri=f"file://{tmp_path}/{size}"), dsn)
        for start in range(0, len(events), size):
            shop.append(*events[start : start + size])
            shop.run()
        shop.check()
        results.append((shop.mart(), shop.final()))
        with psycopg.connect(dsn) as connection:
            connection.execute("DROP SCHEMA gold CASCADE")
    assert results[0] == results[1]


def test_more_windows_than_fit_in_one_step(shop: Gold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gold, "CHUNK", 7)
    shop.append(*(at(n, f"12:{n:02d}:00") for n in range(45)))
    shop.run()
    shop.check()


def test_compaction_beside_the_stream_changes_no_figure(shop: Gold) -> None:
    writer = None
    for minute in range(0, 20, 4):
        shop.append(at(minute, f"12:{minute:02d}:30"))
        writer = shop.run(writer)
        if minute == 12:
            results = {r.table: r for r in compact.compact(shop.spark, shop.settings)}
            assert results["silver.events"].files_before == 4
            assert results["silver.events"].files_after == 1
            written = {table for table, r in results.items() if r.files_before}
            assert written == {"silver.events", "gold.product_funnel_1m"}
    shop.check()


def test_without_a_mart_delta_is_still_written(spark: SparkSession, settings: Settings) -> None:
    assert gold.prepare(spark, settings) is None
    writer = gold.GoldWriter(spark, settings, None)
    records = silver.received(Topic(spark).records([at(1, "12:00:00"), at(2, "12:30:00")], at=NOW + timedelta(days=1)))
    rows = silver.events(silver.judge(records, settings), settings)
    rows.write.format("delta").mode("append").save(settings.table("silver.events"))
    gold.build(spark, settings, writer).trigger(availableNow=True).start().awaitTermination()
    assert gold.FUNNEL_1M.table.read(spark, settings).count() == 1
    assert writer.newest == datetime(2025, 11, 29, 12, 30, tzinfo=UTC)


def test_only_touched_windows_are_read(shop: Gold) -> None:
    """The filter names dates and bounds, so that files of other times are not opened."""
    shop.append(at(1, "12:00:00"))
    shop.append(at(2, "13:00:00"))
    events: DataFrame = silver.EVENTS.read(shop.spark, shop.settings)
    window = datetime(2025, 11, 29, 13, 0, tzinfo=UTC)
    assert len(gold.in_windows(events, [window], gold.MINUTE).inputFiles()) <= 2
    assert [row["event_id"] for row in gold.in_windows(events, [window], gold.MINUTE).collect()] == ["evt_00000002"]


def test_a_new_release_goes_on_over_the_lake_of_an_older_one(
    spark: SparkSession, settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silver's table gets its new columns while Gold's checkpoint is at a commit before them."""
    added = ("event_hour", "session_key")
    now = silver.EVENTS, silver.events
    names = [field.name for field in silver.EVENTS.schema.fields if field.name not in added]
    columns = ", ".join(
        f"{field.name} {field.dataType.simpleString()}" for field in silver.EVENTS.schema if field.name in names
    )
    monkeypatch.setattr(silver, "EVENTS", replace(silver.EVENTS, columns=columns))
    monkeypatch.setattr(silver, "events", lambda judged, settings: now[1](judged, settings).drop(*added))
    shop = Gold(spark, settings, dsn)
    shop.append(at(1, "12:00:10"))
    shop.run()
    # Not read yet when the old release stops.
    shop.append(at(2, "12:05:00"))

    monkeypatch.undo()
    assert silver.EVENTS is now[0]
    shop.prepare()
    shop.append(at(3, "12:30:00"))
    shop.run()
    shop.check()
    assert shop.flags() == {"12:00": True, "12:05": True, "12:30": False}
