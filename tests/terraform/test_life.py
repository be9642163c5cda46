"""The life of an environment on a stand-in for AWS: plan, make, plan again, use its inventory, remove."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import yaml
from standin import DEBIAN, ROOT

sys.path.insert(0, str(ROOT / "tests/repo"))
import test_layout

if TYPE_CHECKING:
    from pathlib import Path

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
    """An environment by the user's own verbs."""

    def __init__(self, name: str, environments: Path, env: dict[str, str], inventories: Path) -> None:
        self.name, self.folder, self.inventory = name, environments / name, inventories / name
        self.env = env | {
            "CLICKSTREAM_TERRAFORM": str(environments.parent),
            "CLICKSTREAM_INVENTORIES": str(inventories),
        }
        self.env |= {"TF_CLI_ARGS_apply": "-no-color", "TF_CLI_ARGS_destroy": "-no-color"}
        # Both at once: making an environment is mostly waiting.
        self.begin("up", "--yes", "--machines-only")

    def command(self, verb: str, *words: str) -> list[str]:
        return [str(ROOT / ".venv/bin/python"), str(CLOUD), verb, self.name, *words]

    def begin(self, verb: str, *words: str) -> None:
        """What `wait` waits for."""
        self._begun = subprocess.Popen(
            self.command(verb, *words), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait(self) -> None:
        self.said, _ = self._begun.communicate()
        assert self._begun.returncode == 0, self.said

    def cloud(self, verb: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = self.command(verb, *words)
        return subprocess.run(command, env=self.env | env, capture_output=True, text=True, check=False)

    def output(self) -> dict[str, Any]:
        return dict(json.loads(terraform(self.folder, self.env, "output", "-json").stdout)["platform"]["value"])

    def bucket(self) -> Any:
        return client("s3", self.env, "resource").Bucket(self.output()["lake"]["bucket"])


def client(service: str, env: dict[str, str], kind: str = "client") -> Any:
    keys = {"aws_access_key_id": env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"]}
    return getattr(boto3, kind)(service, endpoint_url=env["AWS_ENDPOINT_URL"], region_name=env["AWS_REGION"], **keys)


def instances(life: Life) -> dict[str, dict[str, Any]]:
    """Name to what the cloud says of a machine."""
    ours = [{"Name": "tag:Environment", "Values": [f"clickstream-{life.name}"]}]
    found = client("ec2", life.env).describe_instances(Filters=ours)["Reservations"]
    return {
        next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == "Name"): instance
        for each in found
        for instance in each["Instances"]
        if instance["State"]["Name"] != "terminated"
    }


@pytest.fixture(scope="module")
def lives(environments: Path, aws: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Life]:
    """Both environments, made from nothing."""
    inventories = tmp_path_factory.mktemp("inventories")
    made = {name: Life(name, environments, aws, inventories) for name in ("dev", "prod")}
    for life in made.values():
        life.wait()
    return made


@pytest.fixture(scope="module")
def life(lives: dict[str, Life]) -> Life:
    """The small environment."""
    return lives["dev"]


@pytest.mark.parametrize(("name", "resources"), [("dev", 93), ("prod", 164)])
def test_it_is_made(lives: dict[str, Life], name: str, resources: int) -> None:
    """As many resources as when the environment was last thought about."""
    assert f"Plan: {resources} to add, 0 to change, 0 to destroy." in lives[name].said
    assert f"Apply complete! Resources: {resources} added, 0 changed, 0 destroyed." in lives[name].said


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_the_second_plan_is_empty(lives: dict[str, Life], name: str) -> None:
    life = lives[name]
    done = terraform(life.folder, life.env, "plan", "-input=false", "-no-color", "-detailed-exitcode")
    assert done.returncode == 0, done.stdout
    assert "No changes." in done.stdout


def test_the_image_is_debians_own(life: Life) -> None:
    instances = client("ec2", life.env).describe_instances()["Reservations"]
    assert {found["ImageId"] for each in instances for found in each["Instances"]} == {DEBIAN}


NODES = {
    "dev": {"clickstream"},
    "prod": {"broker-a", "broker-b", "broker-c", "master", "worker-a", "worker-b", "control"},
}


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_the_inventory_keeps_the_schema(lives: dict[str, Life], name: str) -> None:
    life = lives[name]
    test_layout.test_inventory_keeps_the_schema(life.inventory)
    assert test_layout.groups_of(life.inventory).keys() == test_layout.GROUPS
    variables = yaml.safe_load((life.inventory / "group_vars/all/main.yml").read_text())
    assert variables["lake_uri"] == f"s3a://clickstream-{name}-lake-123456789012/lake"
    hosts = test_layout.hosts(life.inventory)
    assert hosts.keys() == NODES[name]
    numbers = {
        host: (said["kafka_broker_id"], said["zookeeper_id"]) for host, said in hosts.items() if "zookeeper_id" in said
    }
    assert numbers == {
        "dev": {"clickstream": (1, 1)},
        "prod": {"broker-a": (1, 1), "broker-b": (2, 2), "broker-c": (3, 3)},
    }[name]  # fmt: skip
    volumes = {volume["VolumeId"].replace("-", "") for volume in client("ec2", life.env).describe_volumes()["Volumes"]}
    disks = [disk["device"].rpartition("_")[2] for host in hosts.values() for disk in host["common_disks"]]
    assert set(disks) <= volumes
    assert len(disks) == len(set(disks)) == {"dev": 2, "prod": 9}[name]


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_preflight_takes_the_inventory(lives: dict[str, Life], name: str, tmp_path: Path) -> None:
    """The real playbook: syntax, then everything that is checked before a connection; then nobody answers."""
    program, inventory = ROOT / ".venv/bin/ansible-playbook", lives[name].inventory
    playbook = [str(program), "-i", str(inventory), "ansible/playbooks/site.yml"]
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
    recap = re.findall(r"^(\S+) +: .*unreachable=(\d).*failed=(\d)", done.stdout, re.MULTILINE)
    assert {host: found for host, *found in recap} == {host: ["1", "0"] for host in NODES[name]}, done.stdout


class Guests:
    """Empty guests with the names of an environment's machines, by the environment's own inventory."""

    def __init__(self, life: Life, first_address: int) -> None:
        """What differs from the cloud is how a machine is reached, and how large it is."""
        self.folder = ROOT / "tests/terraform/guests" / f"terraform-{life.name}"
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(life.inventory, self.folder)
        own = yaml.safe_load((ROOT / "ansible/inventories/single/group_vars/all/guests.yml").read_text())
        reached = {key: own[key] for key in ("ansible_user", "ansible_ssh_private_key_file", "ansible_ssh_common_args")}
        (self.folder / "host_vars").mkdir()
        for number, name in enumerate(sorted(NODES[life.name]), first_address):
            host = reached | {"ansible_host": f"192.168.56.{number}", "vm_memory": 512, "vm_cpus": 1}
            (self.folder / "host_vars" / f"{name}.yml").write_text(yaml.safe_dump(host))
        self._env = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | {
            "ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"),
            "CLICKSTREAM_INVENTORY": str(self.folder),
            "VAGRANT_DOTFILE_PATH": str(self.folder / ".vagrant"),
        }

    def run(self, *words: str) -> str:
        done = subprocess.run(words, cwd=ROOT, env=self._env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def ansible(self, program: str, *words: str) -> str:
        return self.run(str(ROOT / ".venv/bin" / program), "-i", str(self.folder), *words)


def check_on_guests(life: Life, first_address: int) -> tuple[str, str]:
    """What `ansible-playbook --check` says on empty guests, and what is new on them after it."""
    guests = Guests(life, first_address)
    try:
        guests.run("vagrant", "up", "--no-provision")
        guests.ansible("ansible", "all", "-m", "command", "-a", "touch /tmp/before")
        said = guests.ansible("ansible-playbook", "ansible/playbooks/site.yml", "--check")
        find = "find /etc /opt /srv /usr -newer /tmp/before"
        return said, guests.ansible("ansible", "all", "--become", "-m", "command", "-a", find)
    finally:
        guests.run("vagrant", "destroy", "--force")
        shutil.rmtree(guests.folder)


@pytest.fixture(scope="module")
def checks(lives: dict[str, Life]) -> dict[str, tuple[str, str]]:
    """Both environments at once: most of it is waiting."""
    with ThreadPoolExecutor() as pool:
        running = {name: pool.submit(check_on_guests, lives[name], at) for name, at in (("dev", 130), ("prod", 131))}
        return {name: check.result() for name, check in running.items()}


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_a_check_on_empty_machines_goes_to_the_end(checks: dict[str, tuple[str, str]], name: str) -> None:
    """What a careful operator runs first: it tells all of it, and leaves no trace."""
    said, new = checks[name]
    recap = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+) +unreachable=0 +failed=0", said, re.MULTILINE)
    assert {host for host, changed in recap if int(changed)} == NODES[name], said
    for service in ("zookeeper", "kafka", "spark-master", "spark-worker", "ecom-producer", "airflow-scheduler"):
        assert f"TASK [service : Apply the configuration of {service}]" in said
    assert re.findall(r"^/.*", new, re.MULTILINE) == [], new


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_vagrant_takes_the_inventory(lives: dict[str, Life], name: str, tmp_path: Path) -> None:
    env = os.environ | {"CLICKSTREAM_INVENTORY": str(lives[name].inventory), "VAGRANT_DOTFILE_PATH": str(tmp_path)}
    done = subprocess.run(
        ["vagrant", "status", "--machine-readable"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split(",")[1] for line in done.stdout.splitlines() if ",state," in line} == NODES[name]


def test_cost_and_tunnels(life: Life) -> None:
    output = life.output()
    cost = output["monthly_cost"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", cost["as_of"])
    assert cost["usd_per_month"] == round(sum(line["usd_per_month"] for line in cost["lines"]))
    (host,) = test_layout.hosts(life.inventory).values()
    tunnel = output["tunnels"]["Airflow"]
    variables = yaml.safe_load((life.inventory / "group_vars/all/main.yml").read_text())
    assert tunnel["url"] == f"{variables['airflow_base_url']}/" == "http://localhost:8087/"
    assert f" -L 8087:{host['ansible_host']}:8087 " in tunnel["command"]
    assert output["tunnels"]["Marts"]["url"] == "postgresql://localhost:5432/analytics"
    bastion = instances(life)["clickstream-dev-bastion"]
    assert variables["postgres_client_networks"] == [f"{host['ansible_host']}/32", f"{bastion['PrivateIpAddress']}/32"]
    # A bastion that is made anew has another key under the same address.
    alias = f"-o HostKeyAlias={bastion['InstanceId']} admin@{bastion['PublicIpAddress']}"
    assert tunnel["command"].endswith(alias)
    assert (
        f"-o ProxyCommand='ssh -W %h:%p -o StrictHostKeyChecking=accept-new {alias}'" in host["ansible_ssh_common_args"]
    )


def test_the_ssh_configuration(life: Life) -> None:
    def says(host: str) -> dict[str, str]:
        done = subprocess.run(
            ["ssh", "-G", "-F", life.inventory / "ssh.cfg", host], capture_output=True, text=True, check=True
        )
        return {key: value for key, _, value in (line.partition(" ") for line in done.stdout.splitlines())}

    made = instances(life)
    node, bastion = says("clickstream-dev-clickstream"), says("clickstream-dev-bastion")
    assert node["hostname"] == made["clickstream-dev-clickstream"]["PrivateIpAddress"]
    assert node["hostkeyalias"] == made["clickstream-dev-clickstream"]["InstanceId"]
    assert node["proxyjump"] == "clickstream-dev-bastion"
    assert bastion["hostname"] == made["clickstream-dev-bastion"]["PublicIpAddress"]
    assert bastion["hostkeyalias"] == made["clickstream-dev-bastion"]["InstanceId"]


def test_the_topic_is_the_roles(life: Life) -> None:
    variables = yaml.safe_load((life.inventory / "group_vars/all/main.yml").read_text())
    (ours,) = yaml.safe_load((ROOT / "roles/kafka/defaults/main.yml").read_text())["kafka_topics"]
    (found,) = variables["kafka_topics"]
    assert found | {"replication_factor": 0} == ours | {"replication_factor": 0}


def test_the_small_environment_is_the_topology_single(life: Life) -> None:
    single = yaml.safe_load((ROOT / "ansible/inventories/single/group_vars/all/main.yml").read_text())
    variables = yaml.safe_load((life.inventory / "group_vars/all/main.yml").read_text())
    of_its_own = {"lake_uri", "extra_ca_certificates", "artifact_cache_dir"}
    assert {name: variables.get(name) for name in single.keys() - of_its_own} == {
        name: value for name, value in single.items() if name not in of_its_own
    }


def test_plan_and_status(life: Life, tmp_path: Path) -> None:
    """Nobody answers the status; what Terraform knows is said all the same."""
    planned = life.cloud("plan")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "No changes." in planned.stdout
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexit 255\n")
    ssh.chmod(0o755)
    (life.inventory / "ssh.cfg").unlink()
    status = life.cloud("status", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status.returncode not in (0, 1) or "unreachable" in (status.stdout + status.stderr).lower()
    assert f"ssh -F {life.inventory}/ssh.cfg clickstream-dev-clickstream" in status.stdout
    assert "http://localhost:8087/" in status.stdout
    assert (life.inventory / "ssh.cfg").is_file()


def test_a_stopped_machine_is_started(life: Life) -> None:
    """Terraform stops one to take a disk away."""
    node = instances(life)["clickstream-dev-clickstream"]["InstanceId"]
    client("ec2", life.env).stop_instances(InstanceIds=[node])
    up = life.cloud("up", "--yes", "--machines-only")
    assert up.returncode == 0, up.stdout + up.stderr
    assert f"cloud: {node} is stopped; starting it" in up.stdout
    assert instances(life)["clickstream-dev-clickstream"]["State"]["Name"] == "running"


@pytest.fixture(scope="module")
def network(lives: dict[str, Life]) -> tuple[dict[str, set[str]], Any]:
    """Groups of each class of nodes in `prod`, and all its rules as the cloud has them."""
    ec2 = client("ec2", lives["prod"].env)
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


def test_every_rule_is_tcp_between_machines_or_the_two_ways_out(network: tuple[dict[str, set[str]], Any]) -> None:
    """What the test above does not look at: other protocols, and rules that name addresses."""
    classes, rules = network
    assert {rule["IpProtocol"] for rule in rules} == {"tcp"}
    assert not [rule for rule in rules if {"CidrIpv6", "PrefixListId"} & rule.keys()]
    named = {rule["ReferencedGroupInfo"]["GroupId"] for rule in rules if "ReferencedGroupInfo" in rule}
    assert named <= rules[0]["Names"].keys()
    out = [rule for rule in rules if rule["IsEgress"] and "ReferencedGroupInfo" not in rule]
    assert sorted((rule["Class"], rule["CidrIpv4"], rule["FromPort"], rule["ToPort"]) for rule in out) == sorted(
        (name, "0.0.0.0/0", port, port) for name in classes for port in (80, 443)
    )


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


def removed(life: Life, *words: str) -> str:
    """What is said when all of it goes."""
    life.begin("down", "--yes", *words)
    return gone(life)


def gone(life: Life) -> str:
    """What was said when all of it went."""
    life.wait()
    assert terraform(life.folder, life.env, "state", "list").stdout == ""
    assert instances(life) == {}
    buckets = client("s3", life.env).list_buckets()["Buckets"]
    assert f"clickstream-{life.name}-lake-123456789012" not in {found["Name"] for found in buckets}
    return life.said


@pytest.fixture(scope="module")
def cluster(lives: dict[str, Life]) -> Life:
    """The cluster, which is being removed from here on, while the small environment's end is tested."""
    lives["prod"].begin("down", "--yes")
    return lives["prod"]


@pytest.mark.usefixtures("cluster")
def test_it_ends_with_the_lake_only_when_told(life: Life) -> None:
    bucket = life.bucket()
    for key in ("spark-events/app-1", "elsewhere/part-0.parquet", "lake/silver/events/part-0.parquet"):
        bucket.put_object(Key=key, Body=b"rows")
    bucket.Object("lake/silver/events/part-0.parquet").delete()
    # Of a deleted object, and of one that is in no table, there is still something to lose.
    for key in ("lake/", "elsewhere/"):
        refused = life.cloud("down", "--yes")
        assert refused.returncode == 1
        assert f"the lake s3://{bucket.name} holds data. LAKE=keep removes all but the lake" in refused.stderr
        assert "LAKE=delete removes the data for good" in refused.stderr
        bucket.object_versions.filter(Prefix=key).delete()
    assert "clickstream-dev-clickstream" in instances(life)

    # Terraform alone cannot, whoever asks.
    bucket.put_object(Key="lake/silver/events/part-0.parquet", Body=b"rows")
    for target in ("aws_s3_bucket", "aws_kms_key"):
        done = subprocess.run(
            ["terraform", f"-chdir={life.folder}", "destroy", "-auto-approve", "-no-color",
             f"-target=module.platform.module.lake.{target}.this"],
            env=life.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"module.platform.module.lake.{target}.this has" in done.stderr
        assert "prevent_destroy" in done.stderr

    kept = life.cloud("down", "--yes", "--lake", "keep")
    assert kept.returncode == 0, kept.stdout + kept.stderr
    assert instances(life) == {}
    assert [each.key for each in bucket.objects.filter(Prefix="lake/")] == ["lake/silver/events/part-0.parquet"]


def test_a_new_platform_does_not_go_on_with_a_kept_lake(life: Life) -> None:
    """Its checkpoints name offsets of a Kafka that is gone."""
    refused = life.cloud("up", "--yes", "--machines-only")
    assert refused.returncode == 1
    assert "/lake holds tables whose Kafka is gone" in refused.stderr
    assert f"another lake_prefix in {life.folder}/main.tf, for example lake-2" in refused.stderr
    assert instances(life) == {}

    main = life.folder / "main.tf"
    main.write_text(re.sub(r'(lake_prefix +=) "lake"', r'\1 "lake-2"', main.read_text()))
    up = life.cloud("up", "--yes", "--machines-only")
    assert up.returncode == 0, up.stdout + up.stderr
    variables = yaml.safe_load((life.inventory / "group_vars/all/main.yml").read_text())
    assert variables["lake_uri"] == "s3a://clickstream-dev-lake-123456789012/lake-2"
    removed(life, "--lake", "delete")
    assert "cloud: nothing is there\n" in removed(life)


def test_what_was_half_made_is_removed(life: Life) -> None:
    """With the state in S3: a first `up` that stopped early, and a `down` that stopped when the bucket was gone."""
    client("s3", life.env).create_bucket(Bucket="state")
    (life.folder / "backend.hcl").write_text(
        'bucket = "state"\nkey = "dev"\nregion = "us-east-1"\nuse_lockfile = true\nuse_path_style = true\n'
    )
    planned = life.cloud("plan")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    parts = [f"-target=module.platform.module.{part}" for part in ("lake", "network.aws_vpc.this")]
    terraform(life.folder, life.env, "apply", "-input=false", "-auto-approve", *parts)
    assert "platform" not in json.loads(terraform(life.folder, life.env, "output", "-json").stdout)
    status = life.cloud("status")
    assert (status.returncode, status.stderr) == (1, "cloud: nothing is there yet; make cloud-up ENV=dev makes it\n")
    bucket = client("s3", life.env, "resource").Bucket("clickstream-dev-lake-123456789012")
    bucket.object_versions.delete()
    bucket.delete()
    removed(life)
    assert [found.key for found in client("s3", life.env, "resource").Bucket("state").objects.all()] == ["dev"]


def test_the_cluster_is_removed(cluster: Life) -> None:
    """Its lake is empty, so nobody has to be asked."""
    gone(cluster)
