"""Spark: jobs run on the worker, Delta tables are written, finished jobs are on record."""

from __future__ import annotations

import json
import socket
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from testinfra.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "molecule-delta"
# Also proves that executors have Delta's jars: the rows are written and counted by them.
JOB = r"""
from pyspark.sql import SparkSession

path = "file:///var/lib/spark/molecule"
with SparkSession.builder.appName("@name@").getOrCreate() as spark:
    spark.range(1000).selectExpr("id", "id % 7 AS kind").write.format("delta").mode("overwrite").save(path)
    rows = spark.read.format("delta").load(path)
    print("RESULT", rows.count(), rows.groupBy("kind").count().count(), spark.sparkContext.master)
"""


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def result(host: Host) -> list[str]:
    """What the job says of itself; it runs once for all tests."""
    job = JOB.replace("@name@", NAME)
    host.check_output("printf %%s %s >/tmp/molecule_job.py && chmod 0644 /tmp/molecule_job.py", job)
    options = "--conf spark.cores.max=1 --conf spark.executor.memory=512m --conf spark.ui.enabled=false"
    said = host.check_output(f"cd /tmp && runuser -u spark -- spark-submit {options} /tmp/molecule_job.py")
    (line,) = [line for line in said.splitlines() if line.startswith("RESULT")]
    words: list[str] = line.split()
    return words


def test_a_job_writes_and_reads_a_delta_table_on_the_worker(host: Host, address: str, result: list[str]) -> None:
    assert result[1:3] == ["1000", "7"]
    assert result[3] == f"spark://{address}:7077"


def test_the_master_saw_the_job_and_has_its_worker(address: str, result: list[str]) -> None:
    state = get(f"http://{address}:8080/json/")
    assert [worker["state"] for worker in state["workers"]] == ["ALIVE"]
    finished = {app["name"]: app["state"] for app in state["completedapps"]}
    assert finished[NAME] == "FINISHED"


def test_the_history_server_has_the_job(address: str, result: list[str], wait_until: Callable[..., Any]) -> None:
    url = f"http://{address}:18080/api/v1/applications?status=completed"
    app = wait_until(lambda: next((app for app in get(url) if app["name"] == NAME), None), 60)
    jobs = get(f"http://{address}:18080/api/v1/applications/{app['id']}/jobs")
    assert jobs and {job["status"] for job in jobs} == {"SUCCEEDED"}
    executors = get(f"http://{address}:18080/api/v1/applications/{app['id']}/allexecutors")
    worked = {executor["id"]: executor["completedTasks"] for executor in executors}
    assert worked["0"] > 0 and worked["driver"] == 0, "the tasks ran in the driver, not on the worker"


def test_nobody_can_submit_over_http(address: str) -> None:
    with socket.socket() as probe:
        probe.settimeout(5)
        assert probe.connect_ex((address, 6066)) != 0


def test_sql_knows_delta(host: Host, result: list[str]) -> None:
    statement = "SELECT count(*) FROM delta.`file:///var/lib/spark/molecule`"
    options = "--master local[1] --conf spark.ui.enabled=false --conf spark.eventLog.enabled=false"
    said = host.check_output(f"cd /tmp && runuser -u spark -- spark-sql {options} -S -e %s", statement)
    assert said.split()[-1] == "1000"


def test_an_edit_restarts_the_service_it_concerns(deploy: Callable[..., None], processes: Callable[..., Any]) -> None:
    before = processes()
    deploy("spark", spark_config={"spark.history.fs.cleaner.maxAge": "8d"}, spark_worker_memory="1g")
    after = processes()
    assert {name for name in before if before[name] != after[name]} == {"spark-worker", "spark-history"}


def test_a_worker_that_starts_before_its_master_is_registered(
    host: Host, address: str, wait_until: Callable[..., Any]
) -> None:
    """Whom the master had before, it greets at the address where the new one would listen by now."""
    host.check_output("systemctl stop spark-master && systemctl stop spark-worker")
    host.check_output("systemctl start --no-block spark-worker")
    show = "systemctl show --value --property SubState spark-worker"
    wait_until(lambda: host.check_output(show) == "start-pre", 30)
    host.check_output("systemctl start spark-master")
    host.check_output("nodectl wait spark-master spark-worker")
    states = [worker["state"] for worker in get(f"http://{address}:8080/json/")["workers"]]
    assert states.count("ALIVE") == 1
