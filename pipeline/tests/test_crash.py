"""Crash tests: the streams are killed at random points, driver and JVM, and nothing is lost, doubled or miscounted.

Everything is the real thing on this machine: a Kafka broker from the platform's own jars (one process, in KRaft mode:
the quorum is not what is tested), `clickstream stream` with all its queries as a service runs it, and PostgreSQL.
While a simulated shop sends records, also wrong ones, the runner waits for something to appear in the lake, a file of
a checkpoint, of a table or of its log, and a random moment later sends SIGKILL to the streams' whole process group.
Then it starts them again, and so on. When the last start has finished all, every offset must be in Bronze once with
the bytes that were sent, and in Silver once, in the table where the record belongs; and DuckDB, which reads the
tables' files by their logs and knows nothing of Spark, counts the figures again from Bronze's bytes.

    make crash ARGS="--kills 30 --seed 7"

The seed decides the records and the points. What a batch holds is left to the machine, so a seed does not repeat a
run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import machine
import oracle
import psycopg
import pytest
from pyspark.sql.types import TimestampType

from clickstream import account, bronze, clients, gold, silver
from clickstream.clients import ClientError
from clickstream.faults import Faults, Truth
from clickstream.settings import PREFIX, Settings, seconds
from clickstream.shop import Shop
from clickstream.streams import QUERIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyspark.sql import SparkSession

    from clickstream.faults import Record
    from clickstream.gold import Windowed
    from clickstream.lake import Table

TOPIC = "clicks"
PARTITIONS = 3
# The shop's clock runs fast, so that windows become final every second and an hour twice a minute.
RECORDS = 20
EVERY_SECONDS = 0.2
EVENT_SECONDS = 1.2
FAULTS = {"duplicate": 0.03, "conflicting": 0.03, "late": 0.02, "malformed": 0.05}
# A kill comes when so many new files are in a place, and up to so many seconds later.
FILES = 3
DELAY_SECONDS = 1.0
POLL_SECONDS = 0.01
# When Silver is back for so long, the kill comes also when too little appeared in the place.
PATIENCE_SECONDS = 15.0
# So long may a start take to come to Silver's first batch.
START_SECONDS = 300.0
# So long may a start take to do all that is left.
FINISH_SECONDS = 240.0

WINDOWED = tuple(windowed for tables in gold.QUERIES.values() for windowed in tables)
TABLES = (*bronze.TABLES, *silver.TABLES, *(windowed.table for windowed in WINDOWED))

COUNTED = ("bronze", "events", "invalid", "duplicates", "conflicting", "late_added", "unexplained")

Position = tuple[int, int]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """A Kafka broker with an empty topic; its address. The quorum is not what is tested."""
    with machine.kafka(tmp_path / "kafka", {TOPIC: PARTITIONS}) as address:
        yield address


class Sent(NamedTuple):
    """A record that the broker has, and what Silver must make of it."""

    key: bytes
    value: bytes | None
    truth: Truth


class Feed(threading.Thread):
    """A shop that sends until told to stop; `sent` has what the broker acknowledged, by partition and offset."""

    def __init__(self, address: str, seed: int) -> None:
        super().__init__(daemon=True)
        # A shop of days ago, so that its clock may run fast and no event is from the future. Its first hour is short.
        start = (datetime.now(UTC) - timedelta(days=4)).replace(minute=45)
        clock = itertools.count(start.timestamp(), EVENT_SECONDS)
        self._records = Faults(Shop(seed=seed, clock=lambda: next(clock)), FAULTS, seed=seed)
        self._client = clients.connect("confluent", [address], TOPIC, self._complain)
        self._stopped = threading.Event()
        self.sent: dict[Position, Sent] = {}
        self.errors: list[ClientError] = []

    def _complain(self, error: ClientError) -> None:
        self.errors.append(error)

    def run(self) -> None:
        try:
            while not self._stopped.wait(EVERY_SECONDS):
                for record in itertools.islice(self._records, RECORDS):
                    self._client.send(record.key, record.value, self._answer(record))
        except ClientError as error:
            self.errors.append(error)

    def _answer(self, record: Record) -> Callable[[ClientError | None, int, int], None]:
        def done(error: ClientError | None, partition: int, offset: int) -> None:
            if error:
                self.errors.append(error)
            else:
                self.sent[partition, offset] = Sent(record.key, record.value, record.truth)

        return done

    def close(self) -> None:
        self._stopped.set()
        self.join()
        self._client.close(30)


def _run_by(group: int) -> bool:
    """Whether a process of the group runs; one that is dead and that nobody has asked after does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of) == group and state not in "ZX":
            return True
    return False


class Streams:
    """`clickstream stream` as a process, and what its checkpoints say."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self._settings, self._log = settings, log
        self.lake = Path(settings.lake_uri.removeprefix("file://"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        variables = {
            PREFIX + field.name.upper(): str(getattr(self._settings, field.name)) for field in fields(Settings)
        }
        source = str(Path(__file__).parents[1] / "src")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "clickstream.cli", "stream"],
                env=os.environ | variables | {"PYTHONPATH": source},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def check(self) -> None:
        """A stream that ends by itself is a defect of its own."""
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            pytest.fail(f"the streams ended with {code}:\n{self._log.read_text(errors='replace')[-4000:]}")

    def kill(self) -> None:
        """Returns when neither Python nor the JVM is there any more."""
        if self._process is None:
            return
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        while _run_by(group):
            time.sleep(POLL_SECONDS)
        self._process = None

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(60)
        assert code == 0, self._log.read_text(errors="replace")[-4000:]

    def _batches(self, query: str, kind: str) -> set[int]:
        return {int(name) for name in names(self.lake / "_checkpoints" / query / kind) if name.isdigit()}

    def in_flight(self) -> dict[str, int]:
        """The batches that were begun and are not committed."""
        found = {}
        for query in QUERIES:
            begun = max(self._batches(query, "offsets"), default=-1)
            if begun > max(self._batches(query, "commits"), default=-1):
                found[query] = begun
        return found

    def position(self, query: str) -> dict[str, Any]:
        """Up to where a query has committed, as its source says it; empty before the first batch."""
        done = max(self._batches(query, "commits"), default=None)
        if done is None:
            return {}
        found: dict[str, Any] = json.loads(
            (self.lake / "_checkpoints" / query / "offsets" / str(done)).read_text().splitlines()[-1]
        )
        return found

    def wait(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + FINISH_SECONDS
        while not reached():
            self.check()
            positions = {query: self.position(query) for query in QUERIES}
            assert time.monotonic() < deadline, (
                f"not within {FINISH_SECONDS:g} s: {what}; the streams are at {positions}"
            )
            time.sleep(0.1)


def names(folder: Path, *, deep: bool = False) -> set[str]:
    """The files in a folder, or below it; none when it does not exist yet."""
    if not deep:
        try:
            return {entry.name for entry in os.scandir(folder)}
        except FileNotFoundError:
            return set()
    return {f"{path}/{name}" for path, _, found in os.walk(folder) if "_delta_log" not in path for name in found}


class Place(NamedTuple):
    """Where the runner waits for files: temporary ones count, so that a rename may be about to come."""

    name: str
    folder: str
    deep: bool = False


PLACES = (
    *(Place(f"{query}/{kind}", f"_checkpoints/{query}/{kind}") for query in QUERIES for kind in ("offsets", "commits")),
    Place("silver/state", "_checkpoints/silver/state", deep=True),
    *(Place(f"{table.name} log", f"{table.name.replace('.', '/')}/_delta_log") for table in TABLES),
    *(Place(f"{table.name} data", table.name.replace(".", "/"), deep=True) for table in TABLES),
)


def points(seed: int) -> Iterator[tuple[Place, int, float]]:
    """Where, after how many files and how many seconds later; every place comes once before one comes again."""
    rng = random.Random(f"points {seed}")
    while True:
        for place in rng.sample(PLACES, len(PLACES)):
            # Half of the kills come at once: much is over in a few milliseconds.
            yield place, rng.randint(1, FILES), rng.choice((0.0, rng.uniform(0, DELAY_SECONDS)))


def kill_at(streams: Streams, place: Place, files: int, delay: float) -> str:
    """Starts the streams and kills them at a point. Says when that was and what it interrupted."""
    commits = streams.lake / "_checkpoints" / silver.QUERY / "commits"
    folder = streams.lake / place.folder
    before, committed = names(folder, deep=place.deep), names(commits)
    streams.start()
    began = time.monotonic()
    back: float | None = None
    new = 0
    while new < files and (back is None or time.monotonic() - began < back + PATIENCE_SECONDS):
        time.sleep(POLL_SECONDS)
        streams.check()
        new = len(names(folder, deep=place.deep) - before)
        if back is None and names(commits) - committed:
            back = time.monotonic() - began
        assert back or time.monotonic() - began < START_SECONDS, f"no batch of Silver within {START_SECONDS:g} s"
    time.sleep(delay)
    if back is None and names(commits) - committed:
        back = time.monotonic() - began
    streams.kill()
    lived = time.monotonic() - began
    flying = ", ".join(f"{query} {batch}" for query, batch in streams.in_flight().items()) or "nothing"
    came = "no batch of Silver yet" if back is None else f"Silver back after {back:4.1f} s"
    return f"{place.name} +{new} file(s) +{delay:.2f} s, {lived:4.1f} s after the start; {came}; in flight: {flying}"


def files_of(lake: Path, table: Table) -> list[str]:
    """The data files that a Delta table consists of, by its log alone; those of a commit that never came are not."""
    path = lake / table.name.replace(".", "/")
    live: dict[str, None] = {}
    for commit in sorted(path.glob("_delta_log/*.json")):
        for action in map(json.loads, commit.read_text().splitlines()):
            if "remove" in action:
                live.pop(action["remove"]["path"], None)
        for action in map(json.loads, commit.read_text().splitlines()):
            if "add" in action:
                assert "deletionVector" not in action["add"], f"{table.name}: this reader knows no deletion vectors"
                live[action["add"]["path"]] = None
    assert live, f"{table.name} is empty; with more kills the shop goes on for longer"
    return [str(path / name) for name in live]


class Lake:
    """DuckDB over the lake's files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._database = duckdb.connect()
        self._database.execute("SET TimeZone = 'UTC'")

    def ask(self, query: str, **tables: Table) -> list[tuple[Any, ...]]:
        """The answer; {name} in the query stands for a table."""
        found = {name: files_of(self._root, table) for name, table in tables.items()}
        read = {name: f"read_parquet({files}, hive_partitioning = false)" for name, files in found.items()}
        return self._database.execute(query.format(**read)).fetchall()

    def judge_again(self) -> dict[Position, oracle.Verdict]:
        """Where each record belongs, from Bronze's bytes; its events are what `count_again` counts."""
        archived = self.ask(
            'SELECT partition, "offset", value, epoch_us("timestamp"), epoch_us(ingested_at) FROM {bronze}',
            bronze=bronze.CLICKSTREAM,
        )
        verdicts = oracle.verdicts(oracle.Record(*row) for row in archived)
        oracle.load(self._database, oracle.events(verdicts))
        return verdicts

    def count_again(self, windowed: Windowed) -> list[tuple[Any, ...]]:
        """The figures, from Bronze's bytes."""
        return oracle.gold(self._database, windowed.table.name)


def expected(sent: dict[Position, Sent]) -> tuple[dict[Position, str], set[Position]]:
    """What Silver must say of each record, and the positions of the events it must hold: of those with one id, all
    in one partition, the first."""
    dispositions: dict[Position, str] = {}
    kept: set[Position] = set()
    for position, record in sorted(sent.items()):
        expect = record.truth.expect
        if expect in ("event", "late"):
            kept.add(position)
        dispositions[position] = "event" if expect == "late" else expect
    return dispositions, kept


def differences(found: Counter[Any], wanted: Counter[Any]) -> str:
    """The first of what is too much and too little; empty when nothing is."""
    surplus, missing = found - wanted, wanted - found
    if not surplus and not missing:
        return ""
    first = [sorted(map(str, part))[:5] for part in (surplus, missing)]
    return f"{surplus.total()} too many: {first[0]}; {missing.total()} missing: {first[1]}"


def plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The row with its times in UTC without a zone, as DuckDB has them."""
    return tuple(
        value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) and value.tzinfo else value
        for value in row
    )


def check_conservation(lake: Lake, sent: dict[Position, Sent]) -> set[Position]:
    """Every offset once in Bronze with its bytes, and once in Silver, where the truth and the oracle have it. Returns
    the positions of the events."""
    archived = lake.ask('SELECT partition, "offset", key, value FROM {bronze}', bronze=bronze.CLICKSTREAM)
    assert not differences(
        Counter(archived), Counter((*position, record.key, record.value) for position, record in sent.items())
    )
    dispositions, kept = expected(sent)
    judged = lake.ask(
        """SELECT partition, "offset", 'event' FROM {events}
           UNION ALL SELECT partition, "offset", disposition FROM {rejects}""",
        events=silver.EVENTS,
        rejects=silver.REJECTS,
    )
    assert not differences(Counter(judged), Counter((*position, what) for position, what in dispositions.items()))
    verdicts = lake.judge_again()
    assert not differences(
        Counter(judged), Counter((*position, verdict.place) for position, verdict in verdicts.items())
    )
    return kept


def check_gold(lake: Lake, dsn: str, watermark: timedelta) -> dict[str, int]:
    """Delta's and the mart's rows are DuckDB's recount, and final are exactly the windows that the watermark passed.
    Returns the number of rows by table."""
    rows = {windowed: lake.count_again(windowed) for windowed in WINDOWED}
    ((newest,),) = lake.ask("SELECT max(event_time) FROM event")
    for windowed, figures in rows.items():
        mart, name = windowed.mart, windowed.table.name
        finished = [row for row in figures if row[1] <= newest - watermark]
        columns = ", ".join(mart.columns[:-1])
        # Without a zone, as DuckDB's own; the lake is in UTC, and so is this connection.
        cast = ", ".join(
            f"{field.name}::TIMESTAMP" if field.dataType == TimestampType() else field.name
            for field in windowed.table.schema.fields[:-1]
        )
        delta = lake.ask(f"SELECT {cast} FROM {{table}}", table=windowed.table)
        assert not differences(Counter(delta), Counter(finished)), name
        with psycopg.connect(dsn) as connection:
            query = f"SELECT {columns}, is_final FROM {mart.schema}.{mart.name}"
            served = connection.execute(query.encode()).fetchall()
        wanted = Counter((*row, row[1] <= newest - watermark) for row in figures)
        assert not differences(Counter(map(plain, served)), wanted), f"the mart of {name}"
    return {windowed.table.name: len(figures) for windowed, figures in rows.items()}


@pytest.mark.crash
def test_nothing_is_lost_or_doubled_by_kills(
    request: pytest.FixtureRequest, spark: SparkSession, settings: Settings, broker: str, dsn: str, tmp_path: Path
) -> None:
    kills, seed = request.config.getoption("kills"), request.config.getoption("seed")
    settings = replace(
        settings,
        bootstrap_servers=broker,
        topic=TOPIC,
        marts_dsn=dsn,
        driver_memory="1g",
        # Many small batches, and windows of hours as often as of minutes.
        trigger_bronze="700 milliseconds",
        trigger_silver="500 milliseconds",
        trigger_gold="500 milliseconds",
        trigger_gold_hourly="900 milliseconds",
        hourly_percent=100,
    )
    streams = Streams(settings, tmp_path / "streams.log")
    feed = Feed(broker, seed)
    feed.start()
    print(f"\nseed {seed}, {kills} kills; the streams' log is {tmp_path}/streams.log")
    try:
        for number, point in zip(range(1, kills + 1), points(seed), strict=False):
            print(f"kill {number:2}/{kills}: {kill_at(streams, *point)}", flush=True)
        streams.start()
        feed.close()
        assert not feed.errors
        ends = Counter(partition for partition, _ in feed.sent)
        topic = {TOPIC: {str(partition): end for partition, end in ends.items()}}
        for query in (bronze.QUERY, silver.QUERY):
            streams.wait(f"{query} commits {topic}", lambda query=query: streams.position(query) == topic)
        # As it runs every hour: beside the streams, which bring the late events it adds to Gold.
        report = account.account(spark, settings, account.closed(spark, settings))
        assert report.unexplained == []
        version = max(
            int(name[:20]) for name in names(streams.lake / "silver/events/_delta_log") if name[:20].isdigit()
        )
        for query in gold.QUERIES:
            streams.wait(
                f"{query} commits version {version} of silver.events",
                lambda query=query: streams.position(query).get("reservoirVersion", 0) > version,
            )
        streams.stop()
    finally:
        streams.kill()
        feed.close()
    lake = Lake(streams.lake)
    kept = check_conservation(lake, feed.sent)
    rows = check_gold(lake, dsn, timedelta(seconds=seconds(settings.watermark)))
    ledger = {name: sum(entry[name] for entry in report.ledger) for name in COUNTED}
    print(f"ledger: {ledger}\nGold's rows, the same in Delta, PostgreSQL and DuckDB: {rows}")
    assert ledger["bronze"] == len(feed.sent)
    assert ledger["events"] == len(kept)
