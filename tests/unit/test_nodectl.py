"""What `nodectl` does with a unit in each of its states: the real script, with systemctl replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "roles/common/files/nodectl"

# What it is asked is logged; after a restart the unit is active.
SYSTEMCTL = """#!/bin/sh
case $1 in
  show) cat "$NODE/unit" ;;
  restart) echo restart >>"$NODE/log"; sed -i "s/^ActiveState=.*/ActiveState=active/" "$NODE/unit" ;;
esac
"""


class Node:
    """A node with one service, `probe`, that is always healthy once its unit is active."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.watched = folder / "probe.conf"
        for name, text in (
            ("bin/systemctl", SYSTEMCTL),
            ("bin/journalctl", "#!/bin/sh\necho from the journal\n"),
            ("checks/probe", "#!/bin/sh\necho it works\n"),
            ("registry/probe.json", json.dumps({"name": "probe", "unit": "probe.service", "health_timeout": 1})),
        ):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.log.touch()

    def unit(self, active: str, sub: str, pid: int = 0) -> None:
        properties = {"ActiveState": active, "SubState": sub, "MainPID": pid, "LoadState": "loaded", "NRestarts": 0}
        properties |= {"NeedDaemonReload": "no", "UnitFileState": "enabled", "ControlGroup": ""}
        properties |= {"InvocationID": "77", "StateChangeTimestampMonotonic": "0"}
        staged = self.folder / "unit.new"
        staged.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        staged.replace(self.folder / "unit")

    def change_configuration(self) -> None:
        """After the daemon started, when that is the first process of this machine."""
        self.watched.touch()
        path = self.folder / "registry/probe.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"watch": [str(self.watched)]}))

    def nodectl(self, *words: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "NODE": str(self.folder),
            "NODECTL_REGISTRY": str(self.folder / "registry"),
            "NODECTL_CHECKS": str(self.folder / "checks"),
        }
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, SCRIPT, *words], env=environment, stdout=pipe, stderr=pipe, text=True)

    def apply(self) -> dict[str, Any]:
        process = self.nodectl("apply", "probe")
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        return dict(json.loads(output))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize(
    ("active", "sub", "action"),
    [
        ("active", "running", "none"),
        ("reloading", "reload", "none"),
        ("activating", "start-pre", "none"),
        ("activating", "start", "none"),
        # a crash loop, in a pause between two attempts
        ("activating", "auto-restart", "start"),
        ("activating", "auto-restart-queued", "start"),
        ("inactive", "dead", "start"),
        ("failed", "failed", "start"),
    ],
)
def test_only_what_neither_runs_nor_starts_is_started(node: Node, active: str, sub: str, action: str) -> None:
    node.unit(active, sub)
    result = node.apply()
    assert (result["action"], result["changed"]) == (action, action == "start")
    assert node.log.read_text() == ("restart\n" if action == "start" else "")


@pytest.mark.parametrize(("active", "sub"), [("active", "running"), ("activating", "start")])
def test_a_daemon_older_than_its_configuration_is_restarted(node: Node, active: str, sub: str) -> None:
    node.unit(active, sub, pid=1)
    assert node.apply()["action"] == "none"
    node.change_configuration()
    result = node.apply()
    assert (result["action"], result["newer"], result["healthy"]) == ("restart", [str(node.watched)], True)


def test_a_start_takes_the_time_that_systemd_gives_it(node: Node) -> None:
    node.unit("activating", "start")
    process = node.nodectl("wait", "probe")
    time.sleep(2.5)  # the time-out for its health is one second
    assert process.poll() is None
    node.unit("active", "running")
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "probe is healthy: it works" in output


def test_a_crash_loop_is_given_up_with_the_journal(node: Node) -> None:
    node.unit("activating", "auto-restart")
    process = node.nodectl("wait", "probe")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the unit is activating (auto-restart)" in errors and "from the journal" in errors
