"""gold.sessions: one row for each visit, from silver.events; the batch layer's, by `clickstream recompute`.

A visit is the events of one user and session between which nothing is silent for half an hour: an event that comes
GAP or more after its neighbour begins the next visit. So whether an event begins a visit takes no more than the GAP
before it to know. A visit's row counts its events of LONGEST from its start; a robot that never pauses makes one visit,
of which the rest is not counted. So a row takes no more than LONGEST after its start to know, and is the same
whatever range it is computed in.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from pyspark.sql import Window
from pyspark.sql import functions as F  # noqa: N812

from clickstream.gold import counts
from clickstream.lake import Table
from clickstream.marts import Mart

if TYPE_CHECKING:
    from datetime import datetime

    from pyspark.sql import Column, DataFrame

GAP = timedelta(minutes=30)
LONGEST = timedelta(hours=24)

_FIGURES = (
    "session_start",
    "session_end",
    "user_id",
    "session_id",
    "device_type",
    "events",
    "views",
    "carts",
    "purchases",
    "revenue",
    "stage",
    "duration_seconds",
    "first_product_id",
    "last_product_id",
)
TABLE = Table(
    "gold.sessions",
    """
    session_start TIMESTAMP, session_end TIMESTAMP, user_id STRING, session_id STRING, device_type STRING,
    events BIGINT, views BIGINT, carts BIGINT, purchases BIGINT, revenue DECIMAL(22,2), stage STRING,
    duration_seconds DOUBLE, first_product_id STRING, last_product_id STRING, event_date DATE
    """,
    partition_by=("event_date",),
)
MART = Mart(
    schema="gold",
    name="sessions",
    columns=_FIGURES,
    key=("session_start", "user_id", "session_id"),
    ddl=(
        """CREATE TABLE IF NOT EXISTS {table} (
            session_start    timestamptz      NOT NULL,
            session_end      timestamptz      NOT NULL,
            user_id          text             NOT NULL,
            session_id       text             NOT NULL,
            device_type      text             NOT NULL,
            events           bigint           NOT NULL,
            views            bigint           NOT NULL,
            carts            bigint           NOT NULL,
            purchases        bigint           NOT NULL,
            revenue          numeric(22, 2)   NOT NULL,
            stage            text             NOT NULL CHECK (stage IN ('view', 'cart', 'purchase')),
            duration_seconds double precision NOT NULL,
            first_product_id text             NOT NULL,
            last_product_id  text             NOT NULL,
            updated_at       timestamptz      NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (session_start, user_id, session_id)
        )""",
        "CREATE INDEX IF NOT EXISTS sessions_user ON {table} (user_id, session_start)",
    ),
    time="session_start",
)


def sessions(events: DataFrame) -> DataFrame:
    """The visits these events make. Pure; of events at the same instant the lower event_id is the earlier one.

    The device and the first product are those of the first event. The stage is the furthest one reached.
    """
    visitor = ("user_id", "session_id")
    order = Window.partitionBy(*visitor).orderBy("event_time", "event_id")
    at = F.unix_micros("event_time")
    pause = at - F.lag(at).over(order)
    begins = F.when(pause < F.lit(GAP // timedelta(microseconds=1)), 0).otherwise(1)
    place = F.struct("event_time", "event_id")
    return (
        events.withColumn("begins", begins)
        .withColumn("visit", F.sum("begins").over(order.rowsBetween(Window.unboundedPreceding, Window.currentRow)))
        .withColumn("session_start", F.min("event_time").over(Window.partitionBy(*visitor, "visit")))
        .where(F.col("event_time") < F.col("session_start") + F.lit(LONGEST))
        .groupBy(*visitor, "session_start")
        .agg(
            F.max("event_time").alias("session_end"),
            F.min_by("device_type", place).alias("device_type"),
            F.count("*").alias("events"),
            *counts(),
            F.min_by("product_id", place).alias("first_product_id"),
            F.max_by("product_id", place).alias("last_product_id"),
        )
        .withColumn(
            "stage", F.when(F.col("purchases") > 0, "purchase").when(F.col("carts") > 0, "cart").otherwise("view")
        )
        .withColumn(
            "duration_seconds", (F.unix_micros("session_end") - F.unix_micros("session_start")) / F.lit(1_000_000)
        )
        .select(*_FIGURES)
    )


def starting(visits: DataFrame, start: datetime, end: datetime) -> DataFrame:
    """The visits that begin in a range; the events they were made of reach from GAP before it to LONGEST after it."""
    return visits.where((F.col("session_start") >= F.lit(start)) & (F.col("session_start") < F.lit(end)))


def ended(horizon: datetime) -> Column:
    """Whether no event after the horizon can still change a visit."""
    return (F.col("session_end") <= F.lit(horizon - GAP)) | (F.col("session_start") <= F.lit(horizon - LONGEST))
