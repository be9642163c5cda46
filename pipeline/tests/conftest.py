"""One real Spark for the whole suite, and a real PostgreSQL in a temporary directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import machine
import psycopg
import pytest

os.environ["TZ"] = "UTC"

from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.types import StructType

from clickstream import compact, lake, silver
from clickstream.marts import MartWriter
from clickstream.rules import PRICE_TYPE
from clickstream.session import spark_session
from clickstream.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

    from pyspark.sql import DataFrame, Row, SparkSession
    from pyspark.sql.streaming.query import StreamingQuery

# How long an example takes is the machine's business.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

CASES = Path(__file__).parent / "cases"
KAFKA_COLUMNS = """topic STRING, partition INT, offset BIGINT, timestamp TIMESTAMP, timestampType INT,
    key BINARY, value BINARY, headers ARRAY<STRUCT<key: STRING, value: BINARY>>"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often the crash test kills the streams (default: 2)")
    parser.addoption("--seed", type=int, default=7, help="of the crash test's records and points (default: 7)")


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """The production session on two local cores; only what a node's spark-defaults.conf would say is added."""
    conf = tmp_path_factory.mktemp("spark-conf")
    classes = machine.file_system(tmp_path_factory.mktemp("classes"))
    (conf / "spark-defaults.conf").write_text(
        machine.spark_defaults(classes, tmp_path_factory.mktemp("spark"))
        # No plan runs long enough to earn back generated code. The tests of the role and end to end run as the
        # services do, with it.
        + "spark.sql.codegen.wholeStage false\n"
        "spark.sql.codegen.factoryMode NO_CODEGEN\n"
        # the state of a query that a test stopped is not needed for long
        "spark.sql.streaming.stateStore.maintenanceInterval 600s\n"
    )
    os.environ["SPARK_CONF_DIR"] = str(conf)
    session = spark_session(
        Settings(lake_uri="file:///unused", spark_master="local[2]", driver_memory="1g"), "unit", streams=True
    )
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def empty_lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every table, without rows: to copy them takes less than most tests, to make them more."""
    path = tmp_path_factory.mktemp("empty") / "lake"
    for table in compact.TABLES:
        table.ensure(spark, Settings(lake_uri=f"file://{path}"))
    return path


@pytest.fixture
def bare(tmp_path: Path) -> Settings:
    """A lake where no table is yet."""
    return Settings(lake_uri=f"file://{tmp_path}/lake", status_dir=str(tmp_path / "status"))


@pytest.fixture
def settings(bare: Settings, empty_lake: Path) -> Settings:
    """A lake whose tables are all empty."""
    shutil.copytree(empty_lake, bare.lake_uri.removeprefix("file://"))
    return bare


NOW = datetime(2025, 11, 29, 12, 0, tzinfo=UTC)


def event(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A valid event of 12:00, with changes."""
    product = changes.get("product_id", "prod_0007")
    return {
        "event_id": f"evt_{number:08d}",
        "user_id": "user_0001",
        "product_id": product,
        "event_type": "view",
        "timestamp": "2025-11-29T12:00:00.000Z",
        "session_id": "session_1001",
        "product_category": "Home",
        "device_type": "mobile",
        "page_url": f"/product/{product}",
        "price": 19.99,
    } | changes


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


def csv_events(spark: SparkSession, path: Path) -> DataFrame:
    """Silver's events from a file, as far as it has their columns."""
    return (
        spark.read.csv(str(path), header=True)
        .withColumn("event_time", F.to_timestamp("event_time"))
        .withColumn("price", F.col("price").cast(PRICE_TYPE))
    )


def as_text(row: Row, names: Iterable[str]) -> list[str]:
    """These values of a row as the files of expected rows have them."""

    def text(value: Any) -> str:
        if isinstance(value, datetime):
            return value.isoformat(timespec="milliseconds") + "Z"
        return "" if value is None else str(value)

    return [text(row[name]) for name in names]


class Topic:
    """Records with Kafka's columns; each takes the next offset of its partition, as a broker would give it."""

    def __init__(self, spark: SparkSession, partitions: int = 3, start: int = 0) -> None:
        """The first partition goes on at an offset."""
        self._spark = spark
        self._next = [start] + [0] * (partitions - 1)

    def records(
        self, values: Iterable[dict[str, Any] | bytes | None], at: datetime = NOW, partition: int = 0
    ) -> DataFrame:
        rows = []
        for value in values:
            payload = json.dumps(value).encode() if isinstance(value, dict) else value
            rows.append(("topic", partition, self._next[partition], at, 0, b"key", payload, []))
            self._next[partition] += 1
        schema = StructType.fromDDL(KAFKA_COLUMNS)
        return self._spark.createDataFrame(rows, schema)

    def append(
        self, path: str, values: Iterable[dict[str, Any] | bytes | None], at: datetime = NOW, partition: int = 0
    ) -> None:
        """A Delta table of such records stands in for the topic: a stream can follow either."""
        self.records(values, at, partition).coalesce(1).write.format("delta").mode("append").save(path)


@pytest.fixture
def topic(spark: SparkSession) -> Topic:
    return Topic(spark)


class Silver:
    """The real query, over a Delta table with Kafka's columns in the place of the topic."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self.spark, self.settings = spark, settings
        self.source = f"{settings.lake_uri}/topic"
        for table in silver.TABLES:
            table.ensure(spark, settings)

    def run(self) -> StreamingQuery:
        """Processes what is there, as a service that starts, catches up and stops."""
        records = self.spark.readStream.format("delta").option("maxFilesPerTrigger", 1).load(self.source)
        query = silver.query(records, self.settings, silver.writer(self.settings)).trigger(availableNow=True).start()
        query.awaitTermination()
        return query

    def checkpoint(self) -> Path:
        return Path(self.settings.checkpoint("silver").removeprefix("file://"))

    def forget_last_commit(self) -> int:
        return forget_last_commit(self.checkpoint())


def forget_last_commit(checkpoint: Path) -> int:
    """What a crash after a batch's writes and before its commit leaves behind; the batch's number."""
    commits = checkpoint / "commits"
    last = max(int(path.name) for path in commits.iterdir() if path.name.isdigit())
    (commits / str(last)).unlink()
    return last


def batches(path: Path) -> Iterator[tuple[datetime, list[dict[str, Any] | bytes]]]:
    """A golden case's input, a record a line: each batch with its time at the broker."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["batch"], []).append(record)
    for batch in found.values():
        values = [event(**r["event"]) if "event" in r else r["value"].encode() for r in batch]
        yield datetime.fromisoformat(batch[0]["kafka_time"]), values


@contextlib.contextmanager
def full_disk(module: ModuleType, append: str, table: str) -> Iterator[None]:
    """Lets the module's appends to a table, by this function's name, fail, and expects that this is not swallowed."""
    working = getattr(lake, append)

    def failing(df: DataFrame, path: str, app_id: str, version: int) -> None:
        if path.endswith(table):
            raise OSError("no space left on device")
        working(df, path, app_id, version)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, append, failing)
        with pytest.raises(Exception, match="no space left"):
            yield


def _postgres_binaries() -> Path:
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    on_path = shutil.which("pg_ctl")
    if on_path:
        candidates.append(Path(on_path).parent)
    for directory in candidates:
        if (directory / "initdb").exists() and (directory / "pg_ctl").exists():
            return directory
    pytest.fail("PostgreSQL's server is not installed; `make prepare` installs it (Debian: apt-get install postgresql)")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A private PostgreSQL server on a Unix socket; its connection string."""
    binaries = _postgres_binaries()
    # Not pytest's own directory: the server's user must be able to enter it, and socket paths are short.
    base = Path(tempfile.mkdtemp(prefix="ckpg-", dir="/tmp"))
    as_user: list[str] = []
    user = "postgres"
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(base, user=user)
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    data = base / "data"

    def run(*command: str | Path) -> None:
        done = subprocess.run([*as_user, *map(str, command)], capture_output=True, text=True, cwd=base, check=False)
        if done.returncode:
            pytest.fail(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")

    run(binaries / "initdb", "-D", data, "-U", "clickstream", "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
    options = f"-k {base} -c listen_addresses= -c fsync=off"
    run(binaries / "pg_ctl", "-D", data, "-l", base / "log", "-o", options, "-w", "start")
    try:
        with psycopg.connect(f"host={base} user=clickstream dbname=postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE analytics")
        yield f"host={base} user=clickstream dbname=analytics"
    finally:
        run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def dsn(postgres: str) -> Iterator[str]:
    yield postgres
    with psycopg.connect(postgres) as connection:
        connection.execute("DROP SCHEMA IF EXISTS gold CASCADE")


@pytest.fixture
def marts(dsn: str) -> Iterator[MartWriter]:
    """A writer of the marts; the schemas beside gold's are gone afterwards."""
    writer = MartWriter(dsn, application_name="unit")
    yield writer
    writer.close()
    with psycopg.connect(dsn) as connection:
        connection.execute("DROP SCHEMA IF EXISTS alerts, quality CASCADE")
