"""Airflow, through its programming interface as a user's script would: a DAG is triggered and goes green."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from testinfra.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable

DAG = "lake_maintenance"
# Where a task's failure is told.
JOURNALS = ["airflow-scheduler"]


class Airflow:
    """The few calls of Airflow's REST interface that the tests need."""

    def __init__(self, address: str) -> None:
        self.base = f"http://{address}:8087"
        self.token = ""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.base + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def login(self, user: str, password: str) -> None:
        self.token = self.call("POST", "/auth/token", {"username": user, "password": password})["access_token"]


@pytest.fixture
def airflow(address: str) -> Airflow:
    api = Airflow(address)
    api.login("admin", "admin")
    return api


@pytest.mark.parametrize("part", ["metadatabase", "scheduler", "dag_processor", "triggerer"])
def test_each_part_says_that_it_is_healthy(address: str, part: str) -> None:
    assert Airflow(address).call("GET", "/api/v2/monitor/health")[part]["status"] == "healthy"


def test_a_wrong_password_is_refused(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        Airflow(address).login("admin", "wrong")
    assert refused.value.code == 401


def test_nothing_is_told_without_a_login(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        Airflow(address).call("GET", "/api/v2/dags")
    assert refused.value.code in (401, 403)


def test_all_dags_were_read(airflow: Airflow) -> None:
    assert airflow.call("GET", "/api/v2/importErrors")["import_errors"] == []
    assert DAG in {dag["dag_id"] for dag in airflow.call("GET", "/api/v2/dags")["dags"]}


def test_pools_and_variables_are_those_of_the_inventory(airflow: Airflow, host: Host) -> None:
    assert airflow.call("GET", "/api/v2/pools/spark")["slots"] == 1
    assert host.check_output("airflow variables get log_max_mib").splitlines()[-1] == "512"
    assert airflow.call("GET", "/api/v2/connections")["connections"] == [], "they are in a file, not in the database"
    assert "spark" in host.check_output("airflow connections get spark_default --output plain")


def test_a_triggered_dag_goes_green_on_the_spark_cluster(
    airflow: Airflow, address: str, host: Host, wait_until: Callable[..., Any]
) -> None:
    airflow.call("PATCH", f"/api/v2/dags/{DAG}?update_mask=is_paused", {"is_paused": False})
    run_id = f"molecule-{int(time.time())}"
    airflow.call("POST", f"/api/v2/dags/{DAG}/dagRuns", {"dag_run_id": run_id, "logical_date": None})
    path = f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances"

    def ended() -> list[tuple[str, str]]:
        # up_for_retry ends the wait too: a first try that fails is a failure here.
        tasks = [(task["task_id"], task["state"]) for task in airflow.call("GET", path)["task_instances"]]
        return tasks if {state for _, state in tasks} & {"success", "failed", "up_for_retry"} else []

    assert wait_until(ended, 420) == [("compact", "success")]
    with urllib.request.urlopen(f"http://{address}:8080/json/", timeout=10) as answer:
        finished = [app["name"] for app in json.load(answer)["completedapps"] if app["state"] == "FINISHED"]
    assert finished, "no application ran on the Spark master"


def test_the_command_is_on_the_path(host: Host) -> None:
    assert DAG in host.check_output("airflow dags list --output plain")
