"""Gold: the product funnel per minute, live in a Postgres mart and final in Delta.

Every batch names the windows it touched; those windows are computed again, whole, from silver.events, and
replaced. So a replay, a duplicate delivery and a correction all end in the same figures, and no figure depends
on what an earlier batch remembered.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import StructType

from clickstream import silver
from clickstream.lake import Table, retry_conflicts
from clickstream.marts import Mart, MartWriter
from clickstream.settings import Settings, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pyspark.sql import DataFrame, Row, SparkSession
    from pyspark.sql.streaming.readwriter import DataStreamWriter

log = logging.getLogger("clickstream")

QUERY = "gold"
WINDOW = timedelta(minutes=1)
# Windows computed at once: bounds what the driver holds while it catches up.
CHUNK = 60

FUNNEL_1M = Table(
    "gold.product_funnel_1m",
    """
    window_start TIMESTAMP, window_end TIMESTAMP, product_id STRING, product_category STRING,
    views BIGINT, carts BIGINT, purchases BIGINT, revenue DECIMAL(22,2), users BIGINT, sessions BIGINT,
    last_event_at TIMESTAMP, event_date DATE
    """,
    partition_by=("event_date",),
)
TABLES = (FUNNEL_1M,)

_FIGURES = (
    "window_start",
    "window_end",
    "product_id",
    "product_category",
    "views",
    "carts",
    "purchases",
    "revenue",
    "users",
    "sessions",
    "last_event_at",
)
FUNNEL_1M_MART = Mart(
    schema="gold",
    name="product_funnel_1m",
    columns=(*_FIGURES, "is_final"),
    key=("window_start", "product_id"),
    ddl=(
        # Room in each page, because a live window is updated every few seconds.
        """CREATE TABLE IF NOT EXISTS {table} (
            window_start     timestamptz    NOT NULL,
            window_end       timestamptz    NOT NULL,
            product_id       text           NOT NULL,
            product_category text           NOT NULL,
            views            bigint         NOT NULL,
            carts            bigint         NOT NULL,
            purchases        bigint         NOT NULL,
            revenue          numeric(22, 2) NOT NULL,
            users            bigint         NOT NULL,
            sessions         bigint         NOT NULL,
            last_event_at    timestamptz    NOT NULL,
            is_final         boolean        NOT NULL,
            updated_at       timestamptz    NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (window_start, product_id)
        ) WITH (fillfactor = 70)""",
        "CREATE INDEX IF NOT EXISTS product_funnel_1m_live ON {table} (window_start) WHERE NOT is_final",
        "CREATE INDEX IF NOT EXISTS product_funnel_1m_product ON {table} (product_id, window_start)",
    ),
)


def product_funnel(events: DataFrame) -> DataFrame:
    """The funnel of each product in each minute, from silver.events. Pure.

    The distinct counts are exact: the users of one product in one minute fit in memory, and sets need one
    shuffle where count_distinct needs two and an expansion.
    """
    minute = F.date_trunc("minute", "event_time")
    kind = F.col("event_type")
    return (
        events.groupBy(minute.alias("window_start"), "product_id")
        .agg(
            # A product keeps its category; should one ever change, the latest event's name is taken.
            F.max_by("product_category", F.struct("event_time", "event_id")).alias("product_category"),
            F.count_if(kind == "view").alias("views"),
            F.count_if(kind == "add_to_cart").alias("carts"),
            F.count_if(kind == "purchase").alias("purchases"),
            F.coalesce(F.sum(F.when(kind == "purchase", F.col("price"))), F.lit(0))
            .cast("decimal(22,2)")
            .alias("revenue"),
            F.size(F.collect_set("user_id")).cast("bigint").alias("users"),
            F.size(F.collect_set("session_id")).cast("bigint").alias("sessions"),
            F.max("event_time").alias("last_event_at"),
        )
        .withColumn("window_end", F.col("window_start") + F.expr("INTERVAL 1 MINUTE"))
        .select(*_FIGURES)
    )


def in_windows(events: DataFrame, windows: Sequence[datetime]) -> DataFrame:
    """The events of these minutes. Dates and the outer bounds prune partitions and files; the set is exact."""
    dates = sorted({w.date() for w in windows})
    return events.where(
        F.col("event_date").isin(dates)
        & (F.col("event_time") >= F.lit(min(windows)))
        & (F.col("event_time") < F.lit(max(windows) + WINDOW))
        & F.date_trunc("minute", "event_time").isin(list(windows))
    )


def utc(moment: datetime) -> datetime:
    """Spark hands timestamps over in the machine's zone, naive."""
    return moment.astimezone(UTC)


class GoldWriter:
    """What the query does with a batch. Its memory is a cache: it is rebuilt from the tables at start."""

    def __init__(self, spark: SparkSession, settings: Settings, marts: MartWriter | None) -> None:
        self._spark = spark
        self._settings = settings
        self._marts = marts
        self._watermark = timedelta(seconds=seconds(settings.watermark))
        self._newest: datetime | None = None
        self._open: set[datetime] | None = None

    @property
    def newest(self) -> datetime | None:
        """The latest event time seen."""
        return self._newest

    def _minutes(self, events: DataFrame) -> tuple[set[datetime], datetime | None]:
        """The windows these events are in, and the latest event time."""
        minutes = (
            events.groupBy(F.date_trunc("minute", "event_time").alias("window_start"))
            .agg(F.max("event_time").alias("newest"))
            .collect()
        )
        return {utc(m["window_start"]) for m in minutes}, max((utc(m["newest"]) for m in minutes), default=None)

    def recover(self) -> set[datetime]:
        """The windows that are not final in both places: what a crash or an idle shop left unfinished."""
        final = FUNNEL_1M.read(self._spark, self._settings)
        last = final.agg(F.max("event_date").alias("day")).first()
        events = silver.EVENTS.read(self._spark, self._settings)
        since = None
        if last is not None and last["day"] is not None:
            # Older windows became final long ago; a correction names its own windows.
            day = last["day"] - timedelta(days=1)
            events, final = (df.where(F.col("event_date") >= F.lit(day)) for df in (events, final))
            since = datetime(day.year, day.month, day.day, tzinfo=UTC)
        known, self._newest = self._minutes(events)
        done = {utc(row["window_start"]) for row in final.select("window_start").distinct().collect()}
        unfinished = known - done
        if self._marts is not None:
            unfinished |= known - self._marts.windows(FUNNEL_1M_MART, final=True, since=since)
            unfinished |= self._marts.windows(FUNNEL_1M_MART, final=False)
        return unfinished

    def __call__(self, batch: DataFrame, batch_id: int) -> None:
        touched, newest = self._minutes(batch)
        if self._open is None:
            self._open = self.recover()
            touched |= self._open
        if newest is not None:
            self._newest = max(newest, self._newest or newest)
        if self._newest is None:
            return
        self._open |= touched
        # Silver drops what is older than this, so only a correction can still reach such a window, and it
        # comes as a batch that touches it.
        horizon = self._newest - self._watermark
        final = {w for w in self._open if w + WINDOW <= horizon}
        todo = sorted(touched | final)
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            self.refresh(chunk, [w for w in chunk if w in final])
        self._open -= final

    def refresh(self, windows: Sequence[datetime], final: Iterable[datetime]) -> None:
        """Computes these windows and replaces them: final ones in Delta, then all in the mart.

        In this order a crash in between leaves the window not final in the mart, so it is done again.
        """
        final = set(final)
        rows = product_funnel(in_windows(silver.EVENTS.read(self._spark, self._settings), windows)).collect()
        if final:
            self._replace_final([row for row in rows if utc(row["window_start"]) in final], sorted(final))
        if self._marts is not None:
            self._marts.replace_windows(
                FUNNEL_1M_MART,
                windows,
                [
                    (
                        *(utc(v) if isinstance(v, datetime) else v for v in row),
                        utc(row["window_start"]) in final,
                    )
                    for row in rows
                ],
            )

    def _replace_final(self, rows: list[Row], windows: Sequence[datetime]) -> None:
        figures = StructType(FUNNEL_1M.schema.fields[:-1])
        df = (
            self._spark.createDataFrame(
                [
                    tuple(utc(v) if isinstance(v := row[name], datetime) else v for name in figures.names)
                    for row in rows
                ],
                figures,
            )
            .withColumn("event_date", F.to_date("window_start"))
            .coalesce(1)
        )
        listed = ", ".join(f"TIMESTAMP '{w:%Y-%m-%d %H:%M:%S}Z'" for w in windows)
        dates = ", ".join(sorted({f"DATE '{w:%Y-%m-%d}'" for w in windows}))
        where = f"event_date IN ({dates}) AND window_start IN ({listed})"
        path = self._settings.table(FUNNEL_1M.name)
        retry_conflicts(lambda: df.write.format("delta").mode("overwrite").option("replaceWhere", where).save(path))


def prepare(spark: SparkSession, settings: Settings) -> MartWriter | None:
    """Tables and marts, created where missing. Without a DSN there is no mart, only Delta."""
    for table in (*silver.TABLES, *TABLES):
        table.ensure(spark, settings)
    if not settings.marts_dsn:
        log.warning("CLICKSTREAM_MARTS_DSN is not set: no Postgres mart is written")
        return None
    marts = MartWriter(settings.marts_dsn)
    marts.ensure(FUNNEL_1M_MART)
    return marts


def events_stream(spark: SparkSession, settings: Settings) -> DataFrame:
    return (
        spark.readStream.format("delta")
        # Compaction carries dataChange=false and is not seen at all; a correcting append is an append. A commit
        # that rewrites events belongs to the batch layer, which recomputes Gold for it: skip it, do not stop.
        .option("skipChangeCommits", "true")
        .option("maxFilesPerTrigger", "1000")
        .option("maxBytesPerTrigger", settings.max_bytes_per_trigger)
        .load(settings.table(silver.EVENTS.name))
        .select("event_time")
    )


def build(spark: SparkSession, settings: Settings, write: Callable[[DataFrame, int], None]) -> DataStreamWriter:
    return (
        events_stream(spark, settings)
        .writeStream.queryName(QUERY)
        .foreachBatch(write)
        .outputMode("append")
        .option("checkpointLocation", settings.checkpoint(QUERY))
        .trigger(processingTime=settings.trigger_gold)
    )
