"""gold.product_alerts: the detector's episodes, kept by a bounded job that folds each final minute of the funnel once.

The episodes are written first and the detector's state last. A run that stops in between is done again by the next one
from the same state, and the fold of the same minutes gives the same episodes, which are merged by key. Runs must not
overlap: a run takes a lock in the lake. A minute that the batch layer corrects, or publishes before the stream does,
after a later one was folded changes no episode; `rebuild` folds the whole funnel anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from delta.tables import DeltaTable
from pyspark.sql import functions as F  # noqa: N812

from clickstream.detector import Detector, Episode, Parameters, parameters
from clickstream.gold import FUNNEL_1M
from clickstream.lake import Table, locked, retry_conflicts, utc
from clickstream.marts import EVER, Mart, MartWriter, Part
from clickstream.session import spark_session

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from pyspark.sql import SparkSession

    from clickstream.settings import Settings

ALERTS = Table(
    "gold.product_alerts",
    """
    opened_at TIMESTAMP, product_id STRING, closed_at TIMESTAMP,
    views BIGINT, carts BIGINT, purchases BIGINT, interest_ratio DOUBLE, interest_z DOUBLE,
    conversion_upper DOUBLE, catalogue_rate DOUBLE, opened_date DATE
    """,
    partition_by=("opened_date",),
)
# One row: where the fold is, and what it must know to go on.
STATE = Table("gold.product_alerts_state", "state STRING, job STRING", partition_by=("job",))
TABLES = (ALERTS, STATE)

_FIGURES = (
    "opened_at",
    "product_id",
    "closed_at",
    "views",
    "carts",
    "purchases",
    "interest_ratio",
    "interest_z",
    "conversion_upper",
    "catalogue_rate",
)
_KEY = ("opened_at", "product_id")
ALERTS_MART = Mart(
    schema="gold",
    name="product_alerts",
    columns=_FIGURES,
    key=_KEY,
    ddl=(
        """CREATE TABLE IF NOT EXISTS {table} (
            opened_at        timestamptz      NOT NULL,
            product_id       text             NOT NULL,
            closed_at        timestamptz,
            views            bigint           NOT NULL,
            carts            bigint           NOT NULL,
            purchases        bigint           NOT NULL,
            interest_ratio   double precision NOT NULL,
            interest_z       double precision NOT NULL,
            conversion_upper double precision NOT NULL,
            catalogue_rate   double precision NOT NULL,
            updated_at       timestamptz      NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (opened_at, product_id)
        )""",
        "CREATE INDEX IF NOT EXISTS product_alerts_open ON {table} (opened_at) WHERE closed_at IS NULL",
        "CREATE INDEX IF NOT EXISTS product_alerts_product ON {table} (product_id, opened_at)",
    ),
    time="opened_at",
)

Minute = tuple["datetime", str, int, int, int]


def episodes(
    rows: Iterable[Minute], parameters: Parameters, state: dict[str, Any] | None = None
) -> tuple[list[Episode], dict[str, Any]]:
    """The episodes that are open or were closed in these rows, and the state after them. Pure.

    The rows are of the funnel, by minute: window_start, product_id, views, carts, purchases.
    """
    detector = Detector(parameters, state)
    for start, minute in groupby(rows, key=itemgetter(0)):
        detector.minute(start, (row[1:] for row in minute))
    return detector.episodes, detector.state


def _store(spark: SparkSession, settings: Settings, rows: list[tuple[Any, ...]], *, rebuild: bool) -> None:
    new = spark.createDataFrame([(*row, row[0].date()) for row in rows], ALERTS.schema).coalesce(1)
    path = settings.table(ALERTS.name)
    if rebuild:
        retry_conflicts(lambda: new.write.format("delta").mode("overwrite").save(path))
        return
    if not rows:
        return
    same = " AND ".join(f"old.{name} = new.{name}" for name in (*_KEY, "opened_date"))
    retry_conflicts(
        lambda: (
            DeltaTable.forPath(spark, path)
            .alias("old")
            .merge(new.alias("new"), same)
            .whenMatchedUpdateAll("old.closed_at IS NULL AND new.closed_at IS NOT NULL")
            .whenNotMatchedInsertAll()
            .execute()
        )
    )


def _save(spark: SparkSession, settings: Settings, state: dict[str, Any]) -> None:
    after = spark.createDataFrame([(json.dumps(state), "alerts")], STATE.schema).coalesce(1)
    retry_conflicts(lambda: after.write.format("delta").mode("overwrite").save(settings.table(STATE.name)))


def update(
    spark: SparkSession,
    settings: Settings,
    marts: MartWriter | None,
    limits: Parameters,
    *,
    rebuild: bool = False,
) -> list[Episode]:
    """Folds the minutes that became final since the last run; the episodes that are open or were closed in them.

    With `rebuild` it folds all minutes, and what it then finds replaces all episodes.
    """
    for table in (FUNNEL_1M.table, *TABLES):
        table.ensure(spark, settings)
    saved = None if rebuild else STATE.read(spark, settings).first()
    before = json.loads(saved["state"]) if saved else None
    following = Detector(limits, before).next
    funnel = FUNNEL_1M.table.read(spark, settings)
    if following is not None:
        funnel = funnel.where(
            (F.col("event_date") >= F.lit(following.date())) & (F.col("window_start") >= F.lit(following))
        )
    minutes = (
        (utc(row["window_start"]), row["product_id"], row["views"], row["carts"], row["purchases"])
        # A partition at a time: a first run may be over months.
        for row in funnel.select("window_start", "product_id", "views", "carts", "purchases")
        .orderBy("window_start", "product_id")
        .toLocalIterator()
    )
    found, state = episodes(minutes, limits, before)
    if state == before:
        return found
    rows = [tuple(asdict(episode)[name] for name in _FIGURES) for episode in found]
    _store(spark, settings, rows, rebuild=rebuild)
    if marts is not None:
        if rebuild:
            marts.reconcile([Part(ALERTS_MART, lambda: rows, *EVER)], swap=True)
        else:
            # No window is replaced, only keys: an episode never goes away.
            marts.replace_windows(ALERTS_MART, [], rows)
    _save(spark, settings, state)
    return found


def run(settings: Settings, *, rebuild: bool = False) -> list[dict[str, Any]]:
    """The job; ParameterError before Spark starts when a parameter is wrong, JobError when another run is there."""
    limits = parameters()
    # One core and so one executor: the streams beside it need theirs more.
    spark = spark_session(replace(settings, spark_cores_max=1), "clickstream-alerts")
    try:
        with locked(spark, settings, "alerts"):
            marts = None
            if settings.marts_dsn:
                marts = MartWriter(settings.marts_dsn, application_name="clickstream-alerts")
                marts.ensure(ALERTS_MART)
            return [asdict(episode) for episode in update(spark, settings, marts, limits, rebuild=rebuild)]
    finally:
        spark.stop()
