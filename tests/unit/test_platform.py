"""What `platform` asks of the nodes: the real script, with SSH replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "ansible/scripts/platform"
# Services of two nodes, by name as nodectl lists them.
NODES = {
    "first": [
        "airflow-api-server",
        "ecom-producer",
        "kafka",
        "postgresql",
        "spark-master",
        "spark-worker",
        "zookeeper",
    ],
    "second": ["kafka", "zookeeper"],
}
SSH = """#!/bin/sh
for word; do command=$word; node=$before; before=$word; done
case $command in
  *" list --json") cat "$FOLDER/$node.json" ;;
  *) echo "$node $command" >>"$FOLDER/log"; [ "$command" != "sudo nodectl restart $BROKEN" ] ;;
esac
"""


def restart(
    folder: Path, *words: str, broken: str = "", away: str = ""
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What came of it, and what was restarted where."""
    (folder / "hosts.yml").write_text(
        yaml.safe_dump({"all": {"hosts": {name: {"ansible_host": name} for name in NODES}}})
    )
    for name, services in NODES.items():
        if name == away:
            continue
        (folder / f"{name}.json").write_text(json.dumps({"services": [{"name": service} for service in services]}))
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    (folder / "log").touch()
    done = subprocess.run(
        [sys.executable, SCRIPT, "--inventory", folder / "hosts.yml", "restart", *words],
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "FOLDER": str(folder), "BROKEN": broken},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, [line.replace("sudo nodectl restart ", "") for line in (folder / "log").read_text().splitlines()]


def test_nothing_restarts_while_a_node_is_away(tmp_path: Path) -> None:
    done, log = restart(tmp_path, away="second")
    assert done.returncode == 1
    assert "second does not answer, so nothing is restarted" in done.stderr
    assert log == []


def test_all_services_restart_after_what_they_need(tmp_path: Path) -> None:
    done, log = restart(tmp_path)
    assert done.returncode == 0, done.stderr
    assert log == [
        *("first zookeeper", "second zookeeper", "first kafka", "second kafka", "first postgresql"),
        *("first spark-master", "first spark-worker", "first airflow-api-server", "first ecom-producer"),
    ]


@pytest.mark.parametrize("words", [[], ["kafka"]], ids=["all", "one"])
def test_nothing_restarts_after_a_failure(tmp_path: Path, words: list[str]) -> None:
    done, log = restart(tmp_path, *words, broken="kafka")
    assert done.returncode == 1
    assert log[-1] == "first kafka"
    assert "kafka did not restart on first, so nothing else is restarted" in done.stderr


def test_an_unknown_service_is_answered_with_those_there_are(tmp_path: Path) -> None:
    done, log = restart(tmp_path, "kafak")
    assert done.returncode != 0 and log == []
    assert "no node runs a service 'kafak'. SERVICE is one of: airflow-api-server, ecom-producer, kafka," in done.stderr
