"""Role service goes through the nodes one by one, and stops at the first that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from repository import ROOT

# Tells which node it was asked on; on one of them the service does not become healthy.
NODECTL = """#!/bin/sh
echo "$NODE $*" >>'{folder}/asked'
test "$(wc -l <'{folder}/asked')" != {broken} || exit 1
echo '{answer}'
"""
ANSWER = {"changed": True, "action": "restart", "newer": [], "healthy": True}


def play(folder: Path, broken: int) -> tuple[int, list[str]]:
    """The exit status, and what nodectl was asked, of a play on three nodes; the one asked as number `broken` fails."""
    program = folder / "nodectl"
    program.write_text(NODECTL.format(folder=folder, broken=broken, answer=json.dumps(ANSWER)))
    program.chmod(0o755)
    rolling = {
        "hosts": "all",
        "connection": "local",
        "gather_facts": False,
        "environment": {"NODE": "{{ inventory_hostname }}", "PATH": f"{folder}:{os.environ['PATH']}"},
        "tasks": [
            {
                "ansible.builtin.include_role": {"name": "service", "tasks_from": "apply"},
                "vars": {"service_name": "shop"},
            }
        ],
    }
    (folder / "play.yml").write_text(yaml.safe_dump([rolling]))
    hosts = {name: {"ansible_python_interpreter": sys.executable} for name in ("a", "b", "c")}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts}}))
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", folder / "hosts.yml", folder / "play.yml"],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"), "ANSIBLE_ANY_ERRORS_FATAL": "false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (folder / "asked").exists(), done.stdout + done.stderr
    return done.returncode, (folder / "asked").read_text().splitlines()


@pytest.mark.parametrize(("broken", "reached"), [(0, 3), (1, 1), (2, 2)])
def test_nodes_after_one_that_fails_are_not_touched(tmp_path: Path, broken: int, reached: int) -> None:
    status, asked = play(tmp_path, broken)
    assert len(asked) == reached, asked
    assert {line.split(" ", 1)[1] for line in asked} == {"apply shop"}
    assert len({line.split()[0] for line in asked}) == reached, "each node once"
    assert (status != 0) == bool(broken)
