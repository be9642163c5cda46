"""What preflight-host says about this machine: the real script, with inventories that do or do not fit it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "ansible/scripts/preflight-host"


def preflight(folder: Path, memory: int, port: int) -> subprocess.CompletedProcess[str]:
    """Run it for a guest that is made but stopped, which needs memory and ports but no more disk."""
    inventory, programs = folder / "unittest", folder / "bin"
    inventory.mkdir()
    programs.mkdir()
    host = {
        "ansible_host": "192.0.2.1",
        "vm_memory": memory,
        "vm_forwarded_ports": [{"name": "Kafka", "guest": 9092, "host": port}],
    }
    (inventory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"node": host}}}))
    for name, text in (
        ("lxc-ls", '[ "$2" = --running ] || echo clickstream-unittest-node'),
        ("sudo", 'exec "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return subprocess.run(
        [sys.executable, SCRIPT, "--provider", "lxc", "--inventory", inventory],
        env=os.environ | {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_room_for_the_guests(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    done = preflight(tmp_path, 1, free)
    assert done.returncode == 0, done.stderr
    assert "room for 1 guest(s) with 1 MiB" in done.stdout


@pytest.fixture(scope="module")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """A taken port, and what is said of it and of a guest that is too large; both in one run."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = preflight(tmp_path_factory.mktemp("wrong"), 1 << 40, port)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return port, done.stderr


def test_a_taken_port_is_named_with_its_holder(refusal: tuple[int, str]) -> None:
    port, text = refusal
    holder = Path("/proc/self/comm").read_text().strip()
    assert f"port {port} of this machine (Kafka) is taken by {holder} (pid {os.getpid()})" in text
    assert "choose another 'host' port in vm_forwarded_ports" in text


def test_too_little_memory_is_said_with_the_variable(refusal: tuple[int, str]) -> None:
    _, text = refusal
    assert f"node needs {1 << 40} MiB" in text
    assert "lower vm_memory in the inventory" in text
