"""The bounded job that measures data quality: of each layer in the lake and of the marts, judged by checks.py.

It only reads the lake; its results are rows of quality.checks in Postgres. Bronze and Silver, which write down when
they saw a record, are compared with our clock; Gold and the mart with Silver's newest event, so that a replay of old
events is not stale.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Window
from pyspark.sql import functions as F  # noqa: N812

from clickstream import bronze, checks, gold, sessions, silver, stopping
from clickstream.checks import FAIL, Check
from clickstream.lake import utc
from clickstream.limits import QualityLimits
from clickstream.marts import MartWriter
from clickstream.session import spark_session
from clickstream.settings import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import psycopg
    from pyspark.sql import DataFrame, SparkSession

    from clickstream.lake import Table
    from clickstream.settings import Settings

log = logging.getLogger("clickstream")

# A record that fails several rules counts once here.
ANY = "any rule"
# The columns that may be null: what a record came with, ratios to nothing, and what rows of older releases lack.
NULLABLE = {
    bronze.CLICKSTREAM.name: {"key", "value", "headers"},
    silver.EVENTS.name: {"event_hour", "session_key"},
    silver.REJECTS.name: {"key", "value"},
    gold.CONVERSION_1H.table.name: {"purchases_per_view", "session_conversion"},
}
# When a row was written, where that is not the time of its partition.
WRITTEN = {bronze.CLICKSTREAM.name: "ingested_at", silver.EVENTS.name: "processed_at"}
STREAMS = "see `make lag` and the journal of the stream's service"
TABLES = (bronze.CLICKSTREAM, *silver.TABLES, *gold.TABLES, sessions.TABLE)


@dataclass(frozen=True)
class Windows:
    """Bronze's records by window, counted back from now; 0 is the recent one.

    `whole` is before which window all are whole; `begins` has the first offset of each partition since `start`, and
    `recent` the first and last in the recent window.
    """

    start: datetime
    records: Counter[int]
    whole: int
    begins: dict[tuple[str, int], int]
    recent: dict[tuple[str, int], tuple[int, int]]


class Lake:
    """What the checks measure, of the tables that are there. Times are UTC."""

    def __init__(self, spark: SparkSession, settings: Settings, limits: QualityLimits, now: datetime) -> None:
        self._spark, self._settings, self._limits, self._now = spark, settings, limits, now

    def has(self, table: Table) -> bool:
        return bool(DeltaTable.isDeltaTable(self._spark, self._settings.table(table.name)))

    def read(self, table: Table) -> DataFrame:
        return table.read(self._spark, self._settings)

    def extreme(self, table: Table, column: str, *, last: bool = True) -> datetime | None:
        """The last or first value of a time, looked for in the last or first partition only."""
        if not self.has(table):
            return None
        pick = F.max if last else F.min
        (day,) = table.partition_by
        rows = self.read(table)
        found = rows.agg(pick(day).alias("day")).first()
        if found is None or found["day"] is None:
            return None
        value = rows.where(F.col(day) == F.lit(found["day"])).agg(pick(column).alias("value")).first()
        return utc(value["value"]) if value and value["value"] else None

    @property
    def _allowed(self) -> timedelta:
        return timedelta(minutes=self._limits.freshness_minutes)

    def _since(self, moment: datetime | None) -> timedelta | None:
        return max(timedelta(0), self._now - moment) if moment else None

    def fresh_bronze(self) -> Check:
        archived = self.extreme(bronze.CLICKSTREAM, "ingested_at")
        return checks.freshness(
            "bronze", self._since(archived), self._allowed, f"no record comes, or the stream stands: {STREAMS}"
        )

    def fresh_silver(self) -> Check:
        written = [self.extreme(silver.EVENTS, "processed_at"), self.extreme(silver.REJECTS, "rejected_at")]
        newest = max((moment for moment in written if moment), default=None)
        return checks.freshness("silver", self._since(newest), self._allowed, STREAMS)

    def _behind(self, reached: datetime | None) -> timedelta | None:
        """How far Silver's newest event is ahead; before its first row a table is behind all events."""
        newest = self.extreme(silver.EVENTS, "event_time")
        start = reached or self.extreme(silver.EVENTS, "event_time", last=False)
        return max(timedelta(0), newest - start) if newest and start else None

    def fresh_gold(self) -> Check:
        final = self.extreme(gold.FUNNEL_1M.table, "window_end")
        watermark = timedelta(seconds=seconds(self._settings.watermark))
        return checks.freshness("gold", self._behind(final), self._allowed + watermark + gold.MINUTE, STREAMS)

    def fresh_mart(self, counted: datetime | None) -> Check:
        """`counted` is the newest event that the mart has."""
        return checks.freshness("mart", self._behind(counted), self._allowed, f"{STREAMS}, and PostgreSQL")

    def _archived(self, since: datetime) -> DataFrame:
        return self.read(bronze.CLICKSTREAM).where(
            (F.col("ingest_date") >= F.lit(since.date()))
            & (F.col("ingested_at") >= F.lit(since))
            & (F.col("ingested_at") < F.lit(self._now))
        )

    def continuity(self) -> list[Check]:
        recent = self._archived(self._now - timedelta(hours=self._limits.recent_hours))
        ordered = Window.partitionBy("topic", "partition").orderBy("offset")
        steps = recent.select("topic", "partition", "offset", F.lead("offset").over(ordered).alias("next"))
        holes: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        twice: dict[tuple[str, int], list[int]] = defaultdict(list)
        for row in steps.where("next - offset != 1").orderBy("offset").limit(1000).collect():
            partition = (row["topic"], row["partition"])
            if row["next"] == row["offset"]:
                twice[partition].append(row["offset"])
            else:
                holes[partition].append((row["offset"] + 1, row["next"] - 1))
        counted = recent.groupBy("topic", "partition").count().orderBy("topic", "partition").collect()
        return [
            checks.continuity(f"{topic}/{partition}", count, holes[topic, partition], twice[topic, partition])
            for topic, partition, count in counted
        ]

    def schema(self, table: Table) -> list[Check]:
        def columns(fields: Iterable[Any]) -> dict[str, str]:
            return {field.name: field.dataType.simpleString() for field in fields}

        if not self.has(table):
            return []
        return [checks.schema(table.name, columns(table.schema.fields), columns(self.read(table).schema.fields))]

    def nulls(self, table: Table) -> list[Check]:
        if not self.has(table):
            return []
        since = self._now - timedelta(hours=self._limits.recent_hours)
        (day,) = table.partition_by
        written = WRITTEN.get(table.name)
        # A valid event may be this much older than its arrival.
        oldest = since - timedelta(seconds=seconds(self._settings.max_event_age) if table is silver.EVENTS else 0)
        recent = self.read(table).where(F.col(day).isNull() | (F.col(day) >= F.lit(oldest.date())))
        if written:
            recent = recent.where(F.col(written).isNull() | (F.col(written) >= F.lit(since)))
        names = [field.name for field in table.schema.fields if field.name not in NULLABLE.get(table.name, ())]
        row = recent.agg(F.count("*").alias("rows"), *(F.count_if(F.col(n).isNull()).alias(n) for n in names)).first()
        assert row is not None
        return [checks.nulls(table.name, row["rows"], {name: row[name] for name in names})]

    @cached_property
    def _windows(self) -> Windows:
        window = timedelta(minutes=self._limits.window_minutes)
        count = timedelta(days=self._limits.history_days) // window + 1
        age = F.lit(self._now.timestamp()) - F.unix_micros("ingested_at") / F.lit(1_000_000)
        place = F.ceil(age / F.lit(window.total_seconds())).cast("int") - 1
        start = self._now - count * window
        found = (
            self._archived(start)
            .groupBy("topic", "partition", F.greatest(place, F.lit(0)).alias("window"))
            .agg(F.count("*").alias("records"), F.min("offset").alias("first"), F.max("offset").alias("last"))
            .collect()
        )
        records: Counter[int] = Counter()
        recent: dict[tuple[str, int], tuple[int, int]] = {}
        begins: dict[tuple[str, int], int] = {}
        for row in found:
            records[row["window"]] += row["records"]
            partition = (row["topic"], row["partition"])
            if row["window"] == 0:
                recent[partition] = (row["first"], row["last"])
            begins[partition] = min(row["first"], begins.get(partition, row["first"]))
        oldest = max(records, default=0)
        # The window in which the first record of all came is not a whole one.
        return Windows(start, records, oldest if oldest < count - 1 else count, begins, recent)

    def volume(self) -> list[Check]:
        found = self._windows
        before = [found.records[n] for n in range(1, found.whole)]
        day = timedelta(days=1) // timedelta(minutes=self._limits.window_minutes)
        return [checks.volume(self._limits, found.records[0], before[day - 1 :: day], before)]

    def reject_rates(self) -> list[Check]:
        found = self._windows
        if not found.begins or not self.has(silver.REJECTS):
            return []
        ranges = [
            (topic, partition, first, *found.recent.get((topic, partition), (None, None)))
            for (topic, partition), first in found.begins.items()
        ]
        schema = "topic STRING, partition INT, begins BIGINT, recent BIGINT, last BIGINT"
        failed = (
            # By position, not by time: a bounded job that judges old records again writes them now.
            self.read(silver.REJECTS)
            .where((F.col("disposition") == silver.INVALID) & (F.col("reject_date") >= F.lit(found.start.date())))
            .join(F.broadcast(self._spark.createDataFrame(ranges, schema)), ["topic", "partition"])
            .where("offset >= begins AND offset <= coalesce(last, offset)")
            .select(
                F.coalesce(F.col("offset") >= F.col("recent"), F.lit(False)).alias("now"),
                F.explode(F.concat("codes", F.array(F.lit(ANY)))).alias("code"),
            )
            .groupBy("now", "code")
            .count()
            .collect()
        )
        counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
        for row in failed:
            counts[row["now"]][row["code"]] = row["count"]
        past = found.records.total() - found.records[0]
        return checks.reject_rates(self._limits, counts[True], found.records[0], counts[False], past)


def _newest_in_mart(marts: MartWriter) -> datetime | None:
    mart = gold.FUNNEL_1M.mart
    marts.ensure(mart)

    def work(connection: psycopg.Connection[Any]) -> datetime | None:
        row = connection.execute(
            "SELECT max(last_event_at) FROM gold.product_funnel_1m "
            "WHERE window_start = (SELECT max(window_start) FROM gold.product_funnel_1m)"
        ).fetchone()
        return row[0] if row else None

    return marts.transact(work)


def measure(
    spark: SparkSession, settings: Settings, marts: MartWriter, limits: QualityLimits, now: datetime
) -> list[Check]:
    """All checks. A table that cannot be read fails its own and leaves the others."""
    lake = Lake(spark, settings, limits, now)

    def attempt(name: str, subject: str, work: Callable[[], list[Check]]) -> list[Check]:
        log.info("%s of %s", name, subject)
        try:
            return work()
        except (PySparkException, Py4JJavaError) as error:
            if stopping.told():
                raise
            said = " ".join(str(error).split())[:300]
            log.exception("%s of %s", name, subject)
            return [Check(name, subject, FAIL, None, None, f"it cannot be read; the job's log says more: {said}")]

    counted = _newest_in_mart(marts)
    found = attempt("freshness", "bronze", lambda: [lake.fresh_bronze()])
    found += attempt("freshness", "silver", lambda: [lake.fresh_silver()])
    found += attempt("freshness", "gold", lambda: [lake.fresh_gold()])
    found += attempt("freshness", "mart", lambda: [lake.fresh_mart(counted)])
    for table in TABLES:
        found += attempt("schema", table.name, partial(lake.schema, table))
        found += attempt("nulls", table.name, partial(lake.nulls, table))
    if lake.has(bronze.CLICKSTREAM):
        found += attempt("continuity", bronze.CLICKSTREAM.name, lake.continuity)
        found += attempt("volume", bronze.CLICKSTREAM.name, lake.volume)
        found += attempt("reject_rate", silver.REJECTS.name, lake.reject_rates)
    return found


def run(settings: Settings) -> dict[str, Any]:
    """`{"run_id", "checked_at", "checks": [check, ...]}`. Raises SettingsError without marts, ParameterError when a
    limit is wrong, psycopg.OperationalError when the marts stay away."""
    settings.require_marts()
    limits = QualityLimits.from_env()
    marts = MartWriter(settings.marts_dsn, application_name="clickstream-quality")
    # One core and so one executor: the streams beside it need theirs more.
    spark = spark_session(replace(settings, spark_cores_max=1), "clickstream-quality")
    try:
        now = datetime.now(UTC)
        found = measure(spark, settings, marts, limits, now)
        run_id = checks.store(marts, limits, now, found)
        return {
            "run_id": run_id,
            "checked_at": now.isoformat(timespec="seconds"),
            "checks": [asdict(check) for check in found],
        }
    finally:
        spark.stop()
        marts.close()
