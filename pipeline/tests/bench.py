"""How fast the pieces are, each beside what it is compared with, in one run on this machine.

    make bench ARGS="--records 500000 --repeat 3 --only producer,silver"

Everything is real: a Kafka broker on loopback from the platform's own jars, Spark with the production settings on two
local cores, Delta tables on this disk. The contenders of a race take turns, so that what else the machine does hits all
of them; a first round warms up and is not counted. Printed are the least, the median and the greatest rate, and the
ratio of the medians to the race's yardstick. A ratio below its goal is said, and ends the run with 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import duckdb
import machine
import orjson
from kafka import KafkaProducer
from oracle import ORACLES
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import TimestampType
from test_crash import files_of

from clickstream import bronze, clients, gold, recompute, silver
from clickstream.clients import ClientError
from clickstream.event import FIELDS
from clickstream.rules import PRICE_TYPE
from clickstream.session import kafka_records, spark_session
from clickstream.settings import Settings
from clickstream.shop import Shop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming.readwriter import DataStreamWriter

PARTITIONS = 3
PACED = 15_000
RACES = ("producer", "bronze", "silver", "recompute")
DAY = datetime(2025, 11, 29, tzinfo=UTC)
# What Spark does by itself, where the platform's session says otherwise.
STOCK = {
    "spark.sql.shuffle.partitions": "200",
    "spark.sql.streaming.stateStore.providerClass": (
        "org.apache.spark.sql.execution.streaming.state.HDFSBackedStateStoreProvider"
    ),
}


@dataclass(frozen=True)
class Contender:
    """`seconds` does the work once, of `rows` rows. `goals` are by yardstick: at least so many times its rate."""

    name: str
    rows: int
    seconds: Callable[[], float]
    goals: dict[str, float]


@dataclass(frozen=True)
class Result:
    """Rates in rows a second; `ratios` are of the medians, by yardstick."""

    race: str
    name: str
    least: float
    median: float
    greatest: float
    ratios: dict[str, float]
    goals: dict[str, float]

    @property
    def missed(self) -> list[str]:
        return [other for other, goal in self.goals.items() if self.ratios[other] < goal]


def race(name: str, contenders: Sequence[Contender], repeat: int) -> list[Result]:
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(repeat + 1):
        for contender in contenders:
            rate = contender.rows / contender.seconds()
            print(f"  {name}: {contender.name}: {rate:,.0f} a second{'' if turn else ' (warming up)'}", flush=True)
            if turn:
                rates[contender.name].append(rate)
    medians = {other: statistics.median(found) for other, found in rates.items()}
    return [
        Result(
            name,
            contender.name,
            min(rates[contender.name]),
            medians[contender.name],
            max(rates[contender.name]),
            {other: medians[contender.name] / medians[other] for other in contender.goals},
            contender.goals,
        )
        for contender in contenders
    ]


Message = tuple[bytes, bytes]


def made(seed: int, count: int) -> list[Message]:
    """So many messages of the shop, made beforehand: no race is about making them."""
    events = itertools.islice(Shop(seed=seed), count)
    return [(event["user_id"].encode(), orjson.dumps(event)) for event in events]


def send(
    hand_over: Callable[[bytes, bytes, clients.Done], None], flush: Callable[[], None], messages: list[Message]
) -> float:
    """Seconds until all messages are acknowledged."""
    left = len(messages)
    finished = Event()

    def done(error: ClientError | None, partition: int, offset: int) -> None:
        nonlocal left
        if error:
            raise error
        left -= 1
        if not left:
            finished.set()

    began = time.monotonic()
    for key, value in messages:
        while True:
            try:
                hand_over(key, value, done)
                break
            except ClientError as error:
                if error.cause != "BufferError":
                    raise
                time.sleep(0.001)  # the client's queue is full
    flush()
    if not finished.wait(60):
        raise RuntimeError(f"{left} messages were not acknowledged")
    return time.monotonic() - began


def complain(error: ClientError) -> None:
    raise error


def with_client(name: str, address: str, topic: str, messages: list[Message]) -> float:
    client = clients.connect(name, [address], topic, complain)
    try:
        # Closing waits for the answers; what it costs beside that is not the loop's.
        return send(client.send, lambda: None, messages)
    finally:
        client.close(60)


def with_defaults(address: str, topic: str, messages: list[Message]) -> float:
    producer = KafkaProducer(bootstrap_servers=address)

    def hand_over(key: bytes, value: bytes, done: clients.Done) -> None:
        sent = producer.send(topic, key=key, value=value)
        sent.add_callback(lambda metadata: clients.answer(done, None, metadata.partition, metadata.offset))

    try:
        return send(hand_over, producer.flush, messages)
    finally:
        producer.close()


def producers(address: str, messages: list[Message], repeat: int) -> list[Result]:
    count = len(messages)
    return race(
        "producer",
        [
            Contender("kafka-python's defaults", count, lambda: with_defaults(address, "producer", messages), {}),
            Contender(
                "kafka-python as the producer sets it",
                count,
                lambda: with_client("kafka-python", address, "producer", messages),
                {"kafka-python's defaults": 1.5},
            ),
            Contender(
                "confluent as the producer sets it",
                count,
                lambda: with_client("confluent", address, "producer", messages),
                {"kafka-python's defaults": 3.0},
            ),
        ],
        repeat,
    )


class Bench:
    """Spark, a topic with records, and the same records in files."""

    def __init__(self, spark: SparkSession, settings: Settings, scratch: Path, rows: int) -> None:
        self.spark, self.settings, self.scratch, self.rows = spark, settings, scratch, rows
        self.source = str(scratch / "records")

    def topic(self) -> DataFrame:
        """The topic's records, read at once."""
        return kafka_records(self.spark.read, self.settings, headers=True)

    def dump(self) -> None:
        """The topic's records as files, as many as it has partitions."""
        self.topic().repartition(PARTITIONS).write.parquet(self.source)
        assert self.files().count() == self.rows

    def stream(self, build: Callable[[Settings], DataStreamWriter]) -> float:
        """Seconds of a stream's batches from the start of the topic to its end, into a lake of its own."""
        lake = tempfile.mkdtemp(dir=self.scratch)
        try:
            query = build(replace(self.settings, lake_uri=f"file://{lake}")).trigger(availableNow=True).start()
            query.awaitTermination()
            progress = query.recentProgress
            assert sum(batch.numInputRows for batch in progress) == self.rows
            return sum(batch.batchDuration for batch in progress) / 1000
        finally:
            shutil.rmtree(lake)

    def to_parquet(self, records: Callable[[], DataFrame]) -> float:
        """Seconds of the records to Parquet, in one job."""
        target = tempfile.mkdtemp(dir=self.scratch)
        began = time.monotonic()
        records().write.mode("overwrite").parquet(target)
        took = time.monotonic() - began
        shutil.rmtree(target)
        return took

    def files(self) -> DataFrame:
        return self.spark.read.parquet(self.source)

    def read(self) -> float:
        """Seconds of the topic to nowhere."""
        began = time.monotonic()
        self.topic().write.format("noop").mode("overwrite").save()
        return time.monotonic() - began

    def bronze(self, settings: Settings) -> DataStreamWriter:
        for table in bronze.TABLES:
            table.ensure(self.spark, settings)
        return bronze.build(self.spark, settings, bronze.writer(settings))

    def silver(self, settings: Settings) -> DataStreamWriter:
        for table in silver.TABLES:
            table.ensure(self.spark, settings)
        return silver.build(self.spark, settings, silver.writer(settings))

    def stock(self) -> float:
        """The same Silver with Spark's own settings."""
        before = {key: self.spark.conf.get(key) for key in STOCK}
        try:
            for key, value in STOCK.items():
                self.spark.conf.set(key, value)
            return self.stream(self.silver)
        finally:
            for key, old in before.items():
                self.spark.conf.set(key, old or "")


def typed(records: DataFrame) -> DataFrame:
    """The event's columns, nothing checked and nothing deduplicated."""
    fields = ", ".join(f"{name} {'DOUBLE' if name == 'price' else 'STRING'}" for name in FIELDS)
    parsed = records.selectExpr(
        f"from_json(CAST(value AS STRING), '{fields}') AS e", "topic", "partition", "offset", "timestamp"
    )
    return parsed.select(
        "e.*",
        F.try_to_timestamp("e.timestamp").alias("event_time"),
        F.col("e.price").cast(PRICE_TYPE).alias("amount"),
        "topic",
        "partition",
        "offset",
        F.col("timestamp").alias("kafka_timestamp"),
    ).drop("price")


PLAIN = "files to Parquet, nothing parsed"
TYPED = "files to Parquet, parsed, nothing checked"
OWN = "Silver, Spark's own settings"


def streams(bench: Bench, names: Sequence[str], repeat: int) -> list[Result]:
    found = []
    plain = Contender(PLAIN, bench.rows, lambda: bench.to_parquet(bench.files), {})
    parsed = Contender(TYPED, bench.rows, lambda: bench.to_parquet(lambda: typed(bench.files())), {})
    if "bronze" in names:
        # What the broker and Spark's source take of the same cores, without stream, checkpoint and Delta.
        read = Contender("Kafka to nowhere, one job", bench.rows, bench.read, {PLAIN: 0.0})
        copied = Contender("Kafka to Parquet, one job", bench.rows, lambda: bench.to_parquet(bench.topic), {PLAIN: 0.0})
        goals = {TYPED: 0.8, PLAIN: 0.8}
        stream = Contender("Kafka to Delta", bench.rows, lambda: bench.stream(bench.bronze), goals)
        found += race("bronze", [plain, parsed, read, copied, stream], repeat)
    if "silver" in names:
        stock, tuned = silvers(bench, {TYPED: 0.25, PLAIN: 0.25, OWN: 3.0})
        found += race(
            f"silver, {bench.settings.max_offsets_per_trigger:,} a batch", [plain, parsed, stock, tuned], repeat
        )
    return found


def silvers(bench: Bench, goals: dict[str, float]) -> list[Contender]:
    """Silver with Spark's settings and with ours."""
    return [
        Contender(OWN, bench.rows, bench.stock, {}),
        Contender("Silver", bench.rows, lambda: bench.stream(bench.silver), goals),
    ]


def day_of_events(spark: SparkSession, settings: Settings, rows: int) -> None:
    """A day of events in silver.events: 100 products, 5,000 visitors, the types in the shop's proportions."""
    silver.EVENTS.ensure(spark, settings)
    step = 86_400_000_000 // rows

    def pick(salt: int, *values: str) -> str:
        listed = ", ".join(f"'{value}'" for value in values)
        return f"element_at(array({listed}), cast(pmod(hash(id, {salt}), {len(values)}) + 1 AS int))"

    events = spark.range(rows).selectExpr(
        "concat('evt_', lpad(id, 12, '0')) AS event_id",
        f"timestamp_micros({int(DAY.timestamp())} * 1000000L + id * {step}) AS event_time",
        "concat('user_', lpad(pmod(hash(id), 5000), 4, '0')) AS user_id",
        f"concat('session_', pmod(hash(id, 1), 3) + 1000 + id * {step} div 7200000000) AS session_id",
        "concat('prod_', lpad(pmod(hash(id, 2), 100), 4, '0')) AS product_id",
        f"{pick(2, 'Electronics', 'Home', 'Toys', 'Books')} AS product_category",
        f"{pick(3, 'view', 'view', 'view', 'view', 'add_to_cart', 'purchase')} AS event_type",
        f"{pick(4, 'mobile', 'desktop', 'tablet')} AS device_type",
        "'/product' AS page_url",
        "cast((pmod(hash(id, 5), 100000) + 1) / 100 AS decimal(12, 2)) AS price",
    )
    complete: DataFrame = events.withColumn("event_date", events["event_time"].cast("date"))
    complete.write.format("delta").mode("append").save(settings.table(silver.EVENTS.name))


def batch_layer(spark: SparkSession, settings: Settings, scratch: Path, rows: int, repeat: int) -> list[Result]:
    """The funnels and conversions of a day: the whole job, comparison and swap included, against DuckDB's aggregation
    of the same files; then the checksums of both."""
    settings = replace(settings, lake_uri=f"file://{scratch}/day")
    day_of_events(spark, settings, rows)
    tables = [windowed.table for windowed in gold.WINDOWED]
    # The last hour of the day is not final: a watermark behind the newest event.
    span = recompute.Span(DAY, DAY + timedelta(hours=23))
    lake = scratch / "day"
    columns = "event_id, event_time, user_id, session_id, product_id, product_category, device_type, event_type, price"

    def again() -> float:
        for table in tables:
            table.ensure(spark, settings)
            spark.sql(f"DELETE FROM delta.`{settings.table(table.name)}`")
        began = time.monotonic()
        report = recompute.recompute(spark, settings, span, [table.name for table in tables])
        assert report.differences == sum(line.rows for line in report.lines)
        return time.monotonic() - began

    def duck() -> duckdb.DuckDBPyConnection:
        database = duckdb.connect(config={"threads": 2})
        database.execute("SET TimeZone = 'UTC'")
        files = files_of(lake, silver.EVENTS)
        database.execute(
            f"CREATE VIEW event AS SELECT {columns.replace('event_time', 'event_time::TIMESTAMP AS event_time', 1)} "
            f"FROM read_parquet({files}) WHERE event_time < TIMESTAMPTZ '{span.end:%Y-%m-%d %H:%M}Z'"
        )
        return database

    def oracle() -> float:
        database = duck()
        began = time.monotonic()
        for number, windowed in enumerate(gold.WINDOWED):
            database.execute(f"CREATE TABLE figures_{number} AS {ORACLES[windowed.table.name]}")
        return time.monotonic() - began

    found = race(
        "recompute",
        [
            Contender("DuckDB's aggregation of the same files", rows, oracle, {}),
            Contender("clickstream recompute", rows, again, {"DuckDB's aggregation of the same files": 0.0}),
        ],
        repeat,
    )
    database = duck()
    for windowed in gold.WINDOWED:
        fields = windowed.table.schema.fields[:-1]
        cast = ", ".join(f"{f.name}::TIMESTAMP" if f.dataType == TimestampType() else f.name for f in fields)
        ours = f"SELECT {cast} FROM read_parquet({files_of(lake, windowed.table)})"
        names = ", ".join(field.name for field in fields)
        sums = [
            database.execute(f"SELECT count(*), bit_xor(hash(t)) FROM ({query}) AS t({names})").fetchall()
            for query in (ORACLES[windowed.table.name], ours)
        ]
        assert sums[0] == sums[1], f"{windowed.table.name}: DuckDB has rows and checksum {sums[0]}, Gold {sums[1]}"
        print(f"  {windowed.table.name}: rows and checksum, the same as DuckDB's: {sums[0][0]}", flush=True)
    return found


def table(results: Sequence[Result]) -> str:
    lines = ["| race | contender | least | median | greatest | ratio (goal) |", "|---|---|---:|---:|---:|---|"]
    for result in results:
        rates = " | ".join(f"{rate:,.0f}" for rate in (result.least, result.median, result.greatest))
        ratios = []
        for other, goal in result.goals.items():
            verdict = f" ({'MISSED, ' if other in result.missed else ''}{goal:g})" if goal else ""
            ratios.append(f"{result.ratios[other]:.2f} x {other}{verdict}")
        lines.append(f"| {result.race} | {result.name} | {rates} | {'; '.join(ratios)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500_000, help="of the streams' races (default: %(default)s)")
    parser.add_argument("--messages", type=int, default=100_000, help="of the producers' race (default: %(default)s)")
    parser.add_argument(
        "--day", type=int, default=5_000_000, help="events of the recomputed day (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--only", default=",".join(RACES), help=f"some of {','.join(RACES)} (default: all)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(RACES):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not among {', '.join(RACES)}")

    results: list[Result] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clickstream-bench-")))
        address = ""
        if set(names) - {"recompute"}:
            topics = dict.fromkeys(("producer", "records", "paced"), PARTITIONS)
            address = stack.enter_context(machine.kafka(scratch / "kafka", topics, heap="512m"))
        if "producer" in names:
            results += producers(address, made(1, args.messages), args.repeat)
        if set(names) - {"producer"}:
            machine.configure(scratch)
            settings = Settings(
                lake_uri=f"file://{scratch}/lake",
                bootstrap_servers=address or "localhost:9092",
                topic="records",
                driver_memory="2g",
            )
            spark = spark_session(settings, "bench", streams=True)
            stack.callback(spark.stop)
            spark.sparkContext.setLogLevel("ERROR")
            if {"bronze", "silver"} & set(names):
                with_client("confluent", address, "records", made(2, args.records))
                bench = Bench(spark, settings, scratch, args.records)
                bench.dump()
                results += streams(bench, names, args.repeat)
            if "silver" in names:
                # As the stream has them: what 5,000 a second bring in a trigger's three seconds.
                with_client("confluent", address, "paced", made(3, 4 * PACED))
                paced = replace(settings, topic="paced", max_offsets_per_trigger=PACED)
                bench = Bench(spark, paced, scratch, 4 * PACED)
                results += race(f"silver, {PACED:,} a batch", silvers(bench, {OWN: 3.0}), args.repeat)
            if "recompute" in names:
                results += batch_layer(spark, settings, scratch, args.day, args.repeat)
    print("\n" + table(results))
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 1 if any(result.missed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
