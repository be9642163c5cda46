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
    "zones of another region": (
        {"zones": ["us-west-2a", "us-west-2b", "us-west-2c"]},
        "zones",
        "name three zones of the",
    ),
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
    "two disks with one letter": (
        nodes(disks={name: {"size_gib": 40, "mount": f"/var/lib/{name}"} for name in ("kafka", "postgres")}),
        "nodes",
        "give each disk of a node a letter of its own, from f to p",
    ),
    "the letter of the system's disk": (
        nodes(disks={"k": {"size_gib": 40, "mount": "/var/lib/kafka", "letter": "a"}}),
        "nodes",
        "give each disk of a node a letter of its own, from f to p",
    ),
    "two brokers with one number": (
        {"nodes": {"one": NODE, "two": BROKER | {"groups": ["kafka"]}}},
        "nodes",
        "give each broker and ZooKeeper an id of its own",
    ),
    "a broker that is number nothing": (nodes(id=0), "nodes", "from 1 to 255"),
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
    "tables beside the event logs": (
        {"lake_prefix": "spark-events"},
        "lake_prefix",
        "for example lake-2; spark-events is taken",
    ),
    "a lake elsewhere": (
        {"inventory_variables": {"lake_uri": "s3a://mine/lake"}},
        "inventory_variables",
        "remove lake_uri, spark_event_log_dir, ansible_* and *_port",
    ),
    "a port that is not open": (
        {"inventory_variables": {"kafka_client_port": 9093}},
        "inventory_variables",
        "terraform/traffic.yaml which ports are open",
    ),
    "a driver's port that is not open": (
        {"inventory_variables": {"spark_config": {"spark.driver.port": 4000}}},
        "inventory_variables",
        "remove ports and the region from spark_config",
    ),
    "two words on copies": (
        {"kafka_replication_factor": 1, "inventory_variables": {"kafka_topics": []}},
        "inventory_variables",
        "leave kafka_replication_factor out",
    ),
    "variables that are a list": ({"inventory_variables": ["a"]}, "inventory_variables", "give a map of variables"),
}


# Further variables of the roles are added to what the cloud says, and what it says of Spark stays.
FURTHER: dict[str, Any] = {
    "inventory_variables": {"spark_config": {"spark.sql.shuffle.partitions": "2"}, "airflow_parallelism": 1}
}
WANTED = (
    '.spark_config["spark.sql.shuffle.partitions"] == "2"',
    '.spark_config["spark.driver.port"] == 7100',
    '.spark_config["spark.hadoop.fs.s3a.endpoint.region"] == "us-east-1"',
    ".airflow_parallelism == 1",
    ".kafka_topics[0].replication_factor == 1",
    '.lake_uri == "s3a://clickstream-test-lake-123456789012/lake"',
)
ASSERTED = {
    "further": [
        {"condition": f"${{local.group_vars{wanted}}}", "error_message": f"further variables: {wanted}"}
        for wanted in WANTED
    ]
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
    said = {
        "aws_iam_policy_document": {"json": "{}"},
        "aws_caller_identity": {"account_id": "123456789012"},
        "aws_availability_zones": {"names": ["us-east-1b", "us-east-1c", "us-east-1d", "us-east-1e"]},
    }
    mock_data = {name: {"defaults": defaults} for name, defaults in said.items()}
    mocks = {"aws": {"mock_data": mock_data}}
    cases = {"right": {}, "further": FURTHER, **{name: changes for name, (changes, _, _) in REFUSED.items()}}
    files = {}
    for number, (name, changes) in enumerate(cases.items()):
        files[f"tests/case{number:02}.tftest.json"] = name
        test = {
            "mock_provider": mocks,
            "variables": RIGHT | changes,
            "run": {"plan": {"command": "plan", "assert": ASSERTED.get(name, [])}},
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


@pytest.mark.parametrize("name", ["right", "further"])
def test_the_right_variables_are_not_refused(messages: dict[str, list[str]], name: str) -> None:
    assert messages[name] == []


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
