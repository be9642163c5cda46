"""What a node of the platform would have, made on this machine: Spark's jars and settings, and a Kafka broker."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


def java() -> str:
    """The Java runtime's command."""
    return str(Path(os.environ["JAVA_HOME"]) / "bin" / "java") if os.environ.get("JAVA_HOME") else "java"


def jars() -> list[Path]:
    """The jars of the role's lock: Delta Lake, Spark's Kafka source, S3A."""
    directory = os.environ.get("CLICKSTREAM_TEST_JARS", "")
    found = sorted(Path(directory).glob("*.jar")) if directory else []
    if not any("delta-spark" in jar.name for jar in found):
        pytest.exit(
            "CLICKSTREAM_TEST_JARS must name a directory with the jars of roles/spark/files/jars.lock; "
            "`make unit` provides it",
            returncode=3,
        )
    return found


def file_system(target: Path) -> Path:
    """What a lake in a folder and one on S3 need, compiled with nothing but a Java runtime, as a node does it."""
    import pyspark

    sources = [ROOT / "roles/spark/files" / name for name in ("LakeFs.java", "S3Log.java")]
    hadoop = next((Path(pyspark.__file__).parent / "jars").glob("hadoop-client-api-*.jar"))
    compiler = [java(), "-m", "jdk.compiler/com.sun.tools.javac.Main", "-Xlint:all,-classfile"]
    storage = next(jar for jar in jars() if jar.name.startswith("delta-storage-"))
    subprocess.run([*compiler, "-Werror", "-cp", f"{hadoop}:{storage}", "-d", target, *sources], check=True)
    return target


def spark_defaults(classes: Path, scratch: Path) -> str:
    """What a node's spark-defaults.conf says, for local Spark."""
    return (
        f"spark.driver.extraClassPath {':'.join(map(str, [classes, *jars()]))}\n"
        f"spark.local.dir {scratch}/local\n"
        f"spark.sql.warehouse.dir {scratch}/warehouse\n"
        "spark.hadoop.fs.AbstractFileSystem.file.impl clickstream.LakeFs\n"
        "spark.hadoop.fs.file.impl clickstream.LakeFs$Local\n"
        "spark.delta.logStore.file.impl clickstream.LakeFs$Log\n"
        "spark.delta.logStore.s3a.impl clickstream.S3Log\n"
        "spark.ui.enabled false\n"
        "spark.driver.host 127.0.0.1\n"
        "spark.driver.bindAddress 127.0.0.1\n"
    )


def configure(scratch: Path) -> None:
    """Makes the Spark session that this process starts next find what a node's spark-defaults.conf says."""
    classes, conf = scratch / "classes", scratch / "conf"
    classes.mkdir()
    conf.mkdir()
    (conf / "spark-defaults.conf").write_text(spark_defaults(file_system(classes), scratch))
    os.environ["SPARK_CONF_DIR"] = str(conf)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@contextlib.contextmanager
def kafka(home: Path, topics: dict[str, int], heap: str = "256m") -> Iterator[str]:
    """A Kafka broker with empty topics, name to partitions, until the block ends; its address.

    From the platform's own jars; one process, in KRaft mode.
    """
    from confluent_kafka.admin import AdminClient, NewTopic

    directory = Path(os.environ.get("CLICKSTREAM_TEST_KAFKA_JARS", ""))
    if not any(directory.glob("kafka_*.jar")):
        pytest.fail("CLICKSTREAM_TEST_KAFKA_JARS must name a directory with Kafka's jars; `make crash` provides it")
    port, controller = _free_ports(2)
    home.mkdir()
    (home / "log4j.properties").write_text(
        "log4j.rootLogger=WARN, err\nlog4j.appender.err=org.apache.log4j.ConsoleAppender\n"
        "log4j.appender.err.layout=org.apache.log4j.SimpleLayout\n"
    )
    config = home / "server.properties"
    config.write_text(
        "process.roles=broker,controller\nnode.id=1\n"
        f"controller.quorum.voters=1@127.0.0.1:{controller}\ncontroller.listener.names=CONTROLLER\n"
        f"listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n"
        f"log.dirs={home}/data\nauto.create.topics.enable=false\n"
        "offsets.topic.replication.factor=1\noffsets.topic.num.partitions=1\n"
    )
    command = [java(), f"-Xmx{heap}", "-XX:TieredStopAtLevel=1", "-cp", f"{home}:{directory.resolve()}/*"]
    with (home / "output").open("wb") as output:
        name = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        subprocess.run(
            [*command, "kafka.tools.StorageTool", "format", "--cluster-id", name, "--config", config],
            check=True,
            stdout=output,
            stderr=output,
        )
        process = subprocess.Popen([*command, "kafka.Kafka", config], stdout=output, stderr=output)
    try:
        address = f"127.0.0.1:{port}"
        admin = AdminClient({"bootstrap.servers": address, "log_level": 0})
        made = [NewTopic(topic, partitions, 1) for topic, partitions in topics.items()]
        for created in admin.create_topics(made, request_timeout=60, operation_timeout=60).values():
            created.result()
        yield address
    finally:
        process.kill()
        process.wait()
