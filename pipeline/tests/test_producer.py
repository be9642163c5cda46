"""The producer's command: what the document promises of a run."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from clickstream import clients, producer, sdnotify
from clickstream.clients import ClientError
from clickstream.producer import parse_args, sent_line
from clickstream.shop import Shop


def test_a_run_with_defaults_is_300_events() -> None:
    assert parse_args([]).total == 300


@pytest.mark.parametrize(("rate", "duration", "total"), [("5", "60", 300), ("0.5", "10", 5), ("7", "1.5", 10)])
def test_total(rate: str, duration: str, total: int) -> None:
    assert parse_args(["--rate", rate, "--duration", duration]).total == total


def test_duration_0_is_endless() -> None:
    assert parse_args(["--duration", "0"]).total is None


@pytest.mark.parametrize(
    "argv",
    [
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--duration", "-1"],
        ["--users", "0"],
        ["--products", "41"],
        ["--arrival", "odd"],
    ],
)
def test_wrong_options_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_args(argv)
    assert error.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_the_console_line_is_the_documents() -> None:
    event = {"event_type": "view", "user_id": "user_0123", "product_id": "prod_0042"}
    assert (
        sent_line(event, 1, 0)
        == "Sent: view            | User: user_0123   | Product: prod_0042   | Partition: 1 | Offset: 0"
    )
    event = {"event_type": "add_to_cart", "user_id": "user_0456", "product_id": "prod_0033"}
    assert (
        sent_line(event, 2, 0)
        == "Sent: add_to_cart     | User: user_0456   | Product: prod_0033   | Partition: 2 | Offset: 0"
    )
    event = {"event_type": None, "user_id": "user_0456", "product_id": 33}  # as a file may have it that is replayed
    assert (
        sent_line(event, 2, 0)
        == "Sent: None            | User: user_0456   | Product: 33          | Partition: 2 | Offset: 0"
    )


def test_the_environment_names_the_broker_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKSTREAM_BOOTSTRAP_SERVERS", "a:9092,b:9092")
    monkeypatch.setenv("CLICKSTREAM_TOPIC", "other")
    options = parse_args([])
    assert (options.bootstrap_servers, options.topic) == (["a:9092", "b:9092"], "other")
    assert parse_args(["--bootstrap-servers", "c:1"]).bootstrap_servers == ["c:1"]


def dry_run(*argv: str) -> subprocess.Popen[bytes]:
    package = str(Path(producer.__file__).parents[1])
    command = [sys.executable, "-m", "clickstream.producer", "--dry-run", "--bootstrap-servers", "nowhere:1", *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": package}
    )


def test_a_dry_run_prints_its_events_and_nothing_else(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = parse_args(["--dry-run", "--seed", "1", "--duration", "6000"])
    assert producer.dry_run(options, threading.Event()) == 0
    printed = capfdbinary.readouterr()
    events = [json.loads(line) for line in printed.out.splitlines()]
    assert len(events) == 30_000
    assert not printed.err
    assert [e["event_id"] for e in events] == [e["event_id"] for e in itertools.islice(Shop(seed=1), 30_000)]
    first, last = (datetime.fromisoformat(events[place]["timestamp"]) for place in (0, -1))
    assert (last - first).total_seconds() == pytest.approx(5999.8, abs=0.002)


def test_events_at_random_fill_the_duration(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = parse_args(["--dry-run", "--seed", "1", "--arrival", "poisson", "--duration", "600"])
    assert options.total is None
    assert producer.dry_run(options, threading.Event()) == 0
    events = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert abs(len(events) - 3_000) < 4 * 3_000**0.5
    first, last = (datetime.fromisoformat(events[place]["timestamp"]) for place in (0, -1))
    assert 590 < (last - first).total_seconds() < 600


def test_a_dry_run_needs_no_broker_and_its_reader_may_leave_early() -> None:
    with dry_run("--duration", "0", "--rate", "100000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = json.loads(process.stdout.readline())
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == b""
    assert len(first) == 10


def test_an_endless_dry_run_ends_when_it_is_told_to() -> None:
    with dry_run("--duration", "0", "--rate", "50") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        process.stdout.read()
        assert process.wait(timeout=30) == 0


class Full:
    """A client that does not take each record at once, as one whose buffer is full."""

    def __init__(self, refusals: float) -> None:
        self.taken: list[str] = []
        self._refusals, self._left = refusals, refusals

    def send(self, key: bytes, value: bytes, done: clients.Done) -> None:
        if self._left:
            self._left -= 1
            raise ClientError("BufferError", "Local: Queue full")
        self._left = self._refusals
        self.taken.append(json.loads(value)["event_id"])
        done(None, 0, len(self.taken))

    def close(self, timeout: float) -> None: ...


class Hurried:
    """Time that passes at once for who waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        time = SimpleNamespace(monotonic=self, time=self)
        for module in (producer, sdnotify):
            monkeypatch.setattr(module, "time", time)

    def __call__(self) -> float:
        return self.now

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False


@pytest.mark.parametrize(("refusals", "sent", "failed"), [(2, 30, 0), (math.inf, 0, 1)])
def test_a_record_that_is_not_taken_is_tried_again_and_never_left_out(
    refusals: float, sent: int, failed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = Full(refusals)
    monkeypatch.setattr(clients, "connect", lambda *_: full)
    options = parse_args(["--seed", "1", "--duration", "6", "--quiet"])
    assert producer.run(options, Hurried(monkeypatch)) == failed  # type: ignore[arg-type]
    assert full.taken == [event["event_id"] for event in itertools.islice(Shop(seed=1), sent)]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["BufferError: Local: Queue full"] + [f"{failed} events were not acknowledged"] * failed


def test_an_endless_run_gives_up_a_record_in_the_time_that_a_client_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "connect", lambda *_: Full(150))
    options = parse_args(["--seed", "1", "--duration", "0", "--quiet"])
    sender = producer.Sender(options, Hurried(monkeypatch), producer.Console())  # type: ignore[arg-type]
    assert sender.connect()
    records = options.records()
    assert sender.send(records)
    assert (sender.sent, sender.failed) == (0, 1)
    assert sender.send(records)
    assert (sender.sent, sender.failed) == (1, 1)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Account:
    """A sender's figures, as they are at each look; ends after the last one."""

    def __init__(self, clock: Clock, *figures: tuple[int, int]) -> None:
        self.sent = self.failed = 0
        self._clock = clock
        self._figures = iter(figures)

    def wait(self, seconds: float) -> bool:
        self._clock.now += seconds
        self.sent, self.failed = next(self._figures, (-1, -1))
        return self.sent < 0


@pytest.mark.parametrize(
    ("total", "lines"),
    [
        (100, ["25/100 acknowledged, 5.0/s", "25/100 acknowledged, 0.0/s", "99/100 acknowledged, 14.8/s, 1 failed"]),
        (None, ["25 acknowledged, 5.0/s", "25 acknowledged, 0.0/s", "99 acknowledged, 14.8/s, 1 failed"]),
    ],
)
def test_progress_is_told_on_stderr(total: int | None, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    run = Account(clock, (25, 0), (25, 0), (99, 1))
    producer.tell_progress(run, total, run, clock)  # type: ignore[arg-type]
    told = capsys.readouterr()
    assert told.err.splitlines() == lines
    assert not told.out
