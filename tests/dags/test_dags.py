"""The DAGs as Airflow reads them, in Airflow's own environment; no guest and no database is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("probe.py")
PYTHON = ROOT / ".cache/airflow-venv/bin/python"
DAGS = {
    "airflow_maintenance",
    "backfill",
    "business_alerts",
    "daily_report",
    "data_quality",
    "gold_recompute",
    "lake_maintenance",
    "product_alerts",
    "silver_account",
}


def run(dag: str, kind: str = "manual", after: str = "2025-11-29T12:34:56+00:00", **params: Any) -> dict[str, Any]:
    return {"dag": dag, "type": kind, "after": after, "params": {name.rstrip("_"): v for name, v in params.items()}}


def end(code: int, said: str) -> dict[str, Any]:
    return {"code": code, "said": said}


def failed(run_id: str, clock: bool = False, succeeded: str = "") -> dict[str, Any]:
    return {"failed": run_id, "clock": clock, "succeeded": succeeded}


# A run or the end of a command, and what comes of it: a task with its arguments, nothing, or an error.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "after the accounting the last hours": (
        run("gold_recompute", "asset_triggered"),
        "recompute --from=2025-11-29T09:00Z --to=2025-11-29T12:00Z --max-differences=10000",
    ),
    "at night yesterday": (
        run("gold_recompute", "scheduled", "2025-11-29T00:50:00+00:00"),
        "recompute --from=2025-11-28T00:00Z --to=2025-11-29T00:00Z --max-differences=10000",
    ),
    "the hours a person asks for": (
        run(
            "gold_recompute", from_="2025-11-01T02:00:00+02:00", to="2025-11-01T05:00Z", max_differences=7, dry_run=True
        ),
        "recompute --from=2025-11-01T00:00Z --to=2025-11-01T05:00Z --max-differences=7 --dry-run",
    ),
    "more hours": (
        run("gold_recompute", hours=5),
        "recompute --from=2025-11-29T07:00Z --to=2025-11-29T12:00Z --max-differences=10000",
    ),
    "a range the wrong way round": (
        run("gold_recompute", from_="2025-11-02T00:00Z", to="2025-11-01T00:00Z"),
        "AirflowFailException: from 2025-11-02T00:00Z is not before to 2025-11-01T00:00Z; exchange or correct them",
    ),
    "half a range": (
        run("gold_recompute", from_="2025-11-02T00:00Z"),
        "AirflowFailException: to is missing; give both, or none for the last hours",
    ),
    "no whole hour": (
        run("gold_recompute", from_="2025-11-02T00:30Z", to="2025-11-02T02:00Z"),
        "AirflowFailException: from 2025-11-02T00:30Z is not a whole hour of UTC; write 2025-11-02T00:00Z",
    ),
    "no time": (
        run("gold_recompute", from_="yesterday", to="2025-11-02T02:00Z"),
        "AirflowFailException: from is 'yesterday'; write a time, for example 2025-11-29T12:00Z",
    ),
    "a backfill of everything": (run("backfill", ruleset=2, dry_run=False), "backfill --ruleset=2"),
    "a dry run is the default": (run("backfill"), "backfill --dry-run"),
    "a backfill of a range": (
        run("backfill", from_="2025-11-01T10:00:01Z", to="2025-11-02T00:00Z"),
        "backfill --from=2025-11-01T10:00:01Z --to=2025-11-02T00:00Z --dry-run",
    ),
    "a rollback": (run("backfill", rollback=True), "backfill --rollback"),
    "a backfill of the future": (
        run("backfill", from_="2999-01-01T00:00Z"),
        "AirflowFailException: from 2999-01-01T00:00Z is in the future; choose an earlier time",
    ),
    "compaction by day": (run("lake_maintenance", "scheduled", "2025-11-29T12:40:00+00:00"), "compact"),
    "vacuum at night": (run("lake_maintenance", "scheduled", "2025-11-29T03:40:00+00:00"), "compact --vacuum"),
    "vacuum when asked": (run("lake_maintenance", vacuum=True), "compact --vacuum"),
    "the report of yesterday": (
        run("daily_report", "scheduled", "2025-11-29T01:30:00+00:00"),
        "report --date=2025-11-28",
    ),
    "the report of a day": (run("daily_report", date="2025-10-01"), "report --date=2025-10-01"),
    "done": (end(0, ""), None),
    "a dry run found differences": (end(3, "clickstream: something"), None),
    "the gate": (end(4, "WARN x\nclickstream: 99 rows differ\n"), "AirflowFailException: 99 rows differ"),
    "wrong usage": (
        end(2, "usage: clickstream\nclickstream recompute: error: --from is wrong\n"),
        "AirflowFailException: --from is wrong",
    ),
    "what stays unexplained": (
        end(1, '{"ledger": []}\nclickstream: unexplained: t/0 offset 7\nclickstream: unexplained: t/1 offset 9\n'),
        "AirflowFailException: unexplained: t/0 offset 7\nunexplained: t/1 offset 9",
    ),
    "failures by the clock are one story": (
        failed("scheduled__2", clock=True, succeeded="2025-11-29T10:00:00+00:00"),
        "task:d.t:fails-since:2025-11-29T10:00:00+00:00",
    ),
    "also before the first success": (failed("scheduled__2", clock=True), "task:d.t:fails-since:ever"),
    "each run of an asset is told": (failed("asset_triggered__2"), "task:d.t:fails-since:asset_triggered__2"),
    "a webhook takes an alert": ({"status": 204}, "/hooks/T0"),
    "a webhook that redirects has not taken it": (
        {"status": 302},
        "AirflowException: the webhook answered 302 Found; write the address that takes the POST itself into "
        "alerts_webhook",
    ),
    "a webhook that is out of order": ({"status": 503}, "AirflowException: 503:Service Unavailable"),
    "a failure is tried again": (end(1, "clickstream: no hour is final\n"), "AirflowException: no hour is final"),
    "a failure without words": (end(137, ""), "AirflowException: the command ended with 137 and said nothing"),
}


def probe(folder: Path, scratch: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    if not PYTHON.exists():
        pytest.fail("Airflow's environment is not there: make .cache/airflow-venv/.stamp makes it")
    environment = os.environ | {
        "AIRFLOW_HOME": str(scratch),
        "AIRFLOW__API__BASE_URL": "http://localhost:8087",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [PYTHON, PROBE, folder], input=json.dumps(cases), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return probe(ROOT / "dags", tmp_path_factory.mktemp("airflow"), [case for case, _ in CASES.values()])


@pytest.fixture(scope="module")
def dags(told: dict[str, Any]) -> dict[str, Any]:
    return {name: dag for file in told["files"].values() for name, dag in file["dags"].items()}


def test_every_file_is_one_dag_of_its_name(told: dict[str, Any], dags: dict[str, Any]) -> None:
    assert {file: list(found["dags"]) for file, found in told["files"].items()} == {
        f"{name}.py": [name] for name in sorted(DAGS)
    }
    assert {file: found["errors"] for file, found in told["files"].items() if found["errors"]} == {}


def test_reading_them_is_quick(told: dict[str, Any]) -> None:
    """By the processor's time: how long it takes beside other work says nothing of the files."""
    used = {file: found["cpu_s"] for file, found in told["files"].items()}
    assert max(used.values()) < 1, used
    assert sum(used.values()) <= 3, used


def test_reading_them_does_nothing_else(told: dict[str, Any]) -> None:
    assert {file: found["did"] for file, found in told["files"].items() if found["did"]} == {}


def test_each_says_what_an_operator_has_to_know(dags: dict[str, Any]) -> None:
    for name, dag in dags.items():
        assert dag["doc"].strip().startswith(f"### {name}\n"), name
        assert "**When it fails" in dag["doc"], f"{name}: what is to be done when it fails?"
        assert dag["description"] and dag["tags"], name
        assert not dag["catchup"] and dag["max_active_runs"] == 1, name


def test_each_ends_in_time_or_is_told(dags: dict[str, Any]) -> None:
    for name, dag in dags.items():
        (deadline,) = dag["deadlines_s"]
        assert deadline < dag["timeout_s"], f"{name}: told before it is ended"
        for task_id, task in dag["tasks"].items():
            if task["type"] == "EmptyOperator":
                continue
            assert task["timeout_s"] <= deadline, f"{name}.{task_id}"


def test_each_task_has_an_owner_tries_again_and_tells_its_failure(dags: dict[str, Any]) -> None:
    for name, dag in dags.items():
        for task_id, task in dag["tasks"].items():
            where = f"{name}.{task_id}"
            assert task["owner"] == "data-platform", where
            assert task["on_failure"] == ["tell_failure"], where
            assert task["backoff"] and task["delay_s"] >= 30, where
            # A write of a backfill that was interrupted is a person's to take back.
            assert task["retries"] == (0 if name == "backfill" else 2), where


def test_spark_jobs_wait_for_a_slot_and_nothing_else_does(dags: dict[str, Any]) -> None:
    for name, dag in dags.items():
        for task_id, task in dag["tasks"].items():
            assert (task["pool"] == "spark") == (task["type"] == "SparkJob"), f"{name}.{task_id}"


def test_gold_follows_the_accounting_and_the_clock(dags: dict[str, Any]) -> None:
    assert dags["gold_recompute"]["schedule"] == "AssetOrTimeSchedule"
    assert dags["backfill"]["schedule"] == "NullTimetable"


@pytest.mark.parametrize("name", CASES)
def test_arguments_and_ends(told: dict[str, Any], name: str) -> None:
    expected = CASES[name][1]
    got = told["cases"][list(CASES).index(name)]
    if isinstance(got, dict):
        (arguments,) = got.values()
        got = " ".join(argument for argument in arguments if argument not in ("--json", "/usr/local/bin/clickstream"))
    assert got == expected


def test_what_is_wrong_with_a_file_is_seen(tmp_path: Path) -> None:
    """The probe finds an error, a circle, and work at import: else the tests above prove nothing."""
    folder = tmp_path / "dags"
    folder.mkdir()
    shutil.copy(ROOT / "dags/orchestration.py", folder)
    head = "from airflow.sdk import DAG\nfrom orchestration import command\n"
    circle = "with DAG('circle'):\n    a, b = command('a', 'x'), command('b', 'y')\n    a >> b >> a\n"
    (folder / "circle.py").write_text(head + circle)
    (folder / "error.py").write_text("import no_such_module  # airflow dag\n")
    (folder / "busy.py").write_text(head + "import subprocess\nsubprocess.run(['true'])\nDAG('busy')\n")
    files = probe(folder, tmp_path / "home", [])["files"]
    assert "Cycle detected" in files["circle.py"]["errors"][0]
    assert "no_such_module" in files["error.py"]["errors"][0]
    assert any("subprocess.Popen" in did for did in files["busy.py"]["did"])
