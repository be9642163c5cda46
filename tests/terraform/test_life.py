"""The life of an environment on a stand-in for AWS: plan, make, plan again, use its inventory, remove."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from standin import DEBIAN, ROOT

sys.path.insert(0, str(ROOT / "tests/repo"))
import test_layout

CLOUD = ROOT / "ansible/scripts/cloud"
# Which ports a node of the first group reaches on a node of the second; nothing else reaches anything. Written down
# apart from terraform/traffic.yaml, from what the roles say of their services.
DRIVER, BLOCKS, METRICS = set(range(7100, 7132)), set(range(7200, 7232)), set(range(9108, 9116))
REACHES: dict[tuple[str, str], set[int]] = {
    ("zookeeper", "zookeeper"): {2888, 3888},
    ("kafka", "zookeeper"): {2181},
    ("kafka", "kafka"): {9092, 29092},
    ("pipeline", "kafka"): {9092},
    ("airflow", "kafka"): {9092},
    ("spark_worker", "kafka"): {9092},
    ("spark_worker", "spark_master"): {7077, 8080},
    ("pipeline", "spark_master"): {7077},
    ("airflow", "spark_master"): {7077},
    ("spark_master", "spark_worker"): {7078} | DRIVER,
    ("spark_master", "pipeline"): DRIVER,
    ("spark_master", "airflow"): DRIVER,
    ("spark_worker", "spark_worker"): DRIVER | BLOCKS,
    ("spark_worker", "pipeline"): DRIVER | BLOCKS,
    ("spark_worker", "airflow"): DRIVER | BLOCKS,
    ("pipeline", "spark_worker"): BLOCKS,
    ("airflow", "spark_worker"): BLOCKS,
    ("pipeline", "postgres"): {5432},
    ("airflow", "postgres"): {5432},
    ("monitoring", "pipeline"): METRICS,
}
FROM_BASTION = {
    "airflow": {8087},
    "spark_master": {8080, 18080},
    "spark_worker": {8081},
    "postgres": {5432},
    "pipeline": METRICS,
}
# Every port that anything above or any role names, and some that nobody does.
PROBED = sorted(
    {
        22,
        2181,
        2888,
        3888,
        4040,
        5432,
        6066,
        7077,
        7078,
        7099,
        7132,
        7199,
        7232,
        8080,
        8081,
        8087,
        8088,
        9092,
        9107,
        9116,
    }
    | {18080, 29092, 40000}
    | DRIVER
    | BLOCKS
    | METRICS
)


def terraform(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["terraform", f"-chdir={folder}", *words], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 2), done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def environments(modules: Path, aws: dict[str, str]) -> Path:
    """Both environments, ready to be planned. The stand-in has no name of its own for each bucket."""
    for folder in (modules / "environments").iterdir():
        (folder / "provider_override.tf").write_text('provider "aws" {\n  s3_use_path_style = true\n}\n')
        terraform(folder, aws, "init", "-input=false")
    return modules / "environments"


class Life:
    """The environment `dev` by the user's own verbs."""

    def __init__(self, environments: Path, env: dict[str, str], inventories: Path) -> None:
        self.folder = environments / "dev"
        self.inventory = inventories / "dev"
        self.env = env | {
            "CLICKSTREAM_TERRAFORM": str(environments.parent),
            "CLICKSTREAM_INVENTORIES": str(inventories),
        }

    def cloud(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [ROOT / ".venv/bin/python", CLOUD, verb, "dev", *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)

    def output(self) -> dict[str, Any]:
        return dict(json.loads(terraform(self.folder, self.env, "output", "-json").stdout)["platform"]["value"])

    def bucket(self) -> Any:
        return client("s3", self.env, "resource").Bucket(self.output()["lake"]["bucket"])


def client(service: str, env: dict[str, str], kind: str = "client") -> Any:
    keys = {"aws_access_key_id": env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"]}
    return getattr(boto3, kind)(service, endpoint_url=env["AWS_ENDPOINT_URL"], region_name=env["AWS_REGION"], **keys)


@pytest.fixture(scope="module")
def life(environments: Path, aws: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Life:
    life = Life(environments, aws, tmp_path_factory.mktemp("inventories"))
    done = life.cloud("up", "--yes", "--machines-only")
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Apply complete!" in done.stdout
    return life


@pytest.mark.parametrize(("name", "resources"), [("dev", 93), ("prod", 164)])
def test_plan(environments: Path, aws: dict[str, str], name: str, resources: int) -> None:
    """As many resources as when the environment was last thought about."""
    done = terraform(environments / name, aws, "plan", "-input=false", "-no-color", "-out=plan")
    found = re.search(r"^Plan: .*", done.stdout, re.MULTILINE)
    assert found
    print(name, found[0])
    assert found[0] == f"Plan: {resources} to add, 0 to change, 0 to destroy."
    planned = json.loads(terraform(environments / name, aws, "show", "-json", "plan").stdout)
    open_doors = [
        change["address"]
        for change in planned["resource_changes"]
        if "ingress" in change["type"] and (change["change"]["after"].get("cidr_ipv4") or "").endswith("/0")
    ]
    assert open_doors == []


def test_the_second_plan_is_empty(life: Life) -> None:
    done = terraform(life.folder, life.env, "plan", "-input=false", "-no-color", "-detailed-exitcode")
    assert done.returncode == 0, done.stdout
    assert "No changes." in done.stdout


def test_the_image_is_debians_own(life: Life) -> None:
    instances = client("ec2", life.env).describe_instances()["Reservations"]
    assert {found["ImageId"] for each in instances for found in each["Instances"]} == {DEBIAN}


def test_the_inventory_keeps_the_schema(life: Life) -> None:
    test_layout.test_inventory_keeps_the_schema(life.inventory)
    assert test_layout.groups_of(life.inventory).keys() == test_layout.GROUPS
    variables = yaml.safe_load((life.inventory / "group_vars/all/main.yml").read_text())
    assert variables["lake_uri"] == "s3a://clickstream-dev-lake-123456789012/lake"
    (host,) = test_layout.hosts(life.inventory).values()
    assert [disk["path"] for disk in host["common_disks"]] == ["/var/lib/kafka", "/var/lib/postgresql"]
    volumes = {volume["VolumeId"].replace("-", "") for volume in client("ec2", life.env).describe_volumes()["Volumes"]}
    assert {disk["device"].rpartition("_")[2] for disk in host["common_disks"]} <= volumes


def test_preflight_takes_the_inventory(life: Life, tmp_path: Path) -> None:
    """The real playbook: syntax, then everything that is checked before a connection; then nobody answers."""
    playbook = [ROOT / ".venv/bin/ansible-playbook", "-i", life.inventory, "ansible/playbooks/site.yml"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | {
        "ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"),
        "ANSIBLE_HOME": str(tmp_path),
    }
    done = subprocess.run([*playbook, "--syntax-check"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexit 255\n")
    ssh.chmod(0o755)
    playbook += ["-e", f"ansible_ssh_executable={ssh}"]
    done = subprocess.run(playbook, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "UNREACHABLE" in done.stdout, done.stdout + done.stderr
    assert "failed=0" in done.stdout, done.stdout


def test_vagrant_takes_the_inventory(life: Life, tmp_path: Path) -> None:
    env = os.environ | {"CLICKSTREAM_INVENTORY": str(life.inventory), "VAGRANT_DOTFILE_PATH": str(tmp_path)}
    done = subprocess.run(
        ["vagrant", "status", "--machine-readable"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split(",")[1] for line in done.stdout.splitlines() if ",state," in line} == {"clickstream"}


def test_cost_and_tunnels(life: Life) -> None:
    output = life.output()
    cost = output["monthly_cost"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", cost["as_of"])
    assert cost["usd_per_month"] == round(sum(line["usd_per_month"] for line in cost["lines"]))
    (host,) = test_layout.hosts(life.inventory).values()
    tunnel = output["tunnels"]["Airflow"]
    assert tunnel["url"] == "http://localhost:8087/"
    assert f"-L 8087:{host['ansible_host']}:8087 admin@" in tunnel["command"]
    assert "ProxyJump clickstream-dev-bastion" in output["ssh_config"]


@pytest.fixture(scope="module")
def network(environments: Path, aws: dict[str, str]) -> tuple[dict[str, set[str]], Any]:
    """Groups of each class of nodes in `prod`, and all its rules as the cloud has them."""
    target = "-target=module.platform.module.access"
    terraform(environments / "prod", aws, "apply", "-auto-approve", "-input=false", target)
    ec2 = client("ec2", aws)
    found = ec2.describe_security_groups()["SecurityGroups"]
    names = {
        group["GroupId"]: group["GroupName"].removeprefix("clickstream-prod-")
        for group in found
        if group["GroupName"].startswith("clickstream-prod-")
    }
    rules = [
        rule
        for page in ec2.get_paginator("describe_security_group_rules").paginate()
        for rule in page["SecurityGroupRules"]
    ]
    classes = {name: {"bastion"} if name == "bastion" else set(name.split("-")) for name in names.values()}
    return (
        classes,
        [rule | {"Class": names[rule["GroupId"]], "Names": names} for rule in rules if rule["GroupId"] in names],
    )


def passes(rules: Any, sender: str, receiver: str, port: int) -> bool:
    """Whether a packet leaves the sender and is let in by the receiver, by the rules."""

    def lets(own: str, other: str, egress: bool) -> bool:
        return any(
            rule["IsEgress"] == egress
            and rule["Class"] == own
            and rule["IpProtocol"] == "tcp"
            and rule["FromPort"] <= port <= rule["ToPort"]
            and rule["Names"].get(rule.get("ReferencedGroupInfo", {}).get("GroupId")) == other
            for rule in rules
        )

    return lets(sender, receiver, True) and lets(receiver, sender, False)


def test_who_reaches_whom(network: tuple[dict[str, set[str]], Any]) -> None:
    """Each pair of machines of the cluster, at each port: as it is written above."""
    classes, rules = network
    assert set(classes) == {
        "bastion", "kafka-zookeeper", "pipeline-spark_master", "spark_worker", "airflow-monitoring-postgres",
    }  # fmt: skip
    wrong = []
    for sender, receiver in itertools.product(classes, classes):
        allowed: set[int] = set()
        if sender == "bastion" and receiver != "bastion":
            allowed = {22}.union(*(FROM_BASTION.get(group, set()) for group in classes[receiver]))
        for pair in itertools.product(classes[sender], classes[receiver]):
            allowed |= REACHES.get(pair, set())
        reached = {port for port in PROBED if passes(rules, sender, receiver, port)}
        if reached != allowed:
            wrong.append((sender, receiver, "open" if reached - allowed else "shut", sorted(reached ^ allowed)))
    assert wrong == []


def test_from_outside_only_the_bastion_is_reached(network: tuple[dict[str, set[str]], Any]) -> None:
    _, rules = network
    outside = [rule for rule in rules if not rule["IsEgress"] and "ReferencedGroupInfo" not in rule]
    assert [(rule["Class"], rule["CidrIpv4"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [
        ("bastion", "203.0.113.7/32", 22, 22)
    ]


def test_the_ports_are_those_of_the_roles() -> None:
    defaults: dict[str, Any] = {}
    for path in ROOT.glob("roles/*/defaults/main.yml"):
        defaults |= yaml.safe_load(path.read_text())
    opened = set().union(*REACHES.values(), *FROM_BASTION.values())
    ports = {name: port for name, port in defaults.items() if name.endswith("_port") and isinstance(port, int)}
    assert {name for name, port in ports.items() if port and port not in opened} == set()


def test_it_ends_with_the_lake_only_when_told(life: Life) -> None:
    bucket = life.bucket()
    bucket.put_object(Key="lake/silver/events/part-0.parquet", Body=b"rows")
    refused = life.cloud("down", "--yes")
    assert refused.returncode == 1
    assert f"the lake s3://{bucket.name} holds data. LAKE=keep removes all but the lake" in refused.stderr
    assert "LAKE=delete removes the data for good" in refused.stderr

    # Terraform alone cannot, whoever asks.
    done = subprocess.run(
        ["terraform", f"-chdir={life.folder}", "destroy", "-auto-approve", "-no-color"],
        env=life.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "prevent_destroy" in done.stderr

    kept = life.cloud("down", "--yes", "--lake", "keep")
    assert kept.returncode == 0, kept.stdout + kept.stderr
    ours = [{"Name": "tag:Environment", "Values": ["clickstream-dev"]}]
    found = client("ec2", life.env).describe_instances(Filters=ours)["Reservations"]
    states = [instance["State"]["Name"] for each in found for instance in each["Instances"]]
    assert set(states) == {"terminated"}
    assert [each.key for each in bucket.objects.all()] == ["lake/silver/events/part-0.parquet"]

    gone = life.cloud("down", "--yes", "--lake", "delete")
    assert gone.returncode == 0, gone.stdout + gone.stderr
    assert terraform(life.folder, life.env, "state", "list").stdout == ""
    names = [found["Name"] for found in client("s3", life.env).list_buckets()["Buckets"]]
    assert bucket.name not in names
