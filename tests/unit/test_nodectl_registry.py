"""nodectl on a node of its own: folders for its registry, and a systemctl that remembers what it was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

NODECTL = Path(__file__).resolve().parents[2] / "roles/common/files/nodectl"
SYSTEMCTL = """#!/bin/sh
if [ "$1" = show ]; then
  cat "$NODECTL_UNITS/../state"
else
  echo "$*" >>"$NODECTL_UNITS/../told"
fi
"""
# Without a process, no file is newer than it.
RUNNING = (
    "ActiveState=active SubState=running LoadState=loaded MainPID=0 NeedDaemonReload=no UnitFileState=enabled "
    "InvocationID=77"
)


class Node:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("registry", "checks", "units", "bin"):
            (folder / name).mkdir()
        (folder / "bin/systemctl").write_text(SYSTEMCTL)
        (folder / "bin/systemctl").chmod(0o755)

    def add(self, name: str, **more: Any) -> None:
        entry = {"name": name, "unit": f"{name}.service"} | more
        (self.folder / f"registry/{name}.json").write_text(json.dumps(entry))
        (self.folder / f"checks/{name}").write_text("")
        (self.folder / f"units/{name}.service").write_text("")

    def run(self, *words: str) -> dict[str, Any]:
        folders = {f"NODECTL_{name.upper()}": str(self.folder / name) for name in ("registry", "checks", "units")}
        done = subprocess.run(
            [sys.executable, NODECTL, *words],
            env=os.environ | folders | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout))

    def changed_state(self, seconds_ago: float) -> None:
        at = round((time.monotonic() - seconds_ago) * 1e6)
        (self.folder / "state").write_text(f"{RUNNING} StateChangeTimestampMonotonic={at}".replace(" ", "\n"))

    @property
    def told(self) -> list[str]:
        path = self.folder / "told"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def left(self) -> set[str]:
        return {path.name for name in ("registry", "checks", "units") for path in (self.folder / name).iterdir()}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path)
    for name in ("ecom-producer", "ecom-streams", "kafka"):
        made.add(name)
    return made


def test_services_that_are_no_longer_wanted_are_removed(node: Node) -> None:
    answer = node.run("keep", "ecom-", "ecom-bronze", "ecom-streams")
    assert answer == {"changed": True, "removed": ["ecom-producer"]}
    assert node.told == ["disable --now --quiet ecom-producer.service", "daemon-reload"]
    files = {f"{name}{end}" for name in ("ecom-streams", "kafka") for end in ("", ".json", ".service")}
    assert node.left == files
    assert node.run("keep", "ecom-", "ecom-streams") == {"changed": False, "removed": []}
    assert len(node.told) == 2, "nothing was left to do"


def test_a_check_removes_nothing(node: Node) -> None:
    before = node.left
    assert node.run("keep", "ecom-", "--check") == {"changed": True, "removed": ["ecom-producer", "ecom-streams"]}
    assert node.left == before and node.told == []


def test_an_interrupted_removal_is_finished(node: Node) -> None:
    (node.folder / "units/ecom-producer.service").unlink()
    assert node.run("keep", "ecom-", "ecom-streams") == {"changed": True, "removed": ["ecom-producer"]}
    assert node.told == ["daemon-reload"], "a unit that is gone cannot be stopped"
    assert "ecom-producer.json" not in node.left


def test_a_file_that_is_read_at_a_reload_means_a_reload_until_there_was_one(node: Node) -> None:
    rules = node.folder / "rules"
    node.add("database", reload=[str(rules)])
    rules.write_text("who may log in")
    node.changed_state(seconds_ago=10)
    answer = node.run("apply", "database", "--check", "--no-health")
    assert (answer["changed"], answer["action"], answer["newer"]) == (True, "reload", [str(rules)])
    assert node.told == []
    answer = node.run("apply", "database", "--no-health")
    assert (answer["action"], answer["invocation"]) == ("reload", "77")
    assert node.told == ["reload database.service"]
    node.changed_state(seconds_ago=0)
    assert node.run("apply", "database", "--no-health")["changed"] is False
    assert node.told == ["reload database.service"]
