"""Reads DAGs as Airflow's DAG processor does, each file in a process of its own, and tells what is there as JSON.

    probe.py FOLDER < CASES

Runs in Airflow's own environment. CASES is a JSON list of runs, {"dag", "type", "after", "params"}, whose tasks'
arguments are rendered, of ends of commands, {"code", "said"}, of failures, {"failed", "clock", "succeeded"}, and of
what a webhook answers, {"status"}; each has an answer: what came out, or the exception's name and text.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.definitions.param import process_params

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(sys.argv[1]).resolve()
# Events of sys.addaudithook that are work which no import should do.
WORK = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn", "sqlite3.connect"}
VARIABLES = {
    "gold_max_differences": "10000",
    "database_retention_days": "30",
    "log_retention_days": "14",
    "log_max_mib": "512",
}


def in_a_child(work: Callable[[], Any]) -> Any:
    """What a function returns in a fork of this process, which has Airflow imported and nothing else."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            json.dump(work(), answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        told = json.load(answer)
    os.wait()
    return told


def names(callbacks: Any) -> list[str]:
    return [callback.__name__ for callback in callbacks or ()]


def described(dag: Any) -> dict[str, Any]:
    deadlines = dag.deadline if isinstance(dag.deadline, list) else [dag.deadline] if dag.deadline else []
    return {
        "doc": dag.doc_md or "",
        "description": dag.description or "",
        "tags": sorted(dag.tags),
        "catchup": dag.catchup,
        "max_active_runs": dag.max_active_runs,
        "timeout_s": dag.dagrun_timeout.total_seconds() if dag.dagrun_timeout else None,
        "deadlines_s": [deadline.interval.total_seconds() for deadline in deadlines],
        "schedule": type(dag.timetable).__name__,
        "params": sorted(dag.params),
        "tasks": {
            task.task_id: {
                "type": type(task).__name__,
                "owner": task.owner,
                "retries": task.retries,
                "delay_s": task.retry_delay.total_seconds(),
                "backoff": bool(task.retry_exponential_backoff),
                "timeout_s": task.execution_timeout.total_seconds() if task.execution_timeout else None,
                "pool": task.pool,
                "on_failure": names(task.on_failure_callback),
                "upstream": sorted(task.upstream_task_ids),
                "trigger_rule": str(task.trigger_rule),
            }
            for task in dag.tasks
        },
    }


def load(file: Path) -> dict[str, Any]:
    """One file's DAGs, its errors, the processor time of its import, and what it did besides reading code."""
    code = (str(FOLDER), sys.prefix, sys.base_prefix, "/usr/lib/python3", os.environ["AIRFLOW_HOME"], "/proc/", "/etc/")
    did: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WORK:
            did.append(f"{event} {arguments[:1]}")
        elif event == "open" and isinstance(arguments[0], str):
            path, mode = arguments[0], arguments[1] or "r"
            if set("wax+") & set(mode) or not os.path.abspath(path).startswith(code):
                did.append(f"open {path} {mode}")

    sys.addaudithook(watch)
    began, used = time.monotonic(), time.process_time()
    bag = DagBag(str(file))
    seconds, cpu = time.monotonic() - began, time.process_time() - used
    found = list(did)
    return {
        "errors": list(bag.import_errors.values()),
        "seconds": seconds,
        "cpu_s": cpu,
        "did": found,
        "dags": {dag_id: described(dag) for dag_id, dag in bag.dags.items()},
    }


def alert_key(case: dict[str, Any]) -> str:
    """Under which key a failure is told."""
    import orchestration

    keys: list[str] = []
    orchestration.raise_alert = lambda key, *_: keys.append(key)
    orchestration.tell_failure(
        {
            "ti": SimpleNamespace(dag_id="d", task_id="t", run_id=case["failed"], try_number=1),
            "dag_run": SimpleNamespace(logical_date=datetime(2025, 11, 29, tzinfo=UTC) if case["clock"] else None),
            "prev_start_date_success": datetime.fromisoformat(case["succeeded"]) if case["succeeded"] else None,
        }
    )
    return " ".join(keys)


def posted(status: int) -> str:
    """Delivers an alert to a webhook that answers so; how often it was asked."""
    import delivery

    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Location", "/login")
            self.end_headers()

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["AIRFLOW_CONN_ALERTS_WEBHOOK"] = json.dumps(
            {"conn_type": "http", "host": f"http://127.0.0.1:{server.server_port}/hooks/T0"}
        )
        try:
            delivery.to_webhook({"key": "k"}, False)
        finally:
            server.shutdown()
    return " ".join(asked)


def answer(case: dict[str, Any]) -> Any:
    """The rendered arguments of each task, or what was raised."""
    try:
        if "code" in case:
            import orchestration

            orchestration.conclude(case["code"], case["said"])
            return None
        if "failed" in case:
            return alert_key(case)
        if "status" in case:
            return posted(case["status"])
        dag = DagBag(str(FOLDER / f"{case['dag']}.py")).dags[case["dag"]]
        run = SimpleNamespace(run_type=case["type"], run_after=datetime.fromisoformat(case["after"]))
        context = {
            "dag_run": run,
            "params": process_params(dag, dag.tasks[0], case["params"], suppress_exception=False),
            "var": {"value": SimpleNamespace(**VARIABLES)},
        }
        rendered = {}
        for task in dag.tasks:
            task.render_template_fields(context, dag.get_template_env())
            arguments = getattr(task, "application_args", None) or getattr(task, "command", None) or []
            rendered[task.task_id] = [argument for argument in arguments if argument]
        return rendered
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    ignored = {"orchestration.py", "delivery.py"}
    files = [path for path in sorted(FOLDER.glob("*.py")) if path.name not in ignored]
    sys.path.append(str(FOLDER))
    cases = json.load(sys.stdin)
    told = {
        "files": {file.name: in_a_child(partial(load, file)) for file in files},
        "cases": [in_a_child(partial(answer, case)) for case in cases],
    }
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
