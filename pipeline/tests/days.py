"""How many files the lake keeps: simulated days at 5 events a second, with the maintenance that Airflow schedules.

    make days ARGS="--days 5 --batches 6"

The real streams and jobs on local Spark and a real broker, by a clock that is put forward (libfaketime) after each
batch: with six batches an hour, a day has 144 of Silver instead of 28,800, and 24 compactions and accountings and a
VACUUM as it should. What is printed are the files at the end of each day, by kind. They are bounded when the days are
the same from the fourth on: what a day leaves is gone when retention and the next VACUUM have passed. The batches that
a real day has more make more of the same, in proportion. With `--retention 12` that is a day sooner.

Of a table's log, what is past its retention is counted apart. Delta cuts a log when it writes a checkpoint, every
CHECKPOINT_COMMITS: it removes each checkpoint with the commits up to the next, if all of them are from before midnight
(UTC) of the day that lies the retention back (https://github.com/delta-io/delta, MetadataCleanup). So a table with a
commit an hour keeps some hours more or less of them, and no day is like another. What a cut has to leave is bounded,
and checked for each table: no more than CHECKPOINT_COMMITS that were too old at its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import machine
from confluent_kafka import Producer

from clickstream import account, alerts, backfill, compact, sessions, streams
from clickstream.faults import Faults
from clickstream.lake import CHECKPOINT_COMMITS, delta_log, latest
from clickstream.session import spark_session
from clickstream.settings import Settings
from clickstream.shop import Shop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.sql import SparkSession

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS
# Digits that the name of a log's file begins with.
VERSION = 20
RECORDS = 30
LIBRARY = "libfaketimeMT.so.1"


def library() -> Path:
    """Debian's libfaketime."""
    listed = subprocess.run(["dpkg", "-L", "libfaketime"], capture_output=True, text=True, check=False).stdout
    found = [Path(line) for line in listed.splitlines() if line.endswith(LIBRARY)]
    if not found:
        sys.exit("days: libfaketime is not installed: run 'make days', or 'apt-get install faketime'")
    return found[0]


@dataclass
class Files:
    """How many files the lake has: `counts` by kind, of the logs those within their retention; `old`, the logs' others.
    `left` are the versions of each table that its last cut left though they were too old."""

    counts: Counter[str] = field(default_factory=Counter)
    old: int = 0
    left: Counter[str] = field(default_factory=Counter)


def cut(moment: float, retention: int) -> float:
    """What of a log is older than this may go at a moment, with so many hours of retention."""
    return (moment - retention * HOUR_SECONDS) // DAY_SECONDS * DAY_SECONDS


class Clock:
    """The JVM's clock, which is put forward; Python and the broker have the real one."""

    def __init__(self, scratch: Path) -> None:
        self._file, self._lake, self._offset = scratch / "offset", scratch / "lake", 0
        self._file.write_text("+0")
        self._stamped = self._real()

    @property
    def environment(self) -> dict[str, str]:
        """What gives a JVM this clock."""
        return {
            "LD_PRELOAD": str(library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Else each wait that ends by the monotonic clock, which is not faked, ends at once and begins again.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "NO_FAKE_STAT": "1",
        }

    def now(self) -> float:
        return time.time() + self._offset

    def _real(self) -> float:
        """Now, as the kernel stamps files."""
        self._file.touch()
        return self._file.stat().st_ctime

    def stamp(self) -> None:
        """Files got the real time: those since the last call get the simulated one."""
        for folder, _, names in os.walk(self._lake):
            for name in names:
                path = f"{folder}/{name}"
                # One after the other, as they were written: of commits with the same time Delta keeps more.
                if (written := os.stat(path).st_ctime) > self._stamped:
                    os.utime(path, (written + self._offset, written + self._offset))
        # What utime changed has a new ctime too, before this.
        self._stamped = self._real()

    def forward(self, step: int) -> None:
        """Put the clock forward."""
        self.stamp()
        self._offset += step
        self._file.write_text(f"+{self._offset}")

    def files(self, retention: int) -> Files:
        """The lake's files now, all of them stamped, with so many hours of retention."""
        found, kept = Files(), cut(self.now(), retention)
        for folder, _, names in os.walk(self._lake):
            inner = Path(folder).relative_to(self._lake).parts
            if "_delta_log" not in inner:
                found.counts["checkpoints" if "_checkpoints" in inner else "data"] += len(names)
                continue
            written = {name: os.stat(f"{folder}/{name}").st_mtime for name in names}
            old = sum(at < kept for at in written.values())
            found.counts["log"] += len(names) - old
            found.old += old
            # Before the first checkpoint nothing is cut.
            last = cut(max((at for name, at in written.items() if ".checkpoint." in name), default=0.0), retention)
            versions = {name[:VERSION] for name, at in written.items() if at < last and name[:VERSION].isdigit()}
            if versions:
                found.left[".".join(inner[:2])] = len(versions)
        return found


class Logs:
    """Cuts the tables' logs as Delta does after each checkpoint, but when a step's files have got the simulated time:
    with the real one they look days old, and Delta would take the new checkpoint for one to go back to."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self._spark, self._last = spark, dict[str, str]()
        # The other two are written by nothing here.
        for table in set(compact.TABLES) - {backfill.BACKFILLS, sessions.TABLE}:
            table.ensure(spark, settings)
            path = settings.table(table.name)
            spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.enableExpiredLogCleanup' = 'false')")
            self._last[path] = ""

    def cut(self) -> None:
        """Cut the logs that have a new checkpoint."""
        for path, last in self._last.items():
            found = (Path(path.removeprefix("file://")) / "_delta_log").glob("*.checkpoint.*")
            newest = max((file.name for file in found), default="")
            if newest != last:
                log = delta_log(self._spark, path)
                defaults = (getattr(log, f"cleanUpExpiredLogs$default${number}")() for number in (2, 3, 4))
                log.cleanUpExpiredLogs(latest(self._spark, path), *defaults)
                self._last[path] = newest


def full(retention: int) -> int:
    """The first day at whose end what was removed is what a day leaves: so many hours of retention, up to a day more
    until VACUUM or a log's cut, and a log's next checkpoint."""
    return 2 + -(-retention // 24)


def lake_of(stack: ExitStack, scratch: Path, clock: Clock, retention: int) -> tuple[SparkSession, Settings]:
    """A session with the simulated clock, on a broker with the real one."""
    address = stack.enter_context(machine.kafka(scratch / "kafka", {"records": 3}))
    machine.configure(scratch)
    with (scratch / "conf/spark-defaults.conf").open("a") as defaults:
        # A step of the clock looks like an executor that has not been heard of for as long.
        defaults.write(f"spark.network.timeout {DAY_SECONDS}s\n")
    os.environ.update(clock.environment)
    settings = Settings(
        lake_uri=f"file://{scratch}/lake",
        bootstrap_servers=address,
        topic="records",
        watermark="2 minutes",
        max_clock_skew="1 minute",
        **dict.fromkeys(("trigger_bronze", "trigger_silver", "trigger_gold", "trigger_gold_hourly"), "0 seconds"),
        hourly_percent=100,
        retention_hours=retention,
        driver_memory="2g",
    )
    spark = spark_session(settings, "days", streams=True)
    stack.callback(spark.stop)
    spark.sparkContext.setLogLevel("ERROR")
    return spark, settings


def simulate(days: int, batches: int, retention: int) -> Iterator[Files]:
    """The files at the end of each day, with so many batches of each query an hour."""
    step = HOUR_SECONDS // batches
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clickstream-days-")))
        clock = Clock(scratch)
        spark, settings = lake_of(stack, scratch, clock, retention)
        logs = Logs(spark, settings)
        queries = [streams.start_query(spark, settings, name, {}) for name in streams.QUERIES]
        records = Faults(Shop(seed=1, clock=clock.now), {"duplicate": 0.03, "malformed": 0.03}, seed=1)
        jvm = spark._jvm
        assert jvm is not None
        producer = Producer({"bootstrap.servers": settings.bootstrap_servers})
        for hour in range(24 * days):
            for _ in range(batches):
                for record in itertools.islice(records, RECORDS):
                    producer.produce(settings.topic, record.value, record.key, timestamp=int(clock.now() * 1000))
                assert producer.flush(60) == 0
                for query in queries:
                    query.processAllAvailable()
                clock.forward(step)
                # The library reads the file once a second.
                while jvm.java.lang.System.currentTimeMillis() / 1000 < clock.now() - step / 2:
                    time.sleep(0.05)
            report = account.account(spark, settings, account.closed(spark, settings))
            assert not report.unexplained
            alerts.update(spark, settings, None, alerts.parameters())
            compact.compact(spark, settings, vacuum=hour % 24 == 3)
            clock.stamp()
            logs.cut()
            if hour % 24 == 23:
                yield clock.files(retention)
        for query in queries:
            query.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--batches",
        type=int,
        default=6,
        choices=[n for n in range(1, 61) if HOUR_SECONDS % n == 0],
        help="of each query, in a simulated hour (default: %(default)s)",
    )
    parser.add_argument(
        "--retention",
        type=int,
        default=Settings.retention_hours,
        help="hours that a removed file and a log entry stay (default: %(default)s)",
    )
    args = parser.parse_args()
    days, first = args.days, full(args.retention)
    if days <= first:
        print(f"to be compared with day {first}, there have to be more --days than that", file=sys.stderr)
    totals = []
    code = 0
    for day, files in enumerate(simulate(days, args.batches, args.retention), 1):
        totals.append(files.counts.total())
        table, left = max(files.left.items(), key=itemgetter(1), default=("any table", 0))
        print(
            f"day {day}: {totals[-1]:>6} files: "
            + ", ".join(f"{n} {kind}" for kind, n in sorted(files.counts.items()))
            + f"; and {files.old} of logs past retention, of {table} {left} versions that its last cut left",
            flush=True,
        )
        if left > CHECKPOINT_COMMITS:
            print(f"MISSED: a cut of a log leaves up to {CHECKPOINT_COMMITS} versions", file=sys.stderr)
            code = 1
    if days > first and totals[-1] > totals[first - 1] * 1.05:
        print(f"MISSED: the lake has more files on day {days} than on day {first}", file=sys.stderr)
        code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
