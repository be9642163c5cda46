"""A wrong inventory stops in preflight, says what to change, opens no connection and shows no secret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from repository import ROOT, load

CANARY = "Canary0fTheSecretsFolderThatNobodyPrints"
# Reserved for documentation: nothing answers there.
ADDRESS = "192.0.2.{}"

Edit = Callable[[dict[str, Any], dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    status: int
    output: str
    connected: bool


def add_host(inventory: dict[str, Any], name: str, *groups: str, **variables: Any) -> None:
    inventory["all"]["hosts"][name] = variables
    for group in groups:
        inventory["all"]["children"][group]["hosts"][name] = None


# Each edits a right inventory: its hosts and the variables of the site.
def nothing(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    pass


def published_password_on_a_guest(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    published_password_on_a_server(hosts, site)
    hosts["all"]["hosts"]["clickstream"]["ansible_host"] = "192.168.56.11"


def wrong_names_and_types(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    site |= {"kafka_replicaton": 3, "kafka_heep": "1g", "kafka_client_port": "ninety"}
    site["postgres_users"] = [CANARY]
    children = hosts["all"]["children"]
    children["zookeper"] = children.pop("zookeeper")


def wrong_settings(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    site["pipeline_settings"] = {"alert_min_view": 50, "retention_hours": "long"}


def wrong_lakes_and_addresses(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    site["lake_uri"] = "var/lib/lake"
    add_host(hosts, "second", ansible_host=ADDRESS.format(1), lake_uri="file://lake")
    add_host(hosts, "third")


def lake_of_one_node_for_two(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    add_host(hosts, "second", "spark_worker", ansible_host=ADDRESS.format(2))


def even_quorum(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    add_host(hosts, "second", "zookeeper", ansible_host=ADDRESS.format(2))


def more_copies_than_brokers(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    site["kafka_topics"] = [{"name": "clicks", "partitions": 3, "replication_factor": 3}]


def short_password(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    names = ("airflow", "analytics", "dashboards")
    site["postgres_users"] = [{"name": name, "password": CANARY[:15]} for name in names]


def cache_without_room(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    site |= {"postgres_shared_buffers": "768MB"}


def published_password(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    site |= {"airflow_local_login": False, "airflow_admin_password": "admin"}


def published_password_on_a_server(hosts: dict[str, Any], site: dict[str, Any]) -> None:
    site |= {"airflow_local_login": True, "airflow_admin_password": "admin"}


RIGHT: tuple[Edit, ...] = (nothing, published_password_on_a_guest)
# What the message has to say: the variable and what to do.
MISTAKES: dict[Edit, tuple[str, ...]] = {
    wrong_names_and_types: (
        "kafka_replicaton is not a variable of any role",
        "kafka_heep is not a variable of any role: did you mean kafka_heap?",
        "kafka_client_port: argument 'kafka_client_port' is of type",
        "postgres_users: ",
        "the group zookeper is not used by any role: did you mean zookeeper?",
    ),
    wrong_lakes_and_addresses: (
        "lake_uri is 'var/lib/lake'; give an absolute URI: file:///",
        "lake_uri is 'file://lake'; give an absolute URI: file:///",
        "clickstream, second have the same ansible_host, 192.0.2.1; give each its own",
        "third has no ansible_host; give its address",
    ),
    wrong_settings: (
        "CLICKSTREAM_ALERT_MIN_VIEW is no setting of the package; did you mean CLICKSTREAM_ALERT_MIN_VIEWS?",
        "CLICKSTREAM_RETENTION_HOURS: 'long' is not a whole number; write digits only",
    ),
    lake_of_one_node_for_two: ("lake_uri is file:///var/lib/lake", "clickstream, second all use", "give an hdfs://"),
    even_quorum: ("zookeeper_hosts has 2 members", "odd number", "Add or remove a host in the group 'zookeeper'"),
    more_copies_than_brokers: ("kafka_topics: clicks has replication_factor 3", "1 broker", "must be from 1 to"),
    short_password: ("postgres_users needs at least 16 characters", "leave it out to have one generated"),
    cache_without_room: ("postgres_memory_max is 1G with postgres_shared_buffers 768MB", "at least 512M beside"),
    published_password: ("airflow_admin_password is a published one. Remove it", "airflow_local_login"),
    published_password_on_a_server: (
        "clickstream at 192.0.2.1 is no guest of this machine",
        "Remove airflow_admin_password and airflow_local_login to have a password generated",
    ),
}


def site(folder: Path, edit: Edit) -> Run:
    """Run the platform's playbook against an edited copy of the topology `single`."""
    inventory = folder / "inventory"
    shutil.copytree(ROOT / "ansible/inventories/single", inventory, ignore=shutil.ignore_patterns("secrets"))
    hosts = load(inventory / "hosts.yml")
    variables = load(inventory / "group_vars/all/main.yml")
    # What is for guests of this machine only.
    guests = load(inventory / "group_vars/all/guests.yml")
    del guests["airflow_local_login"], guests["airflow_admin_password"]
    (inventory / "group_vars/all/guests.yml").write_text(yaml.safe_dump(guests))
    hosts["all"]["hosts"]["clickstream"]["ansible_host"] = ADDRESS.format(1)
    edit(hosts, variables)
    # Whatever would open a connection leaves a trace.
    ssh, trace = folder / "ssh", folder / "connected"
    ssh.write_text(f"#!/bin/sh\n: >'{trace}'\nexit 255\n")
    ssh.chmod(0o755)
    variables["ansible_ssh_executable"] = str(ssh)
    (inventory / "hosts.yml").write_text(yaml.safe_dump(hosts))
    (inventory / "group_vars/all/main.yml").write_text(yaml.safe_dump(variables))
    secrets = inventory / "secrets"
    secrets.mkdir()
    for name in (
        "airflow_admin",
        "airflow_api",
        "airflow_fernet",
        "airflow_jwt",
        "postgres_airflow",
        "postgres_analytics",
    ):
        (secrets / name).write_text(f"{CANARY}\n")
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            "-i",
            inventory,
            "-v",
            "--diff",
            "ansible/playbooks/site.yml",
        ],
        cwd=ROOT,
        env=os.environ
        | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"), "ANSIBLE_HOME": str(folder), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    # Messages are folded where they are long.
    return Run(done.returncode, " ".join((done.stdout + done.stderr).split()), trace.exists())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Edit, Run]:
    """All runs together: each mostly waits for Ansible to start."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = {edit: pool.submit(site, tmp_path_factory.mktemp("inventory"), edit) for edit in (*RIGHT, *MISTAKES)}
        return {edit: future.result() for edit, future in futures.items()}


@pytest.mark.parametrize("edit", RIGHT, ids=lambda edit: edit.__name__)
def test_a_right_inventory_passes_preflight(edit: Edit, runs: dict[Edit, Run]) -> None:
    run = runs[edit]
    assert run.connected, run.output
    assert "WARNING" not in run.output, run.output
    assert CANARY not in run.output


@pytest.mark.parametrize("edit", MISTAKES, ids=lambda edit: edit.__name__)
def test_a_wrong_inventory_stops_before_any_connection(edit: Edit, runs: dict[Edit, Run]) -> None:
    run = runs[edit]
    assert run.status != 0
    for text in MISTAKES[edit]:
        assert text in run.output, run.output
    assert not run.connected, run.output
    assert "UNREACHABLE" not in run.output
    # Part of it would be too much as well.
    assert CANARY[:15] not in run.output, run.output
