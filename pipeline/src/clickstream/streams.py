"""Runs a set of named queries in one Spark application until told to stop or until one fails."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import start_http_server

from clickstream import bronze, gold, metrics, sdnotify, silver
from clickstream.progress import GroupPublisher, ProgressListener
from clickstream.rules import RULES
from clickstream.session import spark_session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming.query import StreamingQuery

    from clickstream.settings import Settings

log = logging.getLogger("clickstream")

QUERIES = (bronze.QUERY, silver.QUERY, *gold.QUERIES)
# Started when the others have had their first trigger: a start is mostly a cold JVM at work, and whoever waits for
# the newest minute does not wait for these.
LATER = (gold.HOURLY_QUERY,)
# The streams that read Kafka show their position as a consumer group of this name.
GROUP_PREFIX = "ecom-"
# The longest that the hours' query rests after a batch.
REST_SECONDS = 600.0
# How long a stop waits for the batches that run.
STOP_SECONDS = 15.0
# How long the later queries' start may take before the watchdog takes it for a hang.
LATER_SECONDS = 1800.0
# How much longer systemd is asked to wait, again and again, while a first batch runs.
EXTENSION_SECONDS = 60


class BatchError(RuntimeError):
    """A batch failed; the message is one line, the log has the rest."""


def _guarded(name: str, write: Callable[[DataFrame, int], None]) -> Callable[[DataFrame, int], None]:
    """Logs a batch's error here and raises a short one.

    Spark matches the message of a failed batch against a regular expression that recurses with every character
    of it; a whole Java stack trace overflows the query's own stack.
    """

    def guarded(batch: DataFrame, batch_id: int) -> None:
        try:
            write(batch, batch_id)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")[:300]
            log.exception("query %s, batch %d", name, batch_id)
            raise BatchError(f"batch {batch_id}: {type(error).__name__}: {first}") from None

    return guarded


def sparing(
    write: Callable[[DataFrame, int], None], percent: int, rest: Callable[[float], Any]
) -> Callable[[DataFrame, int], None]:
    """A batch that ends when it has rested, at most REST_SECONDS, so that the work is this part of its time."""

    def spare(batch: DataFrame, batch_id: int) -> None:
        began = time.monotonic()
        write(batch, batch_id)
        rest(min((time.monotonic() - began) * (100 / percent - 1), REST_SECONDS))

    return spare


def start_query(
    spark: SparkSession,
    settings: Settings,
    name: str,
    extra: dict[str, Callable[[], Mapping[str, Any]]],
    rest: Callable[[float], Any] = time.sleep,
) -> StreamingQuery:
    """A query by its name, with its tables made.

    `extra` gets what it can say of itself beside Spark's progress; `rest` waits so many seconds, or until a stop.
    """
    # The query's thread inherits the pool, so that no query waits for another's whole batch.
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", name)
    try:
        if name == bronze.QUERY:
            for table in bronze.TABLES:
                table.ensure(spark, settings)
            return bronze.build(spark, settings, _guarded(name, bronze.writer(settings))).start()
        if name == silver.QUERY:
            for table in silver.TABLES:
                table.ensure(spark, settings)
            return silver.build(spark, settings, _guarded(name, silver.writer(settings))).start()
        tables = gold.QUERIES[name]
        writer = gold.GoldWriter(spark, settings, gold.prepare(spark, settings, tables), tables)
        extra[name] = lambda: {"last_event_at": writer.newest.isoformat() if writer.newest else None}
        write = _guarded(name, writer)
        if name in LATER:
            write = sparing(write, settings.hourly_percent, rest)
        return gold.build(spark, settings, write, name).start()
    finally:
        spark.sparkContext.setLocalProperty("spark.scheduler.pool", None)  # type: ignore[arg-type]


def _serve_metrics(port: int, names: Sequence[str], version: int) -> None:
    """Answers scrapes at a port; a series is there from the start, so that its first increase is seen as one."""
    written = {bronze.QUERY: bronze.TABLES, silver.QUERY: silver.TABLES}
    written |= {query: tuple(windowed.table for windowed in tables) for query, tables in gold.QUERIES.items()}
    for name in names:
        metrics.ROWS_READ.labels(name)
        for table in written[name]:
            metrics.ROWS_WRITTEN.labels(table.name)
    if silver.QUERY in names:
        for rule in RULES:
            if rule.applies(version):
                metrics.REJECTS.labels(rule.code)
    start_http_server(port)


def run(settings: Settings, names: Sequence[str], metrics_port: int = 0) -> int:
    """Exit code 0 after SIGTERM or SIGINT, 1 when a query failed or the metrics' port is taken; port 0 is none."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    if metrics_port:
        try:
            _serve_metrics(metrics_port, names, settings.ruleset_version)
        except OSError as error:
            log.error("metrics cannot be served at port %d: %s; choose another --metrics-port", metrics_port, error)
            return 1
    spark = spark_session(settings, "ecom-" + ("streams" if len(names) > 1 else names[0]), streams=True)
    # pyspark takes SIGINT for itself when the context starts
    signal.signal(signal.SIGINT, lambda *_: stop.set())

    ready: set[str] = set()
    groups = {
        name: GroupPublisher(settings.bootstrap_servers, GROUP_PREFIX + name)
        for name in names
        if name in (bronze.QUERY, silver.QUERY)
    }
    extra: dict[str, Callable[[], Mapping[str, Any]]] = {}
    listener = ProgressListener(settings.status_dir, groups, extra, ready.add)
    spark.streams.addListener(listener)

    queries: list[StreamingQuery] = []

    def start(some: Sequence[str]) -> None:
        for name in some:
            if stop.is_set():
                return

            def rest(seconds: float, name: str = name) -> None:
                listener.rests(name, seconds)
                stop.wait(seconds)

            queries.append(start_query(spark, settings, name, extra, rest))
            log.info("query %s started", name)

    later = [name for name in names if name in LATER]
    code = 0
    try:
        start([name for name in names if name not in later])
        code = _watch(queries, ready, stop, lambda: start(later))
    finally:
        # also when a query failed: one that rests would hold up the end
        stop.set()
        sdnotify.notify("STOPPING=1")
        _stop(queries)
        for group in groups.values():
            group.close()
        spark.stop()
    return code


def _stop(queries: Sequence[StreamingQuery]) -> None:
    """Stops each query between two batches where it can; an interrupted batch would be replayed, noisily."""
    deadline = time.monotonic() + STOP_SECONDS
    running = [query for query in queries if query.isActive]
    while running:
        late = time.monotonic() > deadline
        for query in list(running):
            if late or not query.isActive or not query.status["isTriggerActive"]:
                try:
                    query.stop()
                except Exception as error:  # it did not end in time: the next start replays its batch
                    log.warning("query %s did not stop: %s", query.name, next(iter(str(error).splitlines()), ""))
                running.remove(query)
        time.sleep(0.02)


def _watch(
    queries: Sequence[StreamingQuery], ready: set[str], stop: threading.Event, on_ready: Callable[[], None]
) -> int:
    """Looks after the queries until one fails or a stop is asked for; `on_ready` may add queries.

    The watchdog is pinged for as long as Spark's JVM answers. A query that is slow or waits is none of its business:
    the health check sees that, and a new start would not make it faster.
    """
    watchdog = sdnotify.Watchdog()
    told = False
    extended = 0.0
    while not stop.wait(0.5):
        for query in queries:
            if not query.isActive:
                error = query.exception()
                log.error("query %s ended: %s", query.name, error or "without an error")
                return 1
        if not told and time.monotonic() >= extended:
            # A first batch may be over all of history, when a query is new to a lake that is not: no reason to stop
            # the others for it.
            extended = time.monotonic() + EXTENSION_SECONDS / 2
            sdnotify.notify(f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1_000_000}")
        if not told and ready.issuperset(query.name for query in queries):
            told = True
            log.info("%s: first trigger finished", ", ".join(query.name for query in queries) or "nothing to wait for")
            watchdog.ready()
            with watchdog.patience(LATER_SECONDS):
                on_ready()
            sdnotify.notify(f"STATUS=running {', '.join(query.name for query in queries)}")
        watchdog.ping()
    log.info("stopping")
    return 0
