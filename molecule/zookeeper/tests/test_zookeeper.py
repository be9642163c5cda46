"""ZooKeeper keeps what it is given, also across a restart and a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from testinfra.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable

CLIENT = (
    "java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Dlogback.configurationFile=/dev/null"
    " -cp '/opt/zookeeper/current/lib/*' org.apache.zookeeper.ZooKeeperMain"
)


def ask(host: Host, address: str, *commands: str) -> list[str]:
    """Run commands in one session of ZooKeeper's own client; its lines, and its notes on the session."""
    script = "\n".join(commands)
    done = host.run(f"printf '%%s\\n' %s | {CLIENT} -server {address}:2181 2>&1", script)
    return str(done.stdout).splitlines()


@pytest.fixture
def znode(host: Host, address: str) -> str:
    path = "/molecule"
    ask(host, address, f"create {path}", f"set {path} kept")
    return path


def test_a_znode_is_written_and_read(host: Host, address: str, znode: str) -> None:
    assert "kept" in ask(host, address, f"get {znode}")


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_a_znode_outlives_the_process(
    host: Host, address: str, znode: str, signal: str, wait_until: Callable[..., bool]
) -> None:
    before = host.check_output("systemctl show --property MainPID --value zookeeper")
    if signal == "TERM":
        host.check_output("nodectl restart zookeeper")
    else:
        host.check_output("kill -KILL %s", before)
        wait_until(
            lambda: host.check_output("systemctl show --property MainPID --value zookeeper") not in ("0", before)
        )
        host.check_output("nodectl wait zookeeper")
    assert host.check_output("systemctl show --property MainPID --value zookeeper") != before
    assert "kept" in ask(host, address, f"get {znode}")


def test_it_serves_its_guest_alone_and_says_so(host: Host, address: str) -> None:
    script = (
        f"import socket; s = socket.create_connection(({address!r}, 2181), 5); s.sendall(b'mntr'); "
        "print(b''.join(iter(lambda: s.recv(65536), b'')).decode())"
    )
    answer = host.check_output("python3 -c %s", script)
    values = dict(line.split("\t", 1) for line in answer.splitlines() if "\t" in line)
    assert values["zk_server_state"] == "standalone"
    assert int(values["zk_znode_count"]) > 0


def test_it_runs_as_its_own_user_without_new_privileges(host: Host) -> None:
    pid = host.check_output("systemctl show --property MainPID --value zookeeper")
    assert host.check_output("ps -o user= -p %s", pid).strip() == "zookeeper"
    assert "NoNewPrivs:\t1" in host.check_output("cat /proc/%s/status", pid)
