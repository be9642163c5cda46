"""Gold's windows: the product funnel per minute and per hour, and conversion per hour; live in Postgres marts and
final in Delta.

Every batch names the windows it touched. Those that are final are computed again, whole, from silver.events, and
replaced, so a replay, a duplicate delivery and a correction all end in the same figures, and no final figure depends on
what an earlier batch remembered. A live window is what its batches add up to (`live`) as long as these bring its events
in order; else it is computed whole, too. What a backfill moves is no batch: live windows show it when they are final.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import StructType

from clickstream import metrics, silver
from clickstream.lake import Table, utc
from clickstream.live import Groups, LiveWindows, Partition, Shares, Touched, touched, up_to
from clickstream.marts import Mart, MartWriter
from clickstream.session import unwritten
from clickstream.settings import Settings, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pyspark.sql import Column, DataFrame, Row, SparkSession
    from pyspark.sql.streaming.readwriter import DataStreamReader, DataStreamWriter

log = logging.getLogger("clickstream")

# The minutes are the path of low latency. The hours, which are more work, have a query of their own that looks for new
# rows less often.
QUERY = "gold"
HOURLY_QUERY = "gold_hourly"
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MONEY = "decimal(22,2)"
# How Spark computes minutes: a whole stage's code would have the windows in it, and be compiled to run once.
MINUTES_SQL = {"spark.sql.codegen.wholeStage": "false"}
# And hours: in tasks that are soon done, because whoever goes first has to wait for the end of one that runs.
HOURS_SQL = {
    "spark.sql.files.maxPartitionBytes": "16m",
    "spark.sql.files.openCostInBytes": "128k",
    "spark.sql.shuffle.partitions": "4",
}
# Windows computed at once, and events added to live windows at once: bounds what the driver holds while it catches up.
CHUNK = 60
ADDED = 2_000_000
# Each part of so many reads all of the events. Of more than these, whole windows are sooner computed by Spark.
FOLLOWED = 4 * ADDED


@dataclass(frozen=True)
class Windowed:
    """A Gold table of windows: where it is kept, how long a window is, and what makes its rows.

    `figures` is pure: silver.events to the mart's columns without `is_final`, in their order; `shares` makes the same
    of parts of the events. Windows begin at whole multiples of `length` since the epoch, so a length divides a day.
    """

    table: Table
    mart: Mart
    length: timedelta
    figures: Callable[[DataFrame], DataFrame]
    shares: Shares


def window_start(length: timedelta) -> Column:
    """The start of an event's window; counted from the epoch, so the session's time zone does not matter."""
    at = F.unix_seconds("event_time")
    return F.timestamp_seconds(at - F.pmod(at, F.lit(int(length.total_seconds()))))


_FUNNEL = (
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


_CONVERSION = (
    "window_start",
    "window_end",
    "dimension",
    "value",
    "views",
    "carts",
    "purchases",
    "revenue",
    "sessions_with_view",
    "sessions_converted",
    "purchases_per_view",
    "session_conversion",
)


def counts() -> list[Column]:
    """What is counted of any group of events: views, carts, purchases and revenue."""
    kind = F.col("event_type")
    return [
        F.count_if(kind == "view").alias("views"),
        F.count_if(kind == "add_to_cart").alias("carts"),
        F.count_if(kind == "purchase").alias("purchases"),
        F.coalesce(F.sum(F.when(kind == "purchase", F.col("price"))), F.lit(0)).cast(MONEY).alias("revenue"),
    ]


def product_funnel(events: DataFrame, length: timedelta = MINUTE) -> DataFrame:
    """The funnel of each product in each window, from silver.events. Pure.

    A product keeps its category; should one ever change, the latest event's name is taken, of several at one moment
    the greatest. The distinct counts are exact: the users of one product in one minute fit in memory, and sets need
    one shuffle where count_distinct needs two and an expansion. Longer windows take the latter, which can spill.
    """
    window = window_start(length).alias("window_start")
    figures = [*counts(), F.max("event_time").alias("last_event_at")]
    if length > MINUTE:
        figures += [F.count_distinct("user_id").alias("users"), F.count_distinct("session_id").alias("sessions")]
        # Apart, because max_by keeps a string, for which Spark would sort all of the events.
        names = events.groupBy(window, "product_id", "product_category").agg(F.max("event_time").alias("at"))
        names = names.groupBy("window_start", "product_id").agg(_latest_name("at"))
        funnel = events.groupBy(window, "product_id").agg(*figures).join(names, ["window_start", "product_id"])
    else:
        sets = (("user_id", "users"), ("session_id", "sessions"))
        figures += [F.size(F.collect_set(column)).cast("bigint").alias(name) for column, name in sets]
        funnel = events.groupBy(window, "product_id").agg(_latest_name("event_time"), *figures)
    return funnel.withColumn("window_end", F.col("window_start") + F.lit(length)).select(*_FUNNEL)


def _latest_name(moment: str) -> Column:
    return F.max_by("product_category", F.struct(moment, "product_category")).alias("product_category")


COUNTS = ("views", "carts", "purchases", "revenue")


def _funnel_shares(events: DataFrame, window: Column) -> DataFrame:
    # By category too, since the greatest of a struct with a string in it costs more than all else.
    shares = events.groupBy(window, "product_id", "product_category").agg(
        *counts(),
        F.max(F.unix_micros("event_time")).alias("at"),
        F.collect_set(F.xxhash64("user_id")).alias("users"),
        F.collect_set(F.xxhash64("session_id")).alias("sessions"),
    )
    return shares.withColumn("latest", F.struct("at", "product_category"))


def _funnel_figures(groups: Groups) -> Iterator[dict[str, Any]]:
    for (product,), values in groups.items():
        micros, category = values["latest"]
        yield {
            "product_id": product,
            "product_category": category,
            **{name: values[name] for name in COUNTS},
            "users": len(values["users"]),
            "sessions": len(values["sessions"]),
            "last_event_at": EPOCH + timedelta(microseconds=micros),
        }


FUNNEL_SHARES = Shares(
    of=_funnel_shares,
    key=("product_id",),
    sums=COUNTS,
    greatest=("latest",),
    sets=("users", "sessions"),
    figures=_funnel_figures,
)


def conversion(events: DataFrame, length: timedelta = HOUR) -> DataFrame:
    """Conversion in each window by category and by device, from silver.events, defined in two ways. Pure.

    - `purchases_per_view`: purchases / views. It may exceed 1, and is null without a view.
    - `session_conversion`: sessions_converted / sessions_with_view, from 0 to 1, null without such a session. A session
      is a pair of user_id and session_id. Its events of one window and one value (a category or a device) are looked
      at alone, in any order: it is counted in `sessions_with_view` when a view is among them, and in
      `sessions_converted` when both a view and a purchase are. So a session may count in several windows and
      categories, and one whose view was in another hour does not convert in this one.
    """
    dimensions = F.array(
        F.struct(F.lit("category").alias("dimension"), F.col("product_category").alias("value")),
        F.struct(F.lit("device").alias("dimension"), F.col("device_type").alias("value")),
    )
    sessions = (
        events.withColumn("by", F.explode(dimensions))
        .groupBy(window_start(length).alias("window_start"), "by.dimension", "by.value", "user_id", "session_id")
        .agg(*counts())
    )
    seen = F.col("views") > 0
    return (
        sessions.groupBy("window_start", "dimension", "value")
        .agg(
            *(F.sum(name).alias(name) for name in ("views", "carts", "purchases")),
            F.sum("revenue").cast(MONEY).alias("revenue"),
            F.count_if(seen).alias("sessions_with_view"),
            F.count_if(seen & (F.col("purchases") > 0)).alias("sessions_converted"),
        )
        .withColumn("window_end", F.col("window_start") + F.lit(length))
        .withColumn("purchases_per_view", F.try_divide("purchases", "views"))
        .withColumn("session_conversion", F.try_divide("sessions_converted", "sessions_with_view"))
        .select(*_CONVERSION)
    )


def _conversion_shares(events: DataFrame, window: Column) -> DataFrame:
    # By pairs of category and device: each event once, and not once for its category and once for its device.
    session = F.xxhash64("user_id", "session_id")
    kind = F.col("event_type")
    return events.groupBy(window, "product_category", "device_type").agg(
        *counts(),
        F.collect_set(F.when(kind == "view", session)).alias("seen"),
        F.collect_set(F.when(kind == "purchase", session)).alias("bought"),
    )


def _conversion_figures(groups: Groups) -> Iterator[dict[str, Any]]:
    for place, dimension in enumerate(("category", "device")):
        by_value: dict[str, list[Mapping[str, Any]]] = {}
        for key, values in groups.items():
            by_value.setdefault(key[place], []).append(values)
        for value, parts in by_value.items():
            sums = {name: sum(part[name] for part in parts) for name in COUNTS}
            seen, bought = (np.unique(np.concatenate([part[name] for part in parts])) for name in ("seen", "bought"))
            converted = len(np.intersect1d(seen, bought, assume_unique=True))
            yield {
                "dimension": dimension,
                "value": value,
                **sums,
                "sessions_with_view": len(seen),
                "sessions_converted": converted,
                "purchases_per_view": sums["purchases"] / sums["views"] if sums["views"] else None,
                "session_conversion": converted / len(seen) if len(seen) else None,
            }


CONVERSION_SHARES = Shares(
    of=_conversion_shares,
    key=("product_category", "device_type"),
    sums=COUNTS,
    greatest=(),
    sets=("seen", "bought"),
    figures=_conversion_figures,
)


def _funnel(name: str, length: timedelta) -> Windowed:
    return Windowed(
        Table(
            f"gold.{name}",
            """
            window_start TIMESTAMP, window_end TIMESTAMP, product_id STRING, product_category STRING,
            views BIGINT, carts BIGINT, purchases BIGINT, revenue DECIMAL(22,2), users BIGINT, sessions BIGINT,
            last_event_at TIMESTAMP, event_date DATE
            """,
            partition_by=("event_date",),
        ),
        Mart(
            schema="gold",
            name=name,
            columns=(*_FUNNEL, "is_final"),
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
                f"CREATE INDEX IF NOT EXISTS {name}_live ON {{table}} (window_start) WHERE NOT is_final",
                f"CREATE INDEX IF NOT EXISTS {name}_product ON {{table}} (product_id, window_start)",
            ),
        ),
        length,
        lambda events: product_funnel(events, length),
        FUNNEL_SHARES,
    )


FUNNEL_1M = _funnel("product_funnel_1m", MINUTE)
FUNNEL_1H = _funnel("product_funnel_1h", HOUR)
CONVERSION_1H = Windowed(
    Table(
        "gold.conversion_1h",
        """
        window_start TIMESTAMP, window_end TIMESTAMP, dimension STRING, value STRING,
        views BIGINT, carts BIGINT, purchases BIGINT, revenue DECIMAL(22,2),
        sessions_with_view BIGINT, sessions_converted BIGINT,
        purchases_per_view DOUBLE, session_conversion DOUBLE, event_date DATE
        """,
        partition_by=("event_date",),
    ),
    Mart(
        schema="gold",
        name="conversion_1h",
        columns=(*_CONVERSION, "is_final"),
        key=("window_start", "dimension", "value"),
        ddl=(
            """CREATE TABLE IF NOT EXISTS {table} (
                window_start       timestamptz      NOT NULL,
                window_end         timestamptz      NOT NULL,
                dimension          text             NOT NULL CHECK (dimension IN ('category', 'device')),
                value              text             NOT NULL,
                views              bigint           NOT NULL,
                carts              bigint           NOT NULL,
                purchases          bigint           NOT NULL,
                revenue            numeric(22, 2)   NOT NULL,
                sessions_with_view bigint           NOT NULL,
                sessions_converted bigint           NOT NULL,
                purchases_per_view double precision,
                session_conversion double precision,
                is_final           boolean          NOT NULL,
                updated_at         timestamptz      NOT NULL DEFAULT clock_timestamp(),
                PRIMARY KEY (window_start, dimension, value)
            ) WITH (fillfactor = 70)""",
            "CREATE INDEX IF NOT EXISTS conversion_1h_live ON {table} (window_start) WHERE NOT is_final",
            "CREATE INDEX IF NOT EXISTS conversion_1h_value ON {table} (dimension, value, window_start)",
        ),
    ),
    HOUR,
    conversion,
    CONVERSION_SHARES,
)
WINDOWED = (FUNNEL_1M, FUNNEL_1H, CONVERSION_1H)
# What each query keeps.
QUERIES = {QUERY: (FUNNEL_1M,), HOURLY_QUERY: (FUNNEL_1H, CONVERSION_1H)}
TABLES = tuple(windowed.table for windowed in WINDOWED)


def in_windows(events: DataFrame, windows: Sequence[datetime], length: timedelta) -> DataFrame:
    """The events of these windows, of a table. Dates and the outer bounds prune partitions and files."""
    dates = sorted({w.date() for w in windows})
    return among(
        events.where(
            F.col("event_date").isin(dates)
            & (F.col("event_time") >= F.lit(min(windows)))
            & (F.col("event_time") < F.lit(max(windows) + length))
        ),
        windows,
        length,
    )


def among(events: DataFrame, windows: Iterable[datetime], length: timedelta) -> DataFrame:
    """The events of these windows."""
    return events.where(F.array_contains(unwritten(*map(F.lit, windows)), window_start(length)))


def in_utc(row: Row) -> tuple[Any, ...]:
    """A row's values, its timestamps with their zone."""
    return tuple(utc(value) if isinstance(value, datetime) else value for value in row)


def timestamp(moment: datetime) -> str:
    """A moment as a literal of SQL."""
    return f"TIMESTAMP '{moment:%Y-%m-%d %H:%M:%S}Z'"


class GoldWriter:
    """What a query does with a batch, for tables of one window length. Its memory is a cache: it is rebuilt from the
    tables at start."""

    def __init__(
        self,
        spark: SparkSession,
        settings: Settings,
        marts: MartWriter | None,
        tables: Sequence[Windowed] = (FUNNEL_1M,),
    ) -> None:
        (self._length,) = {windowed.length for windowed in tables}
        self._spark = spark.newSession()
        for name, value in (MINUTES_SQL if self._length == MINUTE else HOURS_SQL).items():
            self._spark.conf.set(name, value)
        self._settings = settings
        self._marts = marts
        self._tables = tables
        self._watermark = timedelta(seconds=seconds(settings.watermark))
        self._newest: datetime | None = None
        self._open: set[datetime] | None = None
        self._live: dict[str, LiveWindows] = {}
        # The greatest offsets that the stream may have brought: beyond them is what it will bring.
        self._brought: dict[Partition, int] = {}
        # Live windows, by table, that are too large to be followed: computed by Spark each time.
        self._large: set[tuple[str, datetime]] = set()

    @property
    def newest(self) -> datetime | None:
        """The latest event time seen."""
        return self._newest

    @property
    def _window(self) -> Column:
        return window_start(self._length)

    def recover(self) -> set[datetime]:
        """The windows that are not final in every place: what a crash or an idle shop left unfinished."""
        finals = [windowed.table.read(self._spark, self._settings) for windowed in self._tables]
        days = [row["day"] for final in finals for row in final.agg(F.max("event_date").alias("day")).collect()]
        events = silver.EVENTS.read(self._spark, self._settings)
        since = None
        if None not in days:
            # Older windows became final long ago; a correction names its own windows.
            day = min(days) - timedelta(days=1)
            events, *finals = (df.where(F.col("event_date") >= F.lit(day)) for df in (events, *finals))
            since = datetime(day.year, day.month, day.day, tzinfo=UTC)
        known = touched(events, self._window)
        self._newest = max((window.newest for window in known.values()), default=None)
        self._bring(known)
        unfinished: set[datetime] = set()
        for windowed, final in zip(self._tables, finals, strict=True):
            unfinished |= known.keys() - {
                utc(row["window_start"]) for row in final.select("window_start").distinct().collect()
            }
            if self._marts is not None:
                unfinished |= known.keys() - self._marts.windows(windowed.mart, final=True, since=since)
                unfinished |= self._marts.windows(windowed.mart, final=False)
            self._live[windowed.table.name] = LiveWindows(
                windowed.shares, self._length, self._settings.live_entries, until=max(known, default=None)
            )
        return unfinished

    def _bring(self, windows: Mapping[datetime, Touched]) -> None:
        for window in windows.values():
            for partition, offset in window.last.items():
                self._brought[partition] = max(offset, self._brought.get(partition, offset))

    def __call__(self, batch: DataFrame, batch_id: int) -> None:
        new = touched(batch, self._window)
        due = set(new)
        if self._open is None:
            self._open = self.recover()
            due |= self._open
        self._bring(new)
        if new:
            newest = max(window.newest for window in new.values())
            self._newest = max(newest, self._newest or newest)
        if self._newest is None:
            return
        self._open |= due
        # Silver drops what is older than this, so only a correction can still reach such a window, and it
        # comes as a batch that touches it.
        horizon = self._newest - self._watermark
        final = {w for w in self._open if w + self._length <= horizon}
        # The live ones first: whoever looks at the newest window does not wait for the archive of the others.
        for windowed in self._tables:
            followed = self._follow(windowed, batch, {w: new[w] for w in new.keys() - final})
            self._refresh(windowed, due - final - followed, final=False)
        for windowed in self._tables:
            self._refresh(windowed, final, final=True)
        self._open -= final
        self._large = {(table, window) for table, window in self._large if window not in final}

    def _follow(self, windowed: Windowed, batch: DataFrame, new: Mapping[datetime, Touched]) -> set[datetime]:
        """Adds the batch to the live windows it goes on with, and writes them; which these are."""
        live = self._live[windowed.table.name]
        windows = {w for w, batch_of in new.items() if live.follows(w, batch_of)}
        count = sum(new[w].events for w in windows)
        if count > FOLLOWED:
            return set()
        if windows:
            events = among(batch, windows, self._length)
            self._add(windowed, live, {w: new[w].last for w in windows}, events, count)
            self._serve(windowed, live, windows)
        return windows

    def _add(
        self,
        windowed: Windowed,
        live: LiveWindows,
        last: Mapping[datetime, Mapping[Partition, int]],
        events: DataFrame,
        count: int,
    ) -> None:
        """Adds so many events to their windows; the query ends when it fails amid them, and so does what was added."""
        parts = max(1, -(-count // ADDED))
        for part in range(parts):
            some = events if parts == 1 else events.where(F.col("offset") % parts == part)
            live.add(last, windowed.shares.rows(some, self._window))

    def _serve(self, windowed: Windowed, live: LiveWindows, windows: Iterable[datetime]) -> None:
        """Writes followed windows to the mart."""
        if self._marts is not None:
            windows = sorted(windows)
            columns = windowed.mart.columns[:-1]
            rows = [(*(row[name] for name in columns), False) for window in windows for row in live.rows(window)]
            self._marts.replace_windows(windowed.mart, windows, rows)
            metrics.ROWS_WRITTEN.labels(windowed.table.name).inc(len(rows))
        self._large |= {(windowed.table.name, window) for window in live.trim()}

    def _refresh(self, windowed: Windowed, windows: Iterable[datetime], *, final: bool) -> None:
        """Takes these windows whole from silver.events and replaces them."""
        todo = sorted(windows)
        if not todo:
            return
        live = self._live[windowed.table.name]
        for window in todo:
            live.forget(window)
        if not final:
            followed = self._take_up(windowed, live, todo)
            todo = [window for window in todo if window not in followed]
        for start in range(0, len(todo), CHUNK):
            self._compute(windowed, todo[start : start + CHUNK], final=final)

    def _take_up(self, windowed: Windowed, live: LiveWindows, windows: Sequence[datetime]) -> set[datetime]:
        """Follows windows by what the table has of them, and writes them; which these are: not those with too much."""
        table = windowed.table.name
        windows = [window for window in windows if (table, window) not in self._large]
        if not windows:
            return set()
        # What the stream has yet to bring is left to it. What it may have brought, but not in order, is here or not:
        # each look at the table may be at another version of it. Brought later, it makes the window be taken up again.
        events = up_to(self._events(windows), self._brought)
        found = {window: of.events for window, of in touched(events, self._window).items()}
        self._large |= {(table, window) for window, count in found.items() if count > FOLLOWED}
        count = sum(found.values())
        if count > FOLLOWED:
            return set()
        self._add(windowed, live, dict.fromkeys(windows, self._brought), events, count)
        self._serve(windowed, live, windows)
        return set(windows)

    def _events(self, windows: Sequence[datetime]) -> DataFrame:
        return in_windows(silver.EVENTS.read(self._spark, self._settings), windows, self._length)

    def _compute(self, windowed: Windowed, windows: Sequence[datetime], *, final: bool) -> None:
        """Computes these windows and replaces them: final ones in Delta, then all in the mart.

        In this order a crash in between leaves the window not final in the mart, so it is done again.
        """
        rows = [in_utc(row) for row in windowed.figures(self._events(windows)).collect()]
        if final:
            self._archive(windowed.table, rows, windows)
        if self._marts is not None:
            self._marts.replace_windows(windowed.mart, windows, [(*row, final) for row in rows])
        metrics.ROWS_WRITTEN.labels(windowed.table.name).inc(len(rows))

    def _archive(self, table: Table, rows: list[tuple[Any, ...]], windows: Sequence[datetime]) -> None:
        figures = StructType(table.schema.fields[:-1])
        df = self._spark.createDataFrame(rows, figures).withColumn("event_date", F.to_date("window_start")).coalesce(1)
        listed = ", ".join(map(timestamp, windows))
        dates = ", ".join(sorted({f"DATE '{w:%Y-%m-%d}'" for w in windows}))
        table.replace(df, self._settings, f"event_date IN ({dates}) AND window_start IN ({listed})")


def prepare(spark: SparkSession, settings: Settings, tables: Sequence[Windowed] = (FUNNEL_1M,)) -> MartWriter | None:
    """Tables and marts, created where missing. Without a DSN there is no mart, only Delta."""
    for table in (silver.EVENTS, *(windowed.table for windowed in tables)):
        table.ensure(spark, settings)
    if not settings.marts_dsn:
        log.warning("CLICKSTREAM_MARTS_DSN is not set: no Postgres mart is written")
        return None
    marts = MartWriter(settings.marts_dsn)
    for windowed in tables:
        marts.ensure(windowed.mart)
    return marts


def _stream(spark: SparkSession) -> DataStreamReader:
    return (
        spark.readStream.format("delta")
        # Compaction carries dataChange=false and is not seen at all; a correcting append is an append. A commit
        # that rewrites events belongs to the batch layer, which recomputes Gold for it: skip it, do not stop.
        .option("skipChangeCommits", "true")
        .option("maxFilesPerTrigger", "1000")
    )


def build(
    spark: SparkSession, settings: Settings, write: Callable[[DataFrame, int], None], query: str = QUERY
) -> DataStreamWriter:
    stream, trigger = _stream(spark), settings.trigger_gold_hourly
    if query == QUERY:
        # Only here: a limit of bytes for each minute would be a limit of events a second.
        stream, trigger = stream.option("maxBytesPerTrigger", settings.max_bytes_per_trigger), settings.trigger_gold
    return (
        stream.load(settings.table(silver.EVENTS.name))
        .writeStream.queryName(query)
        .foreachBatch(write)
        .outputMode("append")
        .option("checkpointLocation", settings.checkpoint(query))
        .trigger(processingTime=trigger)
    )
