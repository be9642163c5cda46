"""The accounting job: what the stream dropped is classified, and every offset is somewhere exactly once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oracle
import psycopg
import pytest
from conftest import CASES, KAFKA_COLUMNS, NOW, Silver, Topic, batches, event, full_disk
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from clickstream import account, bronze, checks, lake, silver
from clickstream.errors import JobError
from clickstream.marts import MartWriter
from clickstream.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from pyspark.sql import DataFrame, SparkSession


class Lake(Silver):
    """Bronze and Silver of one topic."""

    def __init__(self, spark: SparkSession, settings: Settings, topic: Topic) -> None:
        super().__init__(spark, settings)
        self.topic = topic
        for table in bronze.TABLES:
            table.ensure(spark, settings)

    def send(self, values: Iterable[dict[str, Any] | bytes | None], at: datetime = NOW, partition: int = 0) -> None:
        self.take(self.topic.records(values, at, partition))

    def take(self, records: DataFrame) -> None:
        """Appends to the topic and to Bronze, and lets Silver's real query process it."""
        records = records.coalesce(1).persist()
        records.write.format("delta").mode("append").save(self.source)
        path = self.settings.table(bronze.CLICKSTREAM.name)
        bronze.archive(records).write.format("delta").mode("append").save(path)
        records.unpersist()
        self.run()

    def account(self, **ends: int) -> account.Report:
        """Up to these ends, `p0=13`; without any, up to the end of Bronze."""
        if not ends:
            rows = bronze.CLICKSTREAM.read(self.spark, self.settings).groupBy("partition").agg({"offset": "max"})
            ends = {f"p{partition}": last + 1 for partition, last in rows.collect()}
        closed = {("topic", int(name[1:])): end for name, end in ends.items()}
        return account.account(self.spark, self.settings, closed)

    def places(self) -> dict[int, list[str]]:
        """Each offset of partition 0, and the tables or dispositions it is in."""
        events = silver.EVENTS.read(self.spark, self.settings).selectExpr("offset", "partition", "'events'")
        rejects = silver.REJECTS.read(self.spark, self.settings).select("offset", "partition", "disposition")
        found: dict[int, list[str]] = {}
        for offset, _, place in events.union(rejects).where("partition = 0").collect():
            found.setdefault(offset, []).append(place)
        return found

    def placed(self) -> dict[oracle.Position, tuple[str, frozenset[str]]]:
        """Where each record is in Silver, and its codes; the same offset twice is an error."""
        rows = silver.EVENTS.read(self.spark, self.settings).selectExpr(
            "partition", "offset", "'event'", "array() codes"
        )
        rejects = silver.REJECTS.read(self.spark, self.settings).select("partition", "offset", "disposition", "codes")
        found = [((p, offset), (place, frozenset(codes))) for p, offset, place, codes in rows.union(rejects).collect()]
        assert len(dict(found)) == len(found), "an offset is in Silver twice"
        return dict(found)

    def verdicts(self, survivors: Collection[oracle.Position] = ()) -> dict[oracle.Position, oracle.Verdict]:
        """What the oracle says of Bronze."""
        columns = "partition", "offset", "value", "unix_micros(timestamp)", "unix_micros(ingested_at)"
        rows = bronze.CLICKSTREAM.read(self.spark, self.settings).selectExpr(*columns).collect()
        return oracle.verdicts((oracle.Record(*row) for row in rows), survivors=survivors)


@pytest.fixture
def shop(spark: SparkSession, settings: Settings, topic: Topic) -> Lake:
    return Lake(spark, settings, topic)


def test_golden(shop: Lake) -> None:
    """Input: a record a line, in batches. Expected: where each offset is after the stream, and after the job."""
    for at, values in batches(CASES / "account/shop.jsonl"):
        shop.send(values, at=at)
    with (CASES / "account/shop.expected.csv").open() as lines:
        expected = list(csv.DictReader(lines))
    streamed = {"events": "events", "invalid": "rejects"}
    places = shop.places()
    after_stream = {n: "/".join(streamed[p] for p in places.get(n, [])) or "dropped" for n in range(len(expected))}
    assert after_stream == {int(row["offset"]): row["after the stream"] for row in expected}

    report = shop.account()
    assert shop.places() == {int(row["offset"]): [row["after account"]] for row in expected}
    assert report.unexplained == []
    assert report.ledger == [
        {
            "topic": "topic",
            "partition": 0,
            "start_offset": 0,
            "end_offset": 13,
            "bronze": 13,
            "events": 5,
            "invalid": 2,
            "duplicates": 4,
            "conflicting": 2,
            "late_added": 1,
            "unexplained": 0,
        }
    ]
    late = silver.EVENTS.read(shop.spark, shop.settings).where("offset = 7").first()
    assert late is not None
    assert (late["event_id"], late["event_time"]) == ("evt_00000004", datetime(2025, 11, 29, 12, 5))
    duplicate = silver.REJECTS.read(shop.spark, shop.settings).where("offset = 8").first()
    assert duplicate is not None
    assert json.loads(duplicate["value"])["event_id"] == "evt_00000004"
    assert duplicate["codes"] == []


def test_a_second_run_takes_up_where_the_first_ended(shop: Lake) -> None:
    shop.send([event(1), event(1)])
    shop.send([event(2)], partition=1)
    assert [(r["partition"], r["start_offset"], r["end_offset"]) for r in shop.account().ledger] == [
        (0, 0, 2),
        (1, 0, 1),
    ]
    assert shop.account() == account.Report([], [])
    shop.send([event(1), event(3)])
    (row,) = shop.account().ledger
    assert (row["start_offset"], row["end_offset"], row["events"], row["duplicates"]) == (2, 4, 1, 1)
    assert shop.places() == {0: ["events"], 1: ["duplicate"], 2: ["duplicate"], 3: ["events"]}


def test_the_marts_have_the_ledger_too(shop: Lake, dsn: str) -> None:
    """And get what a run could not put there, by the next one."""

    def published() -> list[tuple[Any, ...]]:
        account.publish(shop.spark, shop.settings, marts)
        with psycopg.connect(dsn) as connection:
            query = "SELECT partition, start_offset, end_offset, events, duplicates FROM quality.ledger ORDER BY 1, 2"
            return connection.execute(query).fetchall()

    marts = MartWriter(dsn, application_name="unit")
    try:
        shop.send([event(1), event(1)])
        shop.account()
        assert published() == [(0, 0, 2, 1, 1)]
        with psycopg.connect(dsn) as connection:
            connection.execute("DELETE FROM quality.ledger")
        shop.send([event(2)], partition=1)
        shop.account()
        assert published() == [(0, 0, 2, 1, 1), (1, 0, 1, 1, 0)]
    finally:
        marts.close()
        with psycopg.connect(dsn) as connection:
            connection.execute("DROP SCHEMA IF EXISTS quality CASCADE")
    assert checks.LEDGER.columns == tuple(account.LEDGER.schema.names[:-1])


def test_only_closed_offsets_are_judged(shop: Lake) -> None:
    """What the stream has not committed is not missing, it is not there yet."""
    shop.send([event(1), event(1), event(1)])
    (row,) = shop.account(p0=2).ledger
    assert (row["end_offset"], row["duplicates"]) == (2, 1)
    assert 2 not in shop.places()


def test_the_record_in_silver_counts_whatever_its_offset(shop: Lake) -> None:
    """The same event through another partition: Kafka orders partitions only by themselves."""
    shop.send([event(1, price=5)], at=NOW + timedelta(seconds=5), partition=1)
    shop.send([event(1, price=6)], at=NOW)
    shop.account()
    assert shop.places() == {0: ["conflicting_duplicate"]}


def test_of_late_events_with_one_id_the_earliest_counts(shop: Lake) -> None:
    shop.send([event(9, timestamp="2025-11-29T15:00:00.000Z")], at=NOW + timedelta(hours=3))
    shop.send([event(1, price=2), event(1, price=1)], at=NOW + timedelta(hours=3, seconds=1))
    shop.account()
    assert shop.places() == {0: ["events"], 1: ["events"], 2: ["conflicting_duplicate"]}


def test_of_late_events_in_a_partition_the_earliest_offset_counts_whatever_the_clock_says(shop: Lake) -> None:
    """A producer sets Kafka's timestamp, and its clock may go back; between partitions there is nothing else."""
    late = NOW + timedelta(hours=3)
    shop.send([event(9, timestamp="2025-11-29T15:00:00.000Z")], at=late)
    shop.send([event(1, price=1), event(2, price=1)], at=late + timedelta(seconds=2))
    shop.send([event(1, price=2)], at=late)
    shop.send([event(2, price=2)], at=late + timedelta(seconds=1), partition=1)
    shop.account()
    assert shop.places() == {
        0: ["events"],
        1: ["events"],
        2: ["conflicting_duplicate"],
        3: ["conflicting_duplicate"],
    }
    found = silver.EVENTS.read(shop.spark, shop.settings).where("partition = 1").select("event_id").collect()
    assert [row["event_id"] for row in found] == ["evt_00000002"]


def test_a_hole_is_named_until_it_is_closed(shop: Lake) -> None:
    shop.send([event(1), event(2), event(3)])
    table = f"delta.`{shop.settings.table('bronze.clickstream')}`"
    shop.spark.sql(f"DELETE FROM {table} WHERE offset = 1")
    report = shop.account()
    assert report.unexplained == [("topic", 0, 1)]
    assert report.ledger[0]["unexplained"] == 1
    shop.send([event(4)])
    report = shop.account()
    assert (report.ledger[0]["start_offset"], report.unexplained) == (0, [("topic", 0, 1)])
    shop.spark.sql(f"RESTORE TABLE {table} TO VERSION AS OF 1")
    shop.spark.sql(f"INSERT INTO {table} SELECT * FROM {table} VERSION AS OF 3 WHERE offset = 3")
    report = shop.account()
    assert (report.ledger[0]["start_offset"], report.unexplained) == (0, [])
    assert shop.account() == account.Report([], [])


def test_the_first_offset_is_the_streams_and_not_the_first_that_is_there(
    spark: SparkSession, settings: Settings
) -> None:
    """Of a topic from which Kafka had removed the oldest records; partition 1 has none left."""
    began = Path(settings.checkpoint(bronze.QUERY).removeprefix("file://")) / "sources/0/0"
    began.parent.mkdir(parents=True)
    began.write_text('\0v1\n{"topic":{"0":500,"1":7}}')
    shop = Lake(spark, settings, Topic(spark, start=500))
    shop.send([event(1), event(2)])
    table = f"delta.`{settings.table('bronze.clickstream')}`"
    shop.spark.sql(f"DELETE FROM {table} WHERE offset = 500")
    report = shop.account(p0=502, p1=7)
    assert [(row["partition"], row["start_offset"], row["end_offset"]) for row in report.ledger] == [(0, 500, 502)]
    assert report.unexplained == [("topic", 0, 500)]


def test_two_runs_that_miss_the_same_add_it_once(shop: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is by the clock: a machine that slept has lost it without knowing."""
    shop.send([event(9, timestamp="2025-11-29T15:00:00.000Z")], at=NOW + timedelta(hours=3))
    shop.send([event(1), event(9)], at=NOW + timedelta(hours=3))
    classify = account.classify

    def beside_a_rival(candidates: DataFrame, known: DataFrame) -> DataFrame:
        monkeypatch.setattr(account, "classify", classify)
        assert candidates.count() == 2
        assert shop.account().unexplained == []
        return classify(candidates, known)

    monkeypatch.setattr(account, "classify", beside_a_rival)
    shop.account()
    assert shop.places() == {0: ["events"], 1: ["events"], 2: ["conflicting_duplicate"]}


def test_one_run_at_a_time(shop: Lake) -> None:
    with (
        lake.locked(shop.spark, shop.settings, account.LOCK),
        pytest.raises(JobError, match="another run holds"),
        lake.locked(shop.spark, shop.settings, account.LOCK),
    ):
        pass
    with lake.locked(shop.spark, shop.settings, account.LOCK):
        pass


def test_the_lock_of_a_killed_run_is_taken_over_and_that_of_a_long_one_is_not(
    shop: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(shop.settings.lake_uri.removeprefix("file://")) / "_locks" / account.LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (time.time() - 61, time.time() - 61))
    monkeypatch.setattr(lake, "LOCK_RENEWED_S", 0.1)
    with lake.locked(shop.spark, shop.settings, account.LOCK):
        # Beside what the killed run left.
        (file,) = file.parent.glob(f"{file.name}.empty-*")
        began = file.stat().st_mtime
        monkeypatch.setattr(lake, "LOCK_EXPIRES_S", 1.0)
        deadline = time.monotonic() + 30
        while file.stat().st_mtime < began + 1.5:
            assert time.monotonic() < deadline, "the lock is not renewed"
            time.sleep(0.1)
        with pytest.raises(JobError, match="wait for it"), lake.locked(shop.spark, shop.settings, account.LOCK):
            pass
    assert not [found for found in file.parent.iterdir() if not found.name.endswith(".crc")]


def test_an_offset_that_is_there_twice_is_unexplained(shop: Lake) -> None:
    shop.send([event(1), b"rubbish"])
    path = shop.settings.table("silver.events")
    again = silver.EVENTS.read(shop.spark, shop.settings).persist()
    again.count()
    again.write.format("delta").mode("append").save(path)
    assert shop.account().unexplained == [("topic", 0, 0)]


@pytest.mark.parametrize("table", ["silver/rejects", "silver/events", "silver/ledger"])
def test_a_crash_at_any_write_is_made_good_by_the_next_run(shop: Lake, table: str) -> None:
    shop.send([event(9, timestamp="2025-11-29T15:00:00.000Z")], at=NOW + timedelta(hours=3))
    shop.send([event(9, timestamp="2025-11-29T15:00:00.000Z"), event(1)], at=NOW + timedelta(hours=3))

    with full_disk(account, "append_once", table):
        shop.account()
    report = shop.account()
    assert report.unexplained == []
    assert shop.places() == {0: ["events"], 1: ["duplicate"], 2: ["events"]}


def test_closed_is_what_both_streams_committed(spark: SparkSession, settings: Settings) -> None:
    def checkpoint(query: str, committed: int, offsets: dict[int, str]) -> None:
        root = Path(settings.checkpoint(query).removeprefix("file://"))
        for folder in ("commits", "offsets"):
            (root / folder).mkdir(parents=True)
        for batch in range(committed + 1):
            (root / "commits" / str(batch)).write_text('v1\n{"nextBatchWatermarkMs":0}')
        for batch, ends in offsets.items():
            (root / "offsets" / str(batch)).write_text(f'v1\n{{"batchWatermarkMs":0}}\n{{"clicks":{ends}}}')

    assert account.closed(spark, settings) == {}
    checkpoint("bronze", 10, {9: '{"0":1}', 10: '{"0":50,"1":7,"2":3}', 11: '{"0":99,"1":99,"2":99}'})
    assert account.closed(spark, settings) == {}
    checkpoint("silver", 2, {2: '{"0":40,"1":8}', 3: '{"0":60,"1":9}'})
    assert account.closed(spark, settings) == {("clicks", 0): 40, ("clicks", 1): 7}


# An id's partition is that of its key, as a producer has it; now and then a record comes through another one.
ARRIVALS = st.tuples(
    st.integers(0, 9),
    st.sampled_from([1, 1, "1.00", 2]),
    st.sampled_from([0, 0, 0, 0, 0, 1]),
    st.integers(0, 59),
)


@examples(
    max_examples=3,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # to make an example smaller takes minutes
)
@given(sent=st.lists(st.lists(ARRIVALS, min_size=1, max_size=14), min_size=2, max_size=3), replayed=st.integers(0, 2))
def test_any_order_any_split_and_a_replay_end_where_the_oracle_says(
    spark: SparkSession,
    empty_lake: Path,
    tmp_path_factory: pytest.TempPathFactory,
    sent: list[list[tuple[int, int | str, int, int]]],
    replayed: int,
) -> None:
    """Ids that come again, as they were or otherwise, early or after the watermark, in one batch or in several."""
    root = tmp_path_factory.mktemp("any") / "lake"
    shutil.copytree(empty_lake, root)
    shop = Lake(spark, Settings(lake_uri=f"file://{root}"), Topic(spark))
    # Else the last commit would be of a batch without records, and its replay nothing.
    spark.conf.set("spark.sql.streaming.noDataMicroBatches.enabled", "false")
    try:
        ends = [0, 0]
        for number, arrivals in enumerate(sent):
            rows = []
            for n, price, stray, second in arrivals:
                # Half an hour of events, so that the watermark leaves some behind; each id has its own moment.
                moment = NOW + timedelta(minutes=7 * (n % 5))
                stamp = f"{moment:%Y-%m-%dT%H:%M:%SZ}"
                value = json.dumps(event(n, timestamp=stamp, price=0)).replace("0}", f"{price}}}").encode()
                partition = (n + stray) % 2
                at = NOW + timedelta(hours=1, seconds=second)  # a producer's clock: it goes back and forth
                rows.append(("topic", partition, ends[partition], at, 0, b"key", value, []))
                ends[partition] += 1
            shop.take(spark.createDataFrame(rows, KAFKA_COLUMNS))
            if number == replayed:
                shop.forget_last_commit()
        shop.run()
    finally:
        spark.conf.unset("spark.sql.streaming.noDataMicroBatches.enabled")
    report = shop.account()
    assert report.unexplained == []
    placed = shop.placed()
    # Of two partitions' first records with one id the stream may keep either.
    survivors = {position for position, (place, _) in placed.items() if place == "event"}
    assert placed == {position: verdict[:2] for position, verdict in shop.verdicts(survivors).items()}
    assert sum(row["bronze"] for row in report.ledger) == sum(ends) == len(placed)
