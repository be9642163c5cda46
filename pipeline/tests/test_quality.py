"""Data quality: a lake that is well passes everything, and each damage fails its own check and no other."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import CASES, Topic, event
from pyspark.sql import functions as F  # noqa: N812

from clickstream import bronze, checks, cli, gold, quality, silver
from clickstream.checks import Check
from clickstream.limits import QualityLimits
from clickstream.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyspark.sql import DataFrame, SparkSession

    from clickstream.marts import MartWriter

NOW = datetime(2025, 11, 29, 12, 0, tzinfo=UTC)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
# Two records a minute for half a day, one in each of two partitions.
LIMITS = QualityLimits(history_days=1, recent_hours=12)


class Lake:
    """The tables as the streams write them, without the streams: each record two seconds after its event."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self.spark, self.settings = spark, settings

    def send(self, records: DataFrame) -> None:
        at = F.to_timestamp(F.get_json_object(F.col("value").cast("string"), "$.timestamp"))
        records = records.withColumn("timestamp", at).persist()
        seen = F.col("timestamp") + F.expr("INTERVAL 2 SECONDS")
        archived = bronze.archive(records)
        archived = archived.withColumn("ingested_at", seen).withColumn("ingest_date", F.to_date(seen))
        received = silver.received(records).withColumn(
            "received_at", F.col("kafka_timestamp") + F.expr("INTERVAL 2 SECONDS")
        )
        judged = silver.judge(received, self.settings)
        self.append(bronze.CLICKSTREAM.name, archived)
        self.append(silver.EVENTS.name, silver.events(judged, self.settings))
        self.append(silver.REJECTS.name, silver.rejects(judged, self.settings))
        records.unpersist()

    def append(self, table: str, rows: DataFrame) -> None:
        rows.coalesce(1).write.format("delta").mode("append").save(self.settings.table(table))

    def sql(self, statement: str, table: str) -> None:
        self.spark.sql(statement.format(f"delta.`{self.settings.table(table)}`"))


def records(topic: Topic, partition: int, numbers: Iterable[int], *, bad: int) -> DataFrame:
    """One a minute from midnight on, minute by number; every so manieth has a price of nothing."""
    return topic.records(
        [
            event(
                1000 * partition + n,
                timestamp=(NOW - 12 * HOUR + n * MINUTE).isoformat(),
                price=0 if n % bad == 7 else 5,
            )
            for n in numbers
        ],
        partition=partition,
    )


@pytest.fixture(scope="module")
def healthy(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A lake, and the newest rows of its mart. Gold's last ten minutes are not final."""
    path = tmp_path_factory.mktemp("quality") / "lake"
    lake = Lake(spark, Settings(lake_uri=f"file://{path}"))
    for table in (*bronze.TABLES, *silver.TABLES, gold.FUNNEL_1M.table):
        table.ensure(spark, lake.settings)
    topic = Topic(spark)
    lake.send(records(topic, 0, range(720), bad=50).unionAll(records(topic, 1, range(720), bad=50)))
    rows = gold.product_funnel(silver.EVENTS.read(spark, lake.settings)).persist()
    final = rows.where(F.col("window_end") <= F.lit(NOW - 10 * MINUTE))
    lake.append(gold.FUNNEL_1M.table.name, final.withColumn("event_date", F.to_date("window_start")))
    newest = rows.orderBy(F.desc("window_start")).limit(3).collect()
    rows.unpersist()
    return path, [(*gold.in_utc(row), False) for row in newest]


@pytest.fixture
def lake(spark: SparkSession, bare: Settings, healthy: tuple[Path, list[Any]], marts: MartWriter) -> Lake:
    path, newest = healthy
    shutil.copytree(path, bare.lake_uri.removeprefix("file://"))
    marts.ensure(gold.FUNNEL_1M.mart)
    marts.replace_windows(gold.FUNNEL_1M.mart, [], newest)
    return Lake(spark, bare)


def measured(lake: Lake, marts: MartWriter, now: datetime = NOW, limits: QualityLimits = LIMITS) -> list[Check]:
    return quality.measure(lake.spark, lake.settings, marts, limits, now)


def failed(found: list[Check]) -> dict[str, str]:
    return {f"{check.check_name} {check.subject}": check.detail for check in found if check.status == checks.FAIL}


def statuses(found: list[Check]) -> dict[tuple[str, str], str]:
    return {(check.check_name, check.subject): check.status for check in found}


def expected(column: str) -> dict[tuple[str, str], str]:
    with (CASES / "quality/expected.csv").open() as lines:
        found = {(row["check_name"], row["subject"]): row[column] for row in csv.DictReader(lines)}
    return {check: status for check, status in found.items() if status}


def test_golden(lake: Lake, marts: MartWriter) -> None:
    """Side by side: what each check says of a lake that is well, and of one with all of this damage."""
    found = measured(lake, marts)
    assert failed(found) == {}
    assert statuses(found) == expected("healthy")

    lake.sql("DELETE FROM {} WHERE partition = 0 AND offset IN (690, 691, 700)", bronze.CLICKSTREAM.name)
    again = bronze.CLICKSTREAM.read(lake.spark, lake.settings).where("partition = 1 AND offset = 710")
    lake.append(bronze.CLICKSTREAM.name, again)
    lake.sql("UPDATE {} SET price = NULL WHERE partition = 0 AND offset IN (600, 601)", silver.EVENTS.name)
    lake.sql("DELETE FROM {} WHERE window_start >= '2025-11-29 11:00:00'", gold.FUNNEL_1M.table.name)
    lake.sql("ALTER TABLE {} ADD COLUMNS (colour STRING)", gold.FUNNEL_1M.table.name)
    # Within the last minute, six times what is usual in an hour, and half of it without a price.
    burst = Topic(lake.spark, partitions=3)
    lake.send(
        burst.records([event(9000 + n, timestamp="2025-11-29T11:59:30Z", price=n % 2) for n in range(720)], partition=2)
    )
    found = measured(lake, marts)
    assert statuses(found) == expected("damaged")
    said = failed(found)
    assert said["continuity topic/0"].startswith("3 missing: 690 to 691, 700; find out what changed")
    assert said["continuity topic/1"].startswith("1 there twice: 710; ")
    assert said["nulls silver.events"].startswith("price 2, in ")
    assert said["schema gold.product_funnel_1m"].startswith("colour is not declared; deploy the release")
    assert said["freshness gold"].startswith("3570 s behind, 1560 s are allowed; see `make lag`")
    assert said["reject_rate price_not_positive"].startswith("362 of 838 records fail it (43.20%); before 2.")
    assert said["volume bronze.clickstream"].startswith(
        "838 records in 60 minutes, where 120 are usual (all windows; z"
    )


def test_streams_that_stand_and_a_table_that_cannot_be_read(lake: Lake, marts: MartWriter) -> None:
    """An hour later nothing has come; and a file of silver.rejects is gone."""
    root = Path(lake.settings.table(silver.REJECTS.name).removeprefix("file://"))
    for file in root.rglob("*.parquet"):
        if "_delta_log" not in file.parts:
            file.unlink()
    found = failed(measured(lake, marts, NOW + HOUR))
    assert found.keys() == {
        "freshness bronze",
        "freshness silver",
        "nulls silver.rejects",
        "reject_rate silver.rejects",
        "volume bronze.clickstream",
    }
    assert found["volume bronze.clickstream"].startswith("0 records in 60 minutes, where 120 are usual")
    assert found["freshness bronze"].startswith(
        "3658 s behind, 900 s are allowed; no record comes, or the stream stands"
    )
    assert found["freshness silver"].startswith("it cannot be read; the job's log says more: ")


def test_a_lake_of_nothing_fails_only_for_its_freshness(spark: SparkSession, bare: Settings, marts: MartWriter) -> None:
    found = measured(Lake(spark, bare), marts)
    assert {check.check_name for check in found} == {"freshness"}
    assert {check.status for check in found} == {checks.FAIL}
    assert "it has no rows; " in found[0].detail


def test_results_are_rows_and_leave_after_their_retention(marts: MartWriter, dsn: str) -> None:
    results = [
        Check("freshness", "gold", "fail", 1000.0, 900.0, "behind"),
        Check("volume", "b", "pass", None, None, "-"),
    ]
    old = checks.store(marts, LIMITS, NOW - timedelta(days=89), results)
    new = checks.store(marts, LIMITS, NOW, results)
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "SELECT run_id::text, subject, value FROM quality.checks ORDER BY checked_at, 2"
        ).fetchall()
    assert rows == [(old, "b", None), (old, "gold", 1000.0), (new, "b", None), (new, "gold", 1000.0)]
    newest = checks.store(marts, LIMITS, NOW + timedelta(days=2), results)
    with psycopg.connect(dsn) as connection:
        left = connection.execute("SELECT DISTINCT run_id::text FROM quality.checks").fetchall()
    assert {run_id for (run_id,) in left} == {new, newest}


@pytest.mark.parametrize(
    ("minutes", "status"), [(0, "pass"), (7, "pass"), (8, "warn"), (15, "warn"), (15.1, "fail"), (None, "fail")]
)
def test_freshness(minutes: float | None, status: str) -> None:
    age = None if minutes is None else timedelta(minutes=minutes)
    assert checks.freshness("bronze", age, timedelta(minutes=15), "fix").status == status


@pytest.mark.parametrize(
    ("recent", "records", "history", "past", "status"),
    [
        # as ever; a little more by chance; a little more, without doubt; a lot more
        (20, 1000, 200, 10_000, "pass"),
        (30, 1000, 200, 10_000, "pass"),
        (60, 1000, 200, 10_000, "warn"),
        (200, 1000, 200, 10_000, "fail"),
        # a lot more than never, but few of all
        (30, 10_000, 0, 100_000, "warn"),
        (300, 10_000, 0, 100_000, "fail"),
        # three of three are no evidence
        (3, 3, 200, 10_000, "pass"),
        # nothing came; the history is shorter than the window
        (0, 0, 200, 10_000, "pass"),
        (900, 1000, 1, 999, "pass"),
    ],
)
def test_a_rule_is_judged_by_its_own_history(recent: int, records: int, history: int, past: int, status: str) -> None:
    (found,) = checks.reject_rates(LIMITS, {"r": recent}, records, {"r": history}, past)
    assert found.status == status


@pytest.mark.parametrize(
    ("recent", "same_time", "before", "status"),
    [
        (1000, [], [1000] * 20, "pass"),
        (1180, [], [1000] * 20, "pass"),
        (1500, [], [1000] * 20, "warn"),
        (2500, [], [1000] * 20, "fail"),
        (0, [], [1000] * 20, "fail"),
        # a night is as quiet as other nights, and noon is not
        (50, [60, 45, 55], [1000] * 100, "pass"),
        (50, [1000, 990, 1010], [50] * 100, "fail"),
        # two nights do not say yet what a night is
        (1000, [50, 60], [1000] * 20, "pass"),
        (0, [], [1000] * 5, "pass"),
        (3, [], [5, 4, 6, 3, 7, 4], "pass"),
    ],
)
def test_volume(recent: int, same_time: list[int], before: list[int], status: str) -> None:
    assert checks.volume(LIMITS, recent, same_time, before).status == status


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("warn", 0), ("fail", 4)])
def test_the_command_ends_with_4_when_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, code: int
) -> None:
    def run(settings: Settings) -> dict[str, Any]:
        found = Check("freshness", "gold", status, 1000.0, 900.0, "1000 s behind; see `make lag`")
        return {"run_id": "r", "checked_at": "t", "checks": [asdict(found)]}

    monkeypatch.setattr(quality, "run", run)
    command = ["quality", "--lake-uri", "file:///lake", "--marts-dsn", "service=analytics"]
    assert cli.main(command) == code
    said = capsys.readouterr()
    assert status in said.out
    assert ("clickstream: freshness of gold: 1000 s behind; see `make lag`" in said.err) == bool(code)
    assert cli.main([*command, "--json"]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checks"][0]["status"] == status


def test_it_needs_the_marts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quality", "--lake-uri", "file:///lake"]) == 2
    assert "CLICKSTREAM_MARTS_DSN: it is not set" in capsys.readouterr().err
