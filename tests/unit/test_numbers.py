"""Brokers and ZooKeepers keep their numbers: what is on a disk belongs to one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# The name of an earlier host is later than a new one's.
HOSTS = ("broker-a", "broker-b")


def run(folder: Path, role: str, tasks: str, hosts: dict[str, dict[str, Any]], *words: str) -> str:
    """What a part of a role says, on this machine under several names."""
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "/usr/bin/python3",
        f"{role}_data_dir": f"{folder}/{{{{ inventory_hostname }}}}",
        f"{role}_config_dir": str(folder),
        f"{role}_user": "root",
        f"{role}_hosts": sorted(hosts),
        "kafka_zookeeper_hosts": sorted(hosts),
    }
    play = {
        "hosts": "all",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": {"name": f"{ROOT}/roles/{role}", "tasks_from": tasks}}],
    }
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"vars": variables, "hosts": hosts}}))
    (folder / "playbook.yml").write_text(yaml.safe_dump([play]))
    playbook = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [playbook, "-i", folder / "hosts.yml", folder / "playbook.yml", "--check", "--diff", *words],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ("fatal:" in done.stdout or "[ERROR]" in done.stdout) * 2, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


DATA = {
    "kafka": ("kafka_broker_id", "meta.properties", "#\ncluster.id=x\nbroker.id={}\nversion=0\n", "broker.id={}"),
    "zookeeper": ("zookeeper_id", "myid", "{}\n", "server.{}=broker-b"),
}


@pytest.mark.parametrize("role", DATA)
def test_another_ones_data_is_refused(tmp_path: Path, role: str) -> None:
    """A host whose name comes first was added, so that places moved."""
    number, file, content, setting = DATA[role]
    for name in HOSTS:
        (tmp_path / name).mkdir()
    (tmp_path / "broker-b" / file).write_text(content.format(1))
    said = run(tmp_path, role, "configure", {"broker-a": {}, "broker-b": {}})
    assert f"{tmp_path}/broker-b is the data of" in said
    assert f"give the host {number}: 1 in the inventory" in said

    said = run(tmp_path, role, "configure", {"broker-a": {number: 2}, "broker-b": {number: 1}})
    assert "Refuse another" in said
    assert "+ " + setting.format(1) in said or "+" + setting.format(1) in said
    assert "failed=0" in said


@pytest.mark.parametrize("role", DATA)
def test_a_number_is_not_given_twice(tmp_path: Path, role: str) -> None:
    number = DATA[role][0]
    hosts = {"broker-a": {}, "broker-b": {number: 1}, "broker-c": {}}
    said = run(tmp_path, role, "preflight", hosts)
    assert "broker-a, broker-b, broker-c have the" in said
    assert "1, 1, 3; give each host a" in said
    assert "and let those that are there keep theirs" in said
