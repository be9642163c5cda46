"""What systemd is told, and that a wait does not look like a hang."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from clickstream import clients, producer, sdnotify, streams
from clickstream.clients import ClientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Clock:
    """Time that passes only where somebody waits, and a stop that comes at some time."""

    def __init__(self, stop_at: float) -> None:
        self.now, self.stop_at = 1000.0, 1000.0 + stop_at

    def monotonic(self) -> float:
        return self.now

    def is_set(self) -> bool:
        return self.now >= self.stop_at

    def set(self) -> None:
        self.stop_at = self.now

    def wait(self, seconds: float) -> bool:
        self.now = min(self.now + seconds, max(self.now, self.stop_at))
        return self.is_set()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What was said since the last look, in a unit with WatchdogSec=60."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")

        def said() -> list[str]:
            found = []
            while True:
                try:
                    found.append(listener.recv(1000).decode())
                except BlockingIOError:
                    return found

        yield said


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(100)
    for module in (sdnotify, producer, streams):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic, time=clock.monotonic))
    return clock


def test_a_long_wait_pings_and_ends_with_the_stop(manager: Callable[[], list[str]], clock: Clock) -> None:
    watchdog = sdnotify.Watchdog()
    assert not watchdog.wait(clock, 40)  # type: ignore[arg-type]
    assert manager() == []  # nobody waits for a ping yet
    watchdog.ready()
    assert not watchdog.wait(clock, 50)  # type: ignore[arg-type]
    assert manager() == ["READY=1"] + ["WATCHDOG=1"] * 4
    assert watchdog.wait(clock, 50)  # type: ignore[arg-type]
    assert clock.now == 1100


def test_outside_a_unit_with_a_watchdog_a_wait_is_only_one(
    manager: Callable[[], list[str]], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", "1")
    watchdog = sdnotify.Watchdog()
    watchdog.ready()
    with watchdog.patience(1800):
        assert not watchdog.wait(clock, 80)  # type: ignore[arg-type]
    assert watchdog.wait(clock, 80)  # type: ignore[arg-type]
    assert manager() == ["READY=1"]


@pytest.mark.parametrize("fatal", [False, True])
def test_a_producer_without_a_broker_pings(
    manager: Callable[[], list[str]], clock: Clock, monkeypatch: pytest.MonkeyPatch, fatal: bool
) -> None:
    """With an error that needs a new client it looks for the broker, with another one it tries again."""

    class Away:
        def send(self, key: bytes, value: bytes | None, done: clients.Done) -> None:
            clock.now += 5
            raise ClientError("KafkaTimeoutError", "no broker", fatal=fatal)

        def close(self, timeout: float) -> None:
            clock.now += 15

    def connect(*_: Any) -> clients.Client:
        if sender._client is None:
            return Away()
        clock.now += 10
        raise ClientError("NoBrokersAvailable", "no broker")

    monkeypatch.setattr(clients, "connect", connect)
    options = producer.parse_args(["--duration", "0"])
    sender = producer.Sender(options, clock, producer.Console())  # type: ignore[arg-type]
    assert sender.connect()
    sender.watchdog.ready()
    assert sender.send(options.records())
    assert clock.is_set()
    assert manager().count("WATCHDOG=1") >= 3


def test_the_streams_ping_once_they_run_and_a_later_start_may_take_its_time(
    manager: Callable[[], list[str]], clock: Clock
) -> None:
    queries: list[Any] = [SimpleNamespace(name="gold", isActive=True)]
    ready: set[str] = set()

    def later() -> None:
        assert manager()[-2:] == ["READY=1", "WATCHDOG_USEC=1800000000"]
        clock.now += 400
        clock.stop_at = clock.now + 60
        queries.append(SimpleNamespace(name="gold_hourly", isActive=True))

    clock.stop_at = clock.now + 40
    assert streams._watch(queries, ready, clock, later) == 0  # type: ignore[arg-type]
    assert set(manager()) == {"EXTEND_TIMEOUT_USEC=60000000"}
    ready.add("gold")
    clock.stop_at = clock.now + 40
    assert streams._watch(queries, ready, clock, later) == 0  # type: ignore[arg-type]
    assert manager() == ["WATCHDOG_USEC=60000000", "STATUS=running gold, gold_hourly"] + ["WATCHDOG=1"] * 4
