"""Kafka, asked with the commands its users know."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

import pytest
from testinfra.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable

TOPIC = "ecom_clickstream_raw"


@pytest.fixture
def server(address: str) -> str:
    return f"--bootstrap-server {address}:9092"


def consume(host: Host, server: str, count: int, options: str = "") -> list[str]:
    command = (
        f"kafka-console-consumer {server} --topic {TOPIC} --from-beginning --timeout-ms 20000"
        f" --property print.key=true --max-messages {count} {options} 2>/dev/null"
    )
    return str(host.check_output(command)).splitlines()


def end_offsets(host: Host, server: str) -> int:
    lines = host.check_output(f"kafka-get-offsets {server} --topic {TOPIC}").splitlines()
    return sum(int(line.rpartition(":")[2]) for line in lines)


def produce(host: Host, server: str, records: list[str]) -> None:
    options = "--property parse.key=true --producer-property acks=all"
    command = f"kafka-console-producer {server} --topic {TOPIC} {options}"
    host.check_output(f"printf '%%s\\n' %s | {command}", "\n".join(records))


def test_the_topic_is_as_the_inventory_describes_it(host: Host, server: str) -> None:
    said = host.check_output(f"kafka-topics {server} --describe --topic {TOPIC}")
    assert "PartitionCount: 3" in said
    assert "ReplicationFactor: 1" in said
    assert "retention.ms=604800000" in said
    assert said.count("Leader: 1") == 3


def test_records_come_back_and_outlive_a_crash(host: Host, server: str, wait_until: Callable[..., bool]) -> None:
    before = end_offsets(host, server)
    records = [f"user_{n % 7}\t" + json.dumps({"n": n, "token": str(uuid.uuid4())}) for n in range(30)]
    produce(host, server, records)
    assert end_offsets(host, server) == before + 30
    assert set(records) <= set(consume(host, server, before + 30))

    pid = host.check_output("systemctl show --property MainPID --value kafka")
    host.check_output("kill -KILL %s", pid)
    wait_until(lambda: host.check_output("systemctl show --property MainPID --value kafka") not in ("0", pid))
    host.check_output("nodectl wait kafka")
    assert set(records) <= set(consume(host, server, before + 30))


def test_equal_keys_share_a_partition(host: Host, server: str) -> None:
    produce(host, server, [f"same-key\t{n}" for n in range(5)])
    lines = consume(host, server, end_offsets(host, server), "--property print.partition=true")
    assert len({line.split("\t")[0] for line in lines if "\tsame-key\t" in line}) == 1


def test_a_group_has_a_visible_lag(host: Host, server: str) -> None:
    produce(host, server, ["lag\tone"])
    host.check_output(
        f"kafka-console-consumer {server} --topic {TOPIC} --group molecule --from-beginning"
        " --max-messages 1 --timeout-ms 20000"
    )
    said = host.check_output(f"kafka-consumer-groups {server} --describe --group molecule")
    assert TOPIC in said and "LAG" in said


def test_a_misspelt_topic_is_not_made(host: Host, server: str) -> None:
    host.run(f"echo lost | timeout 10 kafka-console-producer {server} --topic ecom_clickstream_rwa")
    assert "ecom_clickstream_rwa" not in host.check_output(f"kafka-topics {server} --list").splitlines()


def test_the_broker_is_registered_in_zookeeper(host: Host, address: str) -> None:
    said = host.check_output(f"zookeeper-shell {address}:2181 get /brokers/ids/1")
    assert f"CLIENT://{address}:9092" in said
