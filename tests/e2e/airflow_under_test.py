"""Airflow as a user has it: its programming interface, its page, and what receives its alerts."""

from __future__ import annotations

import email
import email.policy
import json
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from platform_under_test import wait_until

# This machine, as the guests see it.
BRIDGE = "192.168.56.1"
ENDED = ("success", "failed")


@dataclass
class Airflow:
    """The few calls of Airflow's REST interface that the tests need."""

    address: str
    user: str = "admin"
    password: str = "admin"
    token: str = ""
    # What ran: DAG, kind of run, state, seconds.
    history: list[tuple[str, str, str, float]] = field(default_factory=list)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request, after a login when there was none or it is over; HTTPError says what was answered."""
        for attempt in (1, 2):
            request = urllib.request.Request(
                f"http://{self.address}:8087{path}",
                method=method,
                data=None if body is None else json.dumps(body).encode(),
                headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"},
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 401 or attempt == 2 or path == "/auth/token":
                    raise
                login = {"username": self.user, "password": self.password}
                self.token = self.call("POST", "/auth/token", login)["access_token"]
        raise AssertionError("unreachable")

    def dags(self) -> list[str]:
        return sorted(dag["dag_id"] for dag in self.call("GET", "/api/v2/dags?limit=100")["dags"])

    def pause(self, dags: str = "%") -> None:
        """Pause the DAGs like this, by default all. One that is paused starts nothing and goes on with nothing."""
        self.call(
            "PATCH",
            f"/api/v2/dags?dag_id_pattern={urllib.parse.quote(dags)}&update_mask=is_paused",
            {"is_paused": True},
        )

    def idle(self, timeout: float = 600) -> None:
        """Wait until no task is at work."""

        def none_running() -> bool:
            found = self.call("GET", "/api/v2/dags/~/dagRuns/~/taskInstances?state=running&state=queued")
            names = [f"{task['dag_id']}.{task['task_id']}" for task in found["task_instances"]]
            assert not names, f"at work: {names}"
            return True

        wait_until(none_running, timeout, "no task is at work")

    def close(self) -> None:
        """Call the runs done that the clock has started, so that those of a test do not wait behind them."""
        self.idle()
        for state in ("running", "queued"):
            for run in self.call("GET", f"/api/v2/dags/~/dagRuns?state={state}&limit=100")["dag_runs"]:
                self.call("PATCH", self._path(run["dag_id"], run["dag_run_id"]), {"state": "success"})

    def slots(self, pool: str, slots: int) -> None:
        """How many tasks of a pool may run from now on."""
        body = {"pool": pool, "slots": slots, "include_deferred": False}
        self.call("PATCH", f"/api/v2/pools/{pool}?update_mask=slots", body)

    def trigger(self, dag: str, **conf: Any) -> str:
        """Start a run as a person would; its id. The DAG is not paused any more."""
        self.call("PATCH", f"/api/v2/dags/{dag}?update_mask=is_paused", {"is_paused": False})
        names = {name.rstrip("_"): value for name, value in conf.items()}
        run = self.call("POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": names})
        return str(run["dag_run_id"])

    def _path(self, dag: str, run: str) -> str:
        return f"/api/v2/dags/{dag}/dagRuns/{urllib.parse.quote(run, safe='')}"

    def runs(self, dag: str) -> list[dict[str, Any]]:
        return list(self.call("GET", f"/api/v2/dags/{dag}/dagRuns?order_by=-run_after&limit=50")["dag_runs"])

    def tasks(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        found = self.call("GET", f"{self._path(dag, run)}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}

    def reached(self, dag: str, run: str, task: str, state: str, timeout: float = 300) -> None:
        """Wait until a task has a state."""

        def there() -> bool:
            found = self.tasks(dag, run).get(task, {}).get("state")
            assert found == state, f"it is {found}"
            return True

        wait_until(there, timeout, f"{dag}.{task} is {state}")

    def end(self, dag: str, run: str, timeout: float = 600) -> dict[str, Any]:
        """Wait for the end of a run; what Airflow says of it."""

        def ended() -> dict[str, Any]:
            found = dict(self.call("GET", self._path(dag, run)))
            assert found["state"] in ENDED, f"{found['state']}, tasks {self.states(dag, run)}"
            return found

        found = wait_until(ended, timeout, f"{dag} {run} ends")
        self.history.append((dag, found["run_type"], found["state"], found["duration"] or 0))
        return found

    def states(self, dag: str, run: str) -> dict[str, str | None]:
        return {name: task["state"] for name, task in self.tasks(dag, run).items()}

    def log(self, dag: str, run: str, task: str) -> str:
        """The text of a task's last try."""
        tries = max(1, self.tasks(dag, run)[task]["try_number"])
        path = f"{self._path(dag, run)}/taskInstances/{task}/logs/{tries}?full_content=true"
        lines = self.call("GET", path)["content"]
        return "\n".join(str(line.get("event", line)) if isinstance(line, dict) else str(line) for line in lines)

    def green(self, dag: str, run: str, timeout: float = 600) -> dict[str, Any]:
        """Wait for the end of a run that has to be good; a failure carries its logs."""
        found = self.end(dag, run, timeout)
        if found["state"] != "success":
            bad = [name for name, state in self.states(dag, run).items() if state == "failed"]
            raise AssertionError("\n".join(f"{dag}.{name}:\n{self.log(dag, run, name)[-4000:]}" for name in bad))
        return found


class Webhook:
    """Takes alerts by HTTP on the bridge; while it is down nothing listens at its port."""

    def __init__(self) -> None:
        self.keys: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()
        self.down()

    def up(self) -> None:
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert body["key"] == self.headers["Idempotency-Key"]
                sink.keys[body["key"]] += 1
                sink.bodies.append(body)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((BRIDGE, self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def down(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class Mailbox:
    """Takes mails by SMTP on the bridge."""

    def __init__(self) -> None:
        self.keys: Counter[str] = Counter()
        self.subjects: list[str] = []
        with socket.create_server((BRIDGE, 0)) as free:
            self.port = free.getsockname()[1]
        self._controller = Controller(self, hostname=BRIDGE, port=self.port)
        self._controller.start()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert message["Message-ID"]
        self.keys[str(message["X-Alert-Key"])] += 1
        self.subjects.append(str(message["Subject"]))
        return "250 OK"

    def close(self) -> None:
        self._controller.stop()
