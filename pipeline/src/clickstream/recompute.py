"""The bounded job of the batch layer: computes Gold for a range again from silver.events, and repairs what differs.

Every table is computed beside the one that is served, compared with it in both places (Delta and the mart), and then
takes its place: in Delta in one commit a table, in Postgres in one transaction for all marts. Rows that are the same
are not written, so a second run finds and changes nothing. With a limit of differences, everything is compared before
anything is written, and beyond the limit nothing is.

It is safe beside the streams. It computes final windows only, in which Silver's stream does not add anything any more;
the accounting job does, so a run holds that job's lock too. A crash between the two places is repaired by running
again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F  # noqa: N812

from clickstream import account, gold, sessions, silver
from clickstream.errors import JobError
from clickstream.lake import Table, latest, locked, utc
from clickstream.marts import NAMED, Difference, Mart, MartWriter, Part
from clickstream.session import spark_session
from clickstream.settings import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyspark.sql import Column, DataFrame, SparkSession

    from clickstream.settings import Settings

log = logging.getLogger("clickstream")

LOCK = "recompute"


@dataclass(frozen=True)
class Span:
    """Whole hours, the end not included."""

    start: datetime
    end: datetime


@dataclass(frozen=True)
class Target:
    """A Gold table: where it is served, and what its rows are for a span.

    `rows` is given silver.events and the span; its columns are the table's without the date. `settled`, given the
    horizon before which nothing changes any more, tells which rows are final; None is all of them. `before` and `after`
    are how far from a span rows begin that its events can change. `streamed` is whether a stream keeps the table too:
    if not, rows that are missing are what a run is for, and nothing for a gate to stop at.
    """

    table: Table
    mart: Mart
    rows: Callable[[DataFrame, Span], DataFrame]
    settled: Callable[[datetime], Column] | None = None
    before: timedelta = timedelta(0)
    after: timedelta = timedelta(0)
    streamed: bool = True

    def reach(self, span: Span) -> Span:
        """Where all rows begin that the span's events can change."""
        return Span(span.start - self.before, span.end + self.after)

    def within(self, rows: DataFrame, span: Span) -> DataFrame:
        return rows.where(self.where(span))

    def where(self, span: Span) -> str:
        """The condition on the Delta table; the dates name its partitions."""
        last = span.end - timedelta(microseconds=1)
        return (
            f"event_date >= DATE '{span.start:%Y-%m-%d}' AND event_date <= DATE '{last:%Y-%m-%d}' "
            f"AND {self.mart.time} >= {gold.timestamp(span.start)} AND {self.mart.time} < {gold.timestamp(span.end)}"
        )


def _windowed(windowed: gold.Windowed) -> Target:
    return Target(
        windowed.table,
        windowed.mart,
        lambda events, span: windowed.figures(silver.between(events, span.start, span.end)),
    )


def _sessions(events: DataFrame, span: Span) -> DataFrame:
    # An event's visit began at most GAP before the span if it began outside, and ends at most LONGEST after it.
    read = silver.between(events, span.start - sessions.GAP, span.end + sessions.LONGEST)
    return sessions.starting(sessions.sessions(read), span.start, span.end)


TARGETS = {
    target.table.name: target
    for target in (
        *map(_windowed, gold.WINDOWED),
        Target(
            # An event can lengthen a visit that began LONGEST before it, and join one that begins within the GAP.
            sessions.TABLE,
            sessions.MART,
            _sessions,
            sessions.ended,
            before=sessions.LONGEST,
            after=sessions.GAP,
            streamed=False,
        ),
    )
}


@dataclass(frozen=True)
class Line:
    """How what is served of a table in one place differed from what the events say."""

    table: str
    place: str
    rows: int
    missing: int
    surplus: int
    differing: int
    first: list[str]

    @property
    def differences(self) -> int:
        return self.missing + self.surplus + self.differing

    @property
    def unexpected(self) -> int:
        """Those that a gate counts."""
        return self.differences - (0 if TARGETS[self.table].streamed else self.missing)

    @classmethod
    def of(cls, target: Target, place: str, rows: int, found: Difference) -> Line:
        named = [
            ", ".join(
                value.astimezone(UTC).isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)
                for value in key
            )
            for key in found.keys
        ]
        return cls(target.table.name, place, rows, found.missing, found.surplus, found.differing, named)


@dataclass(frozen=True)
class Report:
    """`end` is before the end that was asked for when the last hours are not final yet; `left_out` counts the rows of
    the hours before it that may still change: visits that may go on. `refused`: more differences than were allowed."""

    start: str
    end: str
    asked: str
    swapped: bool
    left_out: int
    lines: list[Line]
    refused: bool = False

    @property
    def differences(self) -> int:
        return sum(line.differences for line in self.lines)

    @property
    def unexpected(self) -> int:
        return sum(line.unexpected for line in self.lines)


def horizon(spark: SparkSession, settings: Settings) -> datetime:
    """The streams add nothing to windows that end before this.

    A watermark behind the newest event, and not beyond the watermark that Silver's stream had in its last batch: the
    next one still lets events pass by that one (SPARK-40925).
    """
    events = silver.EVENTS.read(spark, settings)
    day = events.agg(F.max("event_date").alias("day")).first()
    if day is None or day["day"] is None:
        raise JobError(f"silver.events has no events in {settings.lake_uri}; is it the lake?")
    newest = events.where(F.col("event_date") == F.lit(day["day"])).agg(F.max("event_time").alias("newest")).first()
    assert newest is not None
    behind = utc(newest["newest"]) - timedelta(seconds=seconds(settings.watermark))
    reached = account.watermark(spark, settings, silver.QUERY)
    return behind if reached is None else min(behind, reached)


def final(span: Span, horizon: datetime) -> Span:
    """The hours of a span that end before the horizon; JobError when there is none."""
    last = horizon.replace(minute=0, second=0, microsecond=0)
    if last <= span.start:
        raise JobError(
            f"no hour from {span.start:%Y-%m-%dT%H:%MZ} is final: the streams may still add to what comes after "
            f"{horizon:%Y-%m-%dT%H:%M:%SZ}, a watermark behind the newest event; choose an earlier range"
        )
    return Span(span.start, min(span.end, last))


def compare(served: DataFrame, computed: DataFrame, key: Sequence[str]) -> Difference:
    """How rows with unique keys differ. Pure but for counting."""
    figures = [name for name in computed.columns if name not in key]
    old = served.select(*key, F.struct(*figures).alias("old"))
    new = computed.select(*key, F.struct(*figures).alias("new"))
    matches = reduce(and_, (F.col(f"l.{name}").eqNullSafe(F.col(f"r.{name}")) for name in key))
    found = (
        old.alias("l")
        .join(new.alias("r"), matches, "full_outer")
        .where(~F.col("old").eqNullSafe(F.col("new")))
        .select(
            *(F.coalesce(f"l.{name}", f"r.{name}").alias(name) for name in key),
            F.col("old").isNull().alias("missing"),
            F.col("new").isNull().alias("surplus"),
        )
    )
    counted = found.groupBy("missing", "surplus").count().collect()
    counts = {(row["missing"], row["surplus"]): row["count"] for row in counted}
    named = found.select(*key).orderBy(*key).limit(NAMED).collect() if counts else []
    return Difference(
        counts.get((True, False), 0),
        counts.get((False, True), 0),
        counts.get((False, False), 0),
        [gold.in_utc(row) for row in named],
    )


def recompute(
    spark: SparkSession,
    settings: Settings,
    asked: Span,
    names: Sequence[str] = tuple(TARGETS),
    *,
    dry_run: bool = False,
    max_differences: int | None = None,
) -> Report:
    """Computes these tables again for the final hours of a span; unless it is a dry run, repairs what differs.

    With `max_differences`, more differing rows than that, of Delta and the marts together, are not repaired; visits
    that are there for the first time do not count.
    """
    targets = [TARGETS[name] for name in names]
    for table in (silver.EVENTS, *(target.table for target in targets)):
        table.ensure(spark, settings)
    until = horizon(spark, settings)
    span = final(asked, until)
    # One version for all, so that the tables agree with each other.
    version = latest(spark, settings.table(silver.EVENTS.name)).version()
    events = silver.EVENTS.read(spark, settings, version)
    lines: list[Line] = []
    left_out = 0
    with contextlib.ExitStack() as stack:
        shadows: list[tuple[Target, DataFrame, int]] = []
        for target in targets:
            began = time.monotonic()
            scope = target.reach(span)
            computed = target.rows(events, scope).persist()
            stack.callback(computed.unpersist)
            shadow = computed.where(target.settled(until)) if target.settled else computed
            shadows.append((target, shadow, shadow.count()))
            left_out += computed.count() - shadows[-1][2] if target.settled else 0
            found = compare(target.within(target.table.read(spark, settings), scope), shadow, target.mart.key)
            lines.append(Line.of(target, "delta", shadows[-1][2], found))
            log.info("%s: %d rows in %.1f s", target.table.name, shadows[-1][2], time.monotonic() - began)
        differing = [line.differences > 0 for line in lines]
        parts = []
        if settings.marts_dsn:
            marts = MartWriter(settings.marts_dsn, application_name="clickstream-recompute")
            stack.callback(marts.close)
            for target in targets:
                marts.ensure(target.mart)
            for target, shadow, _ in shadows:
                kept = _kept(target.reach(span), marts.kept_since(target.mart, settings.mart_retention_days))
                parts.append(Part(target.mart, _reader(target, shadow, kept), kept.start, kept.end))
        else:
            log.warning("CLICKSTREAM_MARTS_DSN is not set: no Postgres mart is compared")

        def reconcile(*, swap: bool) -> list[Line]:
            if not parts:
                return []
            found = zip(shadows, marts.reconcile(parts, swap=swap), strict=True)
            return [Line.of(target, "mart", rows, one) for (target, _, rows), one in found]

        in_marts = reconcile(swap=False) if dry_run or max_differences is not None else []
        total = sum(line.unexpected for line in (*lines, *in_marts))
        refused = max_differences is not None and total > max_differences
        swap = not (dry_run or refused)
        if swap:
            for (target, shadow, _), differs in zip(shadows, differing, strict=True):
                if differs:
                    dated = shadow.withColumn("event_date", F.to_date(target.mart.time)).repartition("event_date")
                    target.table.replace(dated, settings, target.where(target.reach(span)))
            in_marts = reconcile(swap=True)
        lines += in_marts
    start, end, until_asked = (f"{moment:%Y-%m-%dT%H:%MZ}" for moment in (span.start, span.end, asked.end))
    return Report(start, end, until_asked, swap, left_out, lines, refused)


def _kept(span: Span, since: datetime | None) -> Span:
    """What of a span a mart still keeps; an empty one at its end when it keeps nothing of it."""
    if since is None or since <= span.start:
        return span
    start = min(since, span.end)
    log.warning("the marts keep nothing before %s; it is not compared with them", f"{since:%Y-%m-%dT%H:%MZ}")
    return Span(start, span.end)


def _reader(target: Target, shadow: DataFrame, span: Span) -> Callable[[], Iterator[tuple[Any, ...]]]:
    """The shadow's rows as the mart has them, from the start at each call; one partition at a time on the driver."""
    tail = (True,) if "is_final" in target.mart.columns else ()
    kept = shadow.where(F.col(target.mart.time) >= F.lit(span.start))
    return lambda: ((*gold.in_utc(row), *tail) for row in kept.toLocalIterator())


def as_dict(report: Report) -> dict[str, Any]:
    return asdict(report) | {"differences": report.differences, "unexpected": report.unexpected}


def run(
    settings: Settings, asked: Span, names: Sequence[str], *, dry_run: bool, max_differences: int | None = None
) -> dict[str, Any]:
    """Raises JobError when another run is there, or nothing of the range is final."""
    spark = spark_session(settings, "clickstream-recompute")
    try:
        with locked(spark, settings, LOCK), locked(spark, settings, account.LOCK):
            report = recompute(spark, settings, asked, names, dry_run=dry_run, max_differences=max_differences)
        return as_dict(report)
    finally:
        spark.stop()
