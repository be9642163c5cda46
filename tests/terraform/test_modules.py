"""Terraform's own checks: format, validity, each module with a mocked provider, and each refusal with its message."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

MODULES = ("network", "lake", "access", "nodes")
NODE = {
    "groups": ["zookeeper", "kafka", "spark_master", "spark_worker", "postgres", "airflow", "pipeline"],
    "size": "small",
    "zone": "a",
}
BROKER = {"groups": ["zookeeper", "kafka"], "size": "small", "zone": "b"}
RIGHT: dict[str, Any] = {
    "name": "clickstream-test",
    "region": "us-east-1",
    "admin_cidrs": ["203.0.113.7/32"],
    "admin_public_key": "ssh-ed25519 AAAA admin",
    "nodes": {"one": NODE},
}


def nodes(**changes: Any) -> dict[str, Any]:
    """A node with changes."""
    return {"nodes": {"one": NODE | changes}}


def groups(*names: str) -> dict[str, Any]:
    """A node with these groups only."""
    return nodes(groups=list(names))


ALL = tuple(NODE["groups"])


def without(group: str) -> dict[str, Any]:
    """A node with all groups but one."""
    return groups(*(name for name in ALL if name != group))


# What is wrong, the variable, and what the message says to do.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a name that a bucket cannot have": ({"name": "Clickstream_1"}, "name", "use 3 to 32 lower-case letters"),
    "no region": ({"region": "Frankfurt"}, "region", "for example us-east-1"),
    "public addresses": ({"network_cidr": "8.8.0.0/16"}, "network_cidr", "give a private network"),
    "a network that is too small": ({"network_cidr": "10.0.0.0/24"}, "network_cidr", "from /16 to /20"),
    "four NAT gateways": ({"nat_gateways": 4}, "nat_gateways", "give 1, 2 or 3"),
    "a retention that there is not": ({"flow_log_days": 8}, "flow_log_days", "give one of 1, 3, 5, 7"),
    "the whole world": ({"admin_cidrs": ["0.0.0.0/0"]}, "admin_cidrs", "give your own, for example 203.0.113.7/32"),
    "half of the world": ({"admin_cidrs": ["203.0.113.7/32", "128.0.0.0/1"]}, "admin_cidrs", "wider than /16"),
    "no admin": ({"admin_cidrs": []}, "admin_cidrs", "give at least one IPv4 network"),
    "an address that is none": ({"admin_cidrs": ["203.0.113/32"]}, "admin_cidrs", "give at least one IPv4 network"),
    "a private key": (
        {"admin_public_key": "-----BEGIN KEY"},
        "admin_public_key",
        "the line of your .pub file",
    ),
    "an image that is none": ({"ami_id": "debian13"}, "ami_id", "leave it out for the newest Debian 13"),
    "no node": ({"nodes": {}}, "nodes", "name at least one"),
    "a node's name that no host can have": ({"nodes": {"One_1": NODE}}, "nodes", "a letter first"),
    "a group that there is not": (groups(*ALL, "zookeper"), "nodes", "groups from this list: zookeeper, kafka"),
    "HDFS beside S3": (groups(*ALL, "hdfs_namenode"), "nodes", "remove hdfs_namenode and hdfs_datanode"),
    "an unknown size": (nodes(size="huge"), "nodes", "size is one of large, medium, memory, small; add a line"),
    "an unknown zone": (nodes(zone="d"), "nodes", "zone is a, b or c"),
    "a disk that is too small": (
        nodes(disks={"k": {"size_gib": 4, "mount": "/var/lib/k"}}),
        "nodes",
        "from 8 to 16384",
    ),
    "a disk over the system": (nodes(disks={"k": {"size_gib": 40, "mount": "/"}}), "nodes", "a mount such as /var"),
    "two disks at one place": (
        nodes(disks={name: {"size_gib": 40, "mount": "/var/lib/kafka"} for name in ("a", "b")}),
        "nodes",
        "give each disk of a node a mount of its own",
    ),
    "a root disk that is too small": (nodes(root_gib=8), "nodes", "root_gib is 16 or more"),
    "an even number of ZooKeepers": ({"nodes": {"one": NODE, "two": BROKER}}, "nodes", "has to be odd"),
    "no PostgreSQL": (
        groups(*(group for group in ALL if group != "postgres")),
        "nodes",
        "exactly one node is in each of",
    ),
    "no worker": (
        groups(*(group for group in ALL if group != "spark_worker")),
        "nodes",
        "put at least one node into each",
    ),
    "more copies than brokers": (
        {"kafka_replication_factor": 3},
        "kafka_replication_factor",
        "lower it or add brokers",
    ),
    "no copy": ({"kafka_replication_factor": 0}, "kafka_replication_factor", "a whole number from 1"),
    "versions that are kept for ever": ({"lake_keep_versions_days": 1000}, "lake_keep_versions_days", "give 1 to 365"),
    "variables that are a list": ({"inventory_variables": ["a"]}, "inventory_variables", "give a map of variables"),
}


def terraform(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["terraform", f"-chdir={folder}", *words], env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def platform(modules: Path, plain: dict[str, str]) -> Path:
    """The platform's module, ready to be tested."""
    folder = modules / "platform"
    done = terraform(folder, plain, "init", "-input=false")
    assert done.returncode == 0, done.stderr
    return folder


def test_format(modules: Path, plain: dict[str, str]) -> None:
    done = terraform(modules, plain, "fmt", "-check", "-recursive", "-diff")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_module(modules: Path, plain: dict[str, str], name: str) -> None:
    folder = modules / "modules" / name
    assert (done := terraform(folder, plain, "init", "-input=false")).returncode == 0, done.stderr
    done = terraform(folder, plain, "test", "-no-color")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    assert "Success! 0 passed" not in done.stdout


@pytest.fixture(scope="module")
def messages(platform: Path, plain: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What Terraform says to each wrong set of variables, and to the right one."""
    tests = platform / "tests"
    tests.mkdir()
    policy = {"target": "aws_iam_policy_document", "defaults": {"json": "{}"}}
    mocks = {"aws": {"mock_data": {"aws_iam_policy_document": {"defaults": policy["defaults"]}}}}
    cases = {"right": {}, **{name: changes for name, (changes, _, _) in REFUSED.items()}}
    files = {}
    for number, (name, changes) in enumerate(cases.items()):
        files[f"tests/case{number:02}.tftest.json"] = name
        test = {
            "mock_provider": mocks,
            "variables": RIGHT | changes,
            "run": {"plan": {"command": "plan"}},
        }
        (tests / f"case{number:02}.tftest.json").write_text(json.dumps(test))
    done = terraform(platform, plain, "test", "-json")
    found: dict[str, list[str]] = {name: [] for name in cases}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        if said["type"] == "diagnostic" and said["diagnostic"]["severity"] == "error":
            where = said.get("@testfile", "")
            found[files[where]].append(" ".join(said["diagnostic"]["detail"].split()))
    return found


def test_the_right_variables_are_not_refused(messages: dict[str, list[str]]) -> None:
    assert messages["right"] == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_variable_is_refused_with_what_to_do(messages: dict[str, list[str]], name: str) -> None:
    _, variable, fix = REFUSED[name]
    assert [said for said in messages[name] if said.startswith(f"{variable}: ") and fix in said], messages[name]


def test_every_validation_is_tried(platform: Path) -> None:
    text = (platform / "variables.tf").read_text()
    fixes = [fix for _, _, fix in REFUSED.values()]
    untried = []
    for line in text.splitlines():
        if "error_message" in line:
            message = line.partition("= ")[2].strip('" ').replace('\\"', '"')
            if not any(fix.split("zookeeper, kafka")[0].split("large, medium")[0] in message for fix in fixes):
                untried.append(message)
    assert untried == []


def test_the_environments_differ_in_variables_only(modules: Path) -> None:
    dev, prod = (modules / "environments" / name for name in ("dev", "prod"))
    assert {path.name for path in dev.glob("*.tf")} == {path.name for path in prod.glob("*.tf")}
    for path in dev.glob("*.tf"):
        if path.name != "main.tf":
            assert path.read_text() == (prod / path.name).read_text(), path.name
    heads = [(folder / "main.tf").read_text().partition("module ")[2].partition("\n\n")[0] for folder in (dev, prod)]
    assert heads[0] == heads[1]
    for folder in (dev, prod):
        blocks = [line for line in (folder / "main.tf").read_text().splitlines() if line and line[0].islower()]
        assert blocks == ["locals {", 'module "platform" {'], folder
