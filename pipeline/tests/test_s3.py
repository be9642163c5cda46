"""A lake on S3: the same streams and jobs, and of two writers that commit at once neither loses a row.

The server is moto's, over HTTP; the file system and the jars are those of a node.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from conftest import NOW, Silver, Topic, event
from moto.server import DomainDispatcherApplication, create_backend_app
from py4j.protocol import Py4JJavaError
from werkzeug.serving import WSGIRequestHandler, make_server

from clickstream import account, bronze, compact, gold, lake, silver
from clickstream.lake import JobError, locked
from clickstream.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pyspark.sql import SparkSession

BUCKET = "lake"
COMMITS = 6
# What a node's spark-defaults.conf does not say: where the stand-in is, and its keys instead of the instance's role.
S3A = {
    "fs.s3a.path.style.access": "true",
    "fs.s3a.connection.ssl.enabled": "false",
    "fs.s3a.endpoint.region": "us-east-1",
    "fs.s3a.access.key": "testing",
    "fs.s3a.secret.key": "testing",
    # What fails here fails for good.
    "fs.s3a.attempts.maximum": "1",
    "fs.s3a.retry.limit": "1",
}
# A driver of its own, which commits to a table as often as it can.
OTHER_DRIVER = """
import sys
from clickstream.session import spark_session
from clickstream.settings import Settings
lake, path, commits = sys.argv[1], sys.argv[2], int(sys.argv[3])
spark = spark_session(Settings(lake_uri=lake, spark_master="local[1]", driver_memory="512m"), "other")
rows = lambda n: spark.range(n, n + 1).selectExpr("id", "'other' AS writer").coalesce(1)
print("ready", flush=True)
sys.stdin.readline()
for n in range(commits):
    rows(n).write.format("delta").mode("append").option("userMetadata", "other").save(path)
"""


class Handler(WSGIRequestHandler):
    """Without a second answer to a client that asks whether to go on: the first is werkzeug's own."""

    def handle_expect_100(self) -> bool:
        return True


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server of S3 that handles one request at a time, so that its conditions hold as those of S3 do."""
    one_at_a_time = threading.Lock()
    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with one_at_a_time:
            return list(moto(environ, start_response))

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def s3(endpoint: str, spark: SparkSession) -> Any:
    """A client of the server, on which the bucket exists and which the session uses."""
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    for key, value in (S3A | {"fs.s3a.endpoint": endpoint}).items():
        conf.set(key, value)
    return client


@pytest.fixture
def settings(s3: Any, tmp_path: Path) -> Settings:
    return Settings(lake_uri=f"s3a://{BUCKET}/{uuid.uuid4().hex}", status_dir=str(tmp_path / "status"))


def offsets(spark: SparkSession, settings: Settings, *tables: str) -> Counter[tuple[int, int]]:
    """How often each (partition, offset) is in the tables."""
    return Counter(
        (row["partition"], row["offset"])
        for table in tables
        for row in spark.read.format("delta").load(settings.table(table)).select("partition", "offset").collect()
    )


def test_bronze_to_gold_with_the_conservation_law(
    spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real queries with their checkpoints on S3, stopped and started between batches, then the batch layer."""
    # Those that are looked at.
    monkeypatch.setattr(compact, "TABLES", silver.TABLES)
    streams, topic = Silver(spark, settings), Topic(spark)
    bronze.CLICKSTREAM.ensure(spark, settings)
    gold.prepare(spark, settings)

    def run() -> None:
        records = spark.readStream.format("delta").load(streams.source)
        bronze.query(records, settings, bronze.writer(settings)).trigger(availableNow=True).start().awaitTermination()
        streams.run()
        follow()

    def follow() -> None:
        writer = gold.GoldWriter(spark, settings, None)
        gold.build(spark, settings, writer).trigger(availableNow=True).start().awaitTermination()

    topic.append(streams.source, [event(1), event(1), event(2, event_type="purchase"), b"{", event(3, price=-1)])
    topic.append(streams.source, [event(4, event_type="add_to_cart")], partition=1)
    run()
    late = event(9, timestamp="2025-11-29T11:58:00.000Z")
    later = NOW + timedelta(hours=2)
    topic.append(streams.source, [event(5, timestamp="2025-11-29T14:00:00.000Z")], at=later)
    topic.append(streams.source, [late, event(5, timestamp="2025-11-29T14:00:00.000Z")], at=later, partition=2)
    run()

    report = account.account(spark, settings, {("topic", 0): 6, ("topic", 1): 1, ("topic", 2): 2})
    assert report.unexplained == []
    archived = offsets(spark, settings, "bronze.clickstream")
    assert archived == Counter([*((0, n) for n in range(6)), (1, 0), (2, 0), (2, 1)])
    assert offsets(spark, settings, "silver.events", "silver.rejects") == archived
    dispositions = Counter(row["disposition"] for row in silver.REJECTS.read(spark, settings).collect())
    assert dispositions == {"invalid": 2, "duplicate": 2}

    follow()  # what the accounting added
    final = {
        f"{row['window_start']:%H:%M}": (row["views"], row["carts"], row["purchases"])
        for row in gold.FUNNEL_1M.table.read(spark, settings).collect()
    }
    assert final == {"11:58": (1, 0, 0), "12:00": (1, 1, 1)}
    compact.compact(spark, settings)
    assert offsets(spark, settings, "silver.events", "silver.rejects") == archived


def test_two_drivers_at_once_lose_nothing(
    spark: SparkSession, endpoint: str, settings: Settings, tmp_path: Path
) -> None:
    path = settings.table("test.shared")
    spark.range(0).selectExpr("id", "'none' AS writer").write.format("delta").save(path)
    # The driver of a batch job on another node: what the node says, and where the stand-in is.
    defaults = (Path(os.environ["SPARK_CONF_DIR"]) / "spark-defaults.conf").read_text()
    node = S3A | {"fs.s3a.endpoint": endpoint}
    lines = "".join(f"spark.hadoop.{key} {value}\n" for key, value in node.items())
    (tmp_path / "spark-defaults.conf").write_text(defaults + lines)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_DRIVER, settings.lake_uri, path, str(COMMITS)],
        env=os.environ | {"SPARK_CONF_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        mine = 0
        while other.poll() is None:
            rows = spark.range(mine, mine + 1).selectExpr("id", "'this' AS writer").coalesce(1)
            rows.write.format("delta").mode("append").option("userMetadata", "this").save(path)
            mine += 1
        assert other.returncode == 0
    finally:
        other.kill()
        other.wait()
    rows = Counter((row["writer"], row["id"]) for row in spark.read.format("delta").load(path).collect())
    assert rows == Counter([*(("this", n) for n in range(mine)), *(("other", n) for n in range(COMMITS))])
    # One version a commit, none written over; and the drivers did meet.
    history = spark.sql(f"DESCRIBE HISTORY delta.`{path}`").orderBy("version").collect()
    assert [row["version"] for row in history] == list(range(mine + COMMITS + 1))
    writers = [row["userMetadata"] for row in history[1:]]
    assert sum(one != next_one for one, next_one in itertools.pairwise(writers)) > 2


def log_store(spark: SparkSession) -> Any:
    jvm = spark._jvm
    assert jvm is not None
    return jvm.clickstream.S3Log(spark.sparkContext._jsc.hadoopConfiguration())


def write(spark: SparkSession, path: str, text: str, *, overwrite: bool = False) -> None:
    jvm = spark._jvm
    assert jvm is not None
    lines = jvm.java.util.List.of(text).iterator()
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    log_store(spark).write(jvm.org.apache.hadoop.fs.Path(path), lines, overwrite, conf)


def test_of_commits_of_one_version_exactly_one_wins(spark: SparkSession, s3: Any, settings: Settings) -> None:
    def race(version: int) -> None:
        path = f"{settings.lake_uri}/log/{version:020d}.json"
        won: list[str] = []
        lost: list[str] = []
        together = threading.Barrier(4)

        def commit(name: str) -> None:
            together.wait()
            try:
                write(spark, path, name)
                won.append(name)
            except Py4JJavaError as error:
                lost.append(error.java_exception.getClass().getName())

        threads = [threading.Thread(target=commit, args=(name,)) for name in ("a", "b", "c", "d")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        key = path.removeprefix(f"s3a://{BUCKET}/")
        assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode().splitlines() == won
        assert lost == ["java.nio.file.FileAlreadyExistsException"] * 3

    for version in range(5):
        race(version)


def test_a_commit_whose_answer_was_lost_is_known_again(spark: SparkSession, settings: Settings) -> None:
    """The client repeats the write, finds the object there, and it is its own."""
    path = f"{settings.lake_uri}/log/{0:020d}.json"
    write(spark, path, "mine")
    write(spark, path, "mine")
    with pytest.raises(Py4JJavaError, match="FileAlreadyExistsException"):
        write(spark, path, "another's")
    write(spark, path, "replaced", overwrite=True)


def test_one_job_at_a_time(spark: SparkSession, settings: Settings) -> None:
    with (
        locked(spark, settings, "job"),
        pytest.raises(JobError, match="holds s3a://"),
        locked(spark, settings, "job"),
    ):
        pytest.fail("two jobs hold one lock")
    with locked(spark, settings, "job"):
        pass


def locks(s3: Any, settings: Settings) -> list[str]:
    """Names of the files of locks; their folder stays, as an object of its own."""
    prefix = settings.lake_uri.removeprefix(f"s3a://{BUCKET}/") + "/_locks/"
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return [each["Key"].removeprefix(prefix) for each in found if each["Key"] != prefix]


def leave(s3: Any, settings: Settings, name: str, run: str) -> None:
    """The file of a run that was killed more than a minute ago."""
    key = f"{settings.lake_uri.removeprefix(f's3a://{BUCKET}/')}/_locks/{name}"
    s3.put_object(Bucket=BUCKET, Key=key, Body=f"{time.time() - 61:.3f} app-1 {run}".encode())


@pytest.mark.parametrize("generations", [1, 2])
def test_of_those_who_find_a_lock_expired_one_gets_it(
    spark: SparkSession, s3: Any, settings: Settings, generations: int
) -> None:
    """Also when the run that took over from the first was killed, too."""
    for _ in range(3):
        leave(s3, settings, "job", "first")
        if generations == 2:
            leave(s3, settings, "job.first", "second")
        together, tried = threading.Barrier(3), threading.Barrier(3)
        held: list[str] = []
        refused: list[str] = []

        def contend(
            name: str, together: threading.Barrier, tried: threading.Barrier, held: list[str], refused: list[str]
        ) -> None:
            together.wait()
            try:
                with locked(spark, settings, "job"):
                    held.append(name)
                    tried.wait(60)
            except JobError:
                refused.append(name)
                tried.wait(60)

        threads = [
            threading.Thread(target=contend, args=(name, together, tried, held, refused)) for name in ("a", "b", "c")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 2)
        assert locks(s3, settings) == []


def test_a_lock_that_another_took_over_and_gave_back_is_a_new_one(
    spark: SparkSession, s3: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of that after this run saw it expired."""
    leave(s3, settings, "job", "first")
    read = lake._Locks.read
    seen: list[str] = []

    def slow(self: lake._Locks, uri: str) -> tuple[float, str]:
        found = read(self, uri)
        if not seen:
            seen.append(uri)
            with locked(spark, settings, "job"):
                assert locks(s3, settings) == ["job", "job.first"]
            assert locks(s3, settings) == []
        return found

    monkeypatch.setattr(lake._Locks, "read", slow)
    with locked(spark, settings, "job"):
        assert locks(s3, settings) == ["job"]
    assert locks(s3, settings) == []


def test_a_run_that_comes_back_late_leaves_the_lock_to_its_successor(
    spark: SparkSession, s3: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lake, "LOCK_EXPIRES_S", -1.0)
    with locked(spark, settings, "job"):
        successor = locked(spark, settings, "job")
        successor.__enter__()
        monkeypatch.undo()
    assert len(locks(s3, settings)) == 2
    with pytest.raises(JobError, match="holds s3a://"), locked(spark, settings, "job"):
        pass
    successor.__exit__(None, None, None)
    assert locks(s3, settings) == []


def test_a_commit_that_was_not_written_to_its_end_is_none(
    spark: SparkSession, s3: Any, settings: Settings, tmp_path: Path
) -> None:
    """The disk that buffers it is full: what is there already must not become the object."""
    folder = tmp_path / "buffer"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "buffer", folder], check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        jvm = spark._jvm
        assert jvm is not None
        conf = jvm.org.apache.hadoop.conf.Configuration(spark.sparkContext._jsc.hadoopConfiguration())
        conf.set("fs.s3a.buffer.dir", str(folder))
        conf.set("fs.s3a.multipart.size", "5M")
        conf.set("fs.s3a.impl.disable.cache", "true")
        path = f"{settings.lake_uri}/log/{0:020d}.json"
        lines = jvm.java.util.List.of("x" * (12 << 20)).iterator()
        with pytest.raises(Py4JJavaError, match=r"directory|space"):
            jvm.clickstream.S3Log(conf).write(jvm.org.apache.hadoop.fs.Path(path), lines, False, conf)
        prefix = path.removeprefix(f"s3a://{BUCKET}/")
        assert "Contents" not in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    finally:
        subprocess.run(["umount", folder], check=True)
