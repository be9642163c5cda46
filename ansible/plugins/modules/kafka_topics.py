#!/usr/bin/python
"""Ansible module: Kafka topics as data."""

from __future__ import annotations

# ruff: noqa: E402 - Ansible wants the documentation before the imports

DOCUMENTATION = r"""
module: kafka_topics
short_description: Bring Kafka topics to their descriptions
description:
  - Reads the topics it is given, compares them with their descriptions and writes the differences. Topics it is not
    given are left alone.
  - Everything is checked, by this module and then by the broker, before the first thing is written.
  - Returns when the brokers' metadata shows what was asked for, with a leader for every partition.
requirements:
  - kafka-python >= 3.0 on the target; run the module with the interpreter of the environment that has it
options:
  bootstrap_servers:
    description: C(host:port) of one or more brokers.
    type: list
    elements: str
    required: true
  topics:
    description: The topics.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the topic.
        type: str
        required: true
      partitions:
        description:
          - Number of partitions. It can grow and never shrink. Growing it changes which partition a key goes to.
          - A new topic gets the brokers' default when this is not given; an existing one keeps what it has.
        type: int
      replication_factor:
        description:
          - Copies of each partition, at most the number of brokers. Only for new topics; an existing topic with another
            one is refused, because moving replicas is a job for C(kafka-reassign-partitions).
          - A new topic gets the brokers' default when this is not given; an existing one keeps what it has.
        type: int
      configs:
        description:
          - Topic settings. Booleans, numbers and lists are written as Kafka writes them.
          - A setting with the value null is reset to the brokers' default. Settings not named here are left alone.
        type: dict
        default: {}
      state:
        description: Whether the topic exists. V(absent) deletes it with its records.
        type: str
        choices: [present, absent]
        default: present
  reset_unmanaged_configs:
    description: Reset the topics' own settings that O(topics[].configs) does not name to the brokers' defaults.
    type: bool
    default: false
  timeout:
    description: How many seconds to wait for the brokers, to connect as well as to show a change.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
    description: Changes are sent to the broker for validation only.
  diff_mode:
    support: full
    description: Partitions, replication factor and own settings of each topic.
author:
  - Clickstream platform maintainers
"""

EXAMPLES = r"""
- name: Bring the topics to their descriptions
  kafka_topics:
    bootstrap_servers: "{{ groups['kafka'] | product([':9092']) | map('join') }}"
    topics:
      - name: ecom_clickstream_raw
        partitions: 3
        replication_factor: 1
        configs:
          retention.ms: 604800000
          min.insync.replicas: 1
      - name: scratch
        state: absent
  vars:
    ansible_python_interpreter: /opt/kafka/tools/current/bin/python
  run_once: true
"""

RETURN = r"""
changes:
  description: What was, or in check mode would be, done.
  returned: always
  type: list
  elements: str
  sample: ["ecom_clickstream_raw: created with 3 partitions, replication factor 1"]
topics:
  description: The topics given that exist, after the changes. In check mode, before them.
  returned: always
  type: dict
  sample:
    ecom_clickstream_raw:
      partitions: 3
      replication_factor: 1
      configs:
        retention.ms: "604800000"
"""

import re
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    from kafka import errors as kafka_errors
    from kafka.admin import AlterConfigOp, ConfigResource, ConfigResourceType, KafkaAdminClient
except ImportError:
    KAFKA_IMPORT_ERROR: str | None = traceback.format_exc()
else:
    KAFKA_IMPORT_ERROR = None

NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
UNKNOWN_TOPIC = 3
OWN_SETTING = "DYNAMIC_TOPIC_CONFIG"


class TopicsError(Exception):
    """A failure that says what to do about it."""


def kafka_text(value: Any) -> str | None:
    """A YAML value the way Kafka writes it; None stands for the brokers' default."""
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)


def same(wanted: str, found: str | None, kind: str) -> bool:
    """Whether two spellings of a setting mean the same."""
    if found is None or wanted == found:
        return wanted == found
    if kind == "BOOLEAN":
        return wanted.lower() == found.lower()
    if kind == "LIST":
        return [part.strip() for part in wanted.split(",")] == [part.strip() for part in found.split(",")]
    if kind in ("INT", "LONG", "SHORT", "DOUBLE"):
        try:
            return float(wanted) == float(found)
        except ValueError:
            return False
    return False


@dataclass
class Wanted:
    name: str
    present: bool
    partitions: int | None
    replication_factor: int | None
    configs: dict[str, str | None]


@dataclass
class Found:
    partitions: int
    replication_factor: int
    ready: bool
    own: dict[str, str] = field(default_factory=dict)  # settings of the topic itself
    kinds: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "partitions": self.partitions,
            "replication_factor": self.replication_factor,
            "configs": dict(sorted(self.own.items())),
        }


@dataclass
class Plan:
    create: list[Wanted] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    grow: dict[str, int] = field(default_factory=dict)
    alter: dict[str, dict[str, str | None]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def read_wanted(topics: list[dict[str, Any]]) -> list[Wanted]:
    problems: list[str] = []
    names: set[str] = set()
    for topic in topics:
        name = topic["name"]
        if not NAME.fullmatch(name) or name in (".", ".."):
            problems.append(f"{name!r} is not a topic name: use up to 249 of A-Z a-z 0-9 . _ -")
        if name in names:
            problems.append(f"{name} is described twice")
        names.add(name)
        for option in ("partitions", "replication_factor"):
            if topic[option] is not None and topic[option] < 1:
                problems.append(f"{name}: {option} is {topic[option]}; it has to be at least 1")
        for key, value in topic["configs"].items():
            if isinstance(value, dict):
                problems.append(f"{name}: {key} is a mapping; a setting is a string, number, boolean, list or null")
    if problems:
        raise TopicsError("; ".join(problems))
    return [
        Wanted(
            topic["name"],
            topic["state"] == "present",
            topic["partitions"],
            topic["replication_factor"],
            {str(key): kafka_text(value) for key, value in topic["configs"].items()},
        )
        for topic in topics
    ]


class Cluster:
    """The little of a Kafka cluster that this module reads and writes."""

    def __init__(self, bootstrap_servers: list[str], timeout: int) -> None:
        self.timeout = timeout
        try:
            self.admin = KafkaAdminClient(
                bootstrap_servers=bootstrap_servers,
                client_id="ansible-kafka-topics",
                bootstrap_timeout_ms=timeout * 1000,
                request_timeout_ms=timeout * 1000,
            )
        except kafka_errors.KafkaError as error:
            raise TopicsError(
                f"no broker of {', '.join(bootstrap_servers)} answered within {timeout} s ({error}). "
                "Check that Kafka runs and that the target reaches this address."
            ) from error

    def brokers(self) -> int:
        return len(self.admin.describe_cluster()["brokers"])

    def read(self, names: list[str]) -> dict[str, Found]:
        if not names:
            return {}
        found: dict[str, Found] = {}
        for topic in self.admin.describe_topics(names):
            if topic["error_code"] == UNKNOWN_TOPIC:
                continue
            if topic["error_code"] and not topic["partitions"]:
                raise TopicsError(f"{topic['name']}: {kafka_errors.for_code(topic['error_code']).__name__}")
            partitions = topic["partitions"]
            found[topic["name"]] = Found(
                partitions=len(partitions),
                replication_factor=min(len(partition["replica_nodes"]) for partition in partitions),
                ready=all(partition["leader_id"] >= 0 for partition in partitions),
            )
        if found:
            resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in found]
            described = self.admin.describe_configs(resources, config_filter="all").get("topic", {})
            for name, settings in described.items():
                for key, setting in settings.items():
                    found[name].kinds[key] = setting.get("config_type") or "STRING"
                    if setting["config_source"] == OWN_SETTING:
                        found[name].own[key] = setting["value"]
        return found

    def create(self, topics: list[Wanted], validate_only: bool) -> None:
        request = {
            topic.name: {
                "num_partitions": topic.partitions or -1,
                "replication_factor": topic.replication_factor or -1,
                "configs": {key: value for key, value in topic.configs.items() if value is not None},
            }
            for topic in topics
        }
        answer = self.admin.create_topics(request, validate_only=validate_only, raise_errors=False)
        self._raise([(item["name"], item["error_code"], item["error_message"]) for item in answer["topics"]])

    def delete(self, names: list[str]) -> None:
        answer = self.admin.delete_topics(names, raise_errors=False)
        self._raise([(item["name"], item["error_code"], item.get("error_message")) for item in answer["topics"]])

    def grow(self, counts: dict[str, int], validate_only: bool) -> None:
        answer = self.admin.create_partitions(counts, validate_only=validate_only, raise_errors=False)
        self._raise([(item.name, item.error_code, item.error_message) for item in answer.results])

    def alter(self, settings: dict[str, dict[str, str | None]], validate_only: bool) -> None:
        resources = [
            ConfigResource(
                ConfigResourceType.TOPIC,
                name,
                {
                    key: (AlterConfigOp.DELETE if value is None else AlterConfigOp.SET, value)
                    for key, value in configs.items()
                },
            )
            for name, configs in settings.items()
        ]
        answer = self.admin.alter_configs(
            resources, validate_only=validate_only, raise_on_unknown=False, incremental=True
        )
        problems = [f"{name}: {result}" for name, result in answer["topic"].items() if result != "OK"]
        if problems:
            raise TopicsError("; ".join(problems))

    @staticmethod
    def _raise(results: list[tuple[str, int, str | None]]) -> None:
        problems = [
            f"{name}: {message or kafka_errors.for_code(code).__name__}" for name, code, message in results if code
        ]
        if problems:
            raise TopicsError("; ".join(problems))

    def wait(self, names: list[str], done: Callable[[dict[str, Found]], list[str]]) -> dict[str, Found]:
        """Read until nothing is left to wait for."""
        deadline = time.monotonic() + self.timeout
        while True:
            found = self.read(names)
            missing = done(found)
            if not missing:
                return found
            if time.monotonic() > deadline:
                raise TopicsError(f"after {self.timeout} s the brokers still do not show: {'; '.join(missing)}")
            time.sleep(0.1)  # between two questions


def wanted_configs(topic: Wanted, found: Found, reset_unmanaged: bool) -> dict[str, str | None]:
    """The settings to write: those whose own value differs, and None for those to reset."""
    writes: dict[str, str | None] = {}
    for key, value in topic.configs.items():
        own = found.own.get(key)
        if value is None:
            if own is not None:
                writes[key] = None
        elif own is None or not same(value, own, found.kinds.get(key, "STRING")):
            writes[key] = value
    if reset_unmanaged:
        writes.update({key: None for key in found.own if key not in topic.configs})
    return writes


def make_plan(wanted: list[Wanted], found: dict[str, Found], brokers: int, reset_unmanaged: bool) -> Plan:
    plan = Plan()
    for topic in wanted:
        name, now = topic.name, found.get(topic.name)
        if not topic.present:
            if now:
                plan.delete.append(name)
                plan.changes.append(f"{name}: deleted")
            continue
        if now is None:
            if topic.replication_factor and topic.replication_factor > brokers:
                plan.refused.append(
                    f"{name}: replication_factor is {topic.replication_factor} and the cluster has {brokers} "
                    f"broker{'s' if brokers != 1 else ''}; lower it or add brokers"
                )
                continue
            plan.create.append(topic)
            plan.changes.append(
                f"{name}: created with {topic.partitions or 'the default number of'} partitions, "
                f"replication factor {topic.replication_factor or 'by default'}"
            )
            continue
        if topic.replication_factor and topic.replication_factor != now.replication_factor:
            plan.refused.append(
                f"{name}: replication_factor is {now.replication_factor} and {topic.replication_factor} is asked for; "
                "this module does not move replicas: use kafka-reassign-partitions, or describe what there is"
            )
        if topic.partitions and topic.partitions < now.partitions:
            plan.refused.append(
                f"{name}: has {now.partitions} partitions and {topic.partitions} are asked for; partitions cannot be "
                "taken away: make a new topic, or describe what there is"
            )
        elif topic.partitions and topic.partitions > now.partitions:
            plan.grow[name] = topic.partitions
            plan.changes.append(f"{name}: grown from {now.partitions} to {topic.partitions} partitions")
        if writes := wanted_configs(topic, now, reset_unmanaged):
            plan.alter[name] = writes
            plan.changes.extend(
                f"{name}: {key} " + ("reset" if value is None else f"set to {value}")
                for key, value in sorted(writes.items())
            )
    return plan


def write(cluster: Cluster, plan: Plan, validate_only: bool) -> None:
    if plan.create:
        cluster.create(plan.create, validate_only)
    if plan.grow:
        cluster.grow(plan.grow, validate_only)
    if plan.alter:
        cluster.alter(plan.alter, validate_only)
    if plan.delete and not validate_only:  # last, when all else has worked
        cluster.delete(plan.delete)


def expected(wanted: list[Wanted], found: dict[str, Found], plan: Plan) -> dict[str, Any]:
    """What the topics look like afterwards, for the diff."""
    after = {name: topic.as_dict() for name, topic in found.items() if name not in plan.delete}
    for topic in plan.create:
        after[topic.name] = {
            "partitions": topic.partitions or "(default)",
            "replication_factor": topic.replication_factor or "(default)",
            "configs": {key: value for key, value in sorted(topic.configs.items()) if value is not None},
        }
    for name, count in plan.grow.items():
        after[name]["partitions"] = count
    for name, writes in plan.alter.items():
        configs = {**after[name]["configs"], **writes}
        after[name]["configs"] = {key: value for key, value in sorted(configs.items()) if value is not None}
    return {topic.name: after[topic.name] for topic in wanted if topic.name in after}


def run(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    wanted = read_wanted(params["topics"])
    names = [topic.name for topic in wanted]
    reset_unmanaged: bool = params["reset_unmanaged_configs"]
    cluster = Cluster(params["bootstrap_servers"], params["timeout"])
    try:
        found = cluster.read(names)
        brokers = cluster.brokers()
        plan = make_plan(wanted, found, brokers, reset_unmanaged)
        if plan.refused:
            raise TopicsError(f"{'; '.join(plan.refused)}. Nothing was changed.")
        before = {name: found[name].as_dict() for name in names if name in found}
        after = expected(wanted, found, plan)
        if plan.changes:
            write(cluster, plan, validate_only=True)
        if plan.changes and not module.check_mode:
            write(cluster, plan, validate_only=False)

            def missing(now: dict[str, Found]) -> list[str]:
                left = make_plan(wanted, now, brokers, reset_unmanaged)
                unled = [
                    f"{name}: a leader for every partition"
                    for name, topic in now.items()
                    if not topic.ready and (name in plan.grow or name not in found)
                ]
                return left.changes + left.refused + unled

            found = cluster.wait(names, missing)
    except kafka_errors.KafkaError as error:
        raise TopicsError(f"{type(error).__name__}: {error}") from error
    finally:
        cluster.admin.close()
    return {
        "changed": bool(plan.changes),
        "changes": plan.changes,
        "topics": {name: found[name].as_dict() for name in names if name in found},
        "diff": {"before": before, "after": after, "before_header": "topics", "after_header": "topics"},
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "bootstrap_servers": {"type": "list", "elements": "str", "required": True},
            "topics": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "partitions": {"type": "int"},
                    "replication_factor": {"type": "int"},
                    "configs": {"type": "dict", "default": {}},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                },
            },
            "reset_unmanaged_configs": {"type": "bool", "default": False},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    if KAFKA_IMPORT_ERROR:
        module.fail_json(
            msg=missing_required_lib("kafka-python", reason="by kafka_topics, in the environment it is run with"),
            exception=KAFKA_IMPORT_ERROR,
        )
    try:
        result = run(module)
    except (TopicsError, RuntimeError) as error:
        module.fail_json(msg=str(error))
    else:
        module.exit_json(**result)


if __name__ == "__main__":
    main()
