"""Replay: golden cases in, our events out; the position never moves past what is not acknowledged."""

from __future__ import annotations

import gzip
import json
import threading
from itertools import islice
from typing import TYPE_CHECKING

import orjson
import pytest
from conftest import CASES

from clickstream import producer
from clickstream.clients import ClientError
from clickstream.event import FIELDS
from clickstream.producer import parse_replay
from clickstream.replay import Replay
from clickstream.shop import Shop

if TYPE_CHECKING:
    from pathlib import Path

    from clickstream import clients

SETS = ("retailrocket", "rees46")


def dry_run(capfdbinary: pytest.CaptureFixture[bytes], *argv: str) -> list[dict[str, object]]:
    assert producer.dry_run(parse_replay([*argv, "--dry-run"]), threading.Event()) == 0
    return [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]


def csv_file(folder: Path, *timestamps: object) -> Path:
    """A view of one visitor at each of these times."""
    path = folder / "events.csv"
    path.write_text(
        "timestamp,visitorid,event,itemid,transactionid\n" + "".join(f"{t},1,view,2,\n" for t in timestamps)
    )
    return path


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_is_mapped(name: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    case = CASES / f"replay_{name}"
    found = dry_run(capfdbinary, str(case / "events.csv"), "--format", name, "--keep-timestamps")
    assert found == [json.loads(line) for line in (case / "expected.jsonl").read_text().splitlines()]
    assert all(tuple(event) == FIELDS for event in found)


@pytest.mark.parametrize(("pause", "sessions"), [(1_799_999, 1), (1_800_000, 2)])
def test_a_visit_has_ended_after_half_an_hour(pause: int, sessions: int, tmp_path: Path) -> None:
    path = csv_file(tmp_path, 1_433_221_332_117, 1_433_221_332_117 + pause)
    assert len({event["session_id"] for _, event in Replay(path, "retailrocket").events()}) == sessions


def test_what_is_left_out_is_named(caplog: pytest.LogCaptureFixture, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = CASES / "replay_rees46" / "events.csv"
    dry_run(capfdbinary, str(path), "--format", "rees46")
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot be mapped: {path}:6: price '-4.76' is not from 0 to below 10^10",
        "skipped: 1 rows of type remove_from_cart",
    ]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    ticks = iter(range(1_764_419_696, 1_764_420_000))
    path = tmp_path / "events.jsonl.gz"
    shop = Shop(seed=1, clock=lambda: float(next(ticks)))
    path.write_bytes(gzip.compress(b"".join(orjson.dumps(event) + b"\n" for event in islice(shop, 100))))
    return path


def test_recorded_events_come_as_they_were(recorded: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    found = dry_run(capfdbinary, str(recorded), "--keep-timestamps")
    assert found == [json.loads(line) for line in gzip.decompress(recorded.read_bytes()).splitlines()]


def test_gaps_are_divided_by_the_speed_and_the_first_event_is_of_now(recorded: Path) -> None:
    replay = Replay(recorded, "events")
    due, stamps = [], []
    for seconds in replay.arrivals(lambda due: 1_800_000_000 + due, 4.0, False):
        due.append(seconds)
        stamps.append(replay.current["timestamp"])
    assert due == [n / 4 for n in range(100)]
    assert stamps[:2] == ["2027-01-15T08:00:00.000Z", "2027-01-15T08:00:00.250Z"]


def test_a_time_that_goes_back_does_not_wait() -> None:
    replay = Replay(CASES / "replay_retailrocket" / "events.csv", "retailrocket")
    due = list(replay.arrivals(lambda due: due, 1.0, True))
    assert due == sorted(due)
    assert due[-1] == due[-2]


def rows(state: Path) -> int:
    return int(json.loads(state.read_bytes())["rows"])


def test_the_position_stays_before_what_is_not_acknowledged(recorded: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    replay = Replay(recorded, "events", state=state)
    sent = []
    for _ in replay.arrivals(lambda due: due, 0.0, True):
        sent.append(replay.current)
        if len(sent) == 10:
            break
    for place in (0, 1, 2, 4, 5):
        replay.settled(sent[place])
    replay.save()
    assert rows(state) == 3  # the fourth is open
    again = Replay(recorded, "events", state=state)
    assert next(again.events())[1]["event_id"] == sent[3]["event_id"]
    for event in sent:
        replay.settled(event)
    replay.save()
    assert rows(state) == 10


def test_a_run_that_is_stopped_goes_on_where_it_was(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()
    taken: list[bytes] = []

    class Taking:
        def send(self, key: bytes, value: bytes | None, done: clients.Done) -> None:
            if len(taken) == 40:
                done(ClientError("GONE", "the broker went away"), -1, -1)
                stop.set()
                return
            taken.append(value or b"")
            done(None, 0, len(taken))

        def close(self, timeout: float) -> None: ...

    monkeypatch.setattr("clickstream.clients.connect", lambda *_: Taking())
    argv = [str(recorded), "--speed", "0", "--quiet", "--keep-timestamps", "--resume", str(tmp_path / "state")]
    assert producer.run(parse_replay(argv), stop) == 1
    assert rows(tmp_path / "state") == 40
    first, taken[:] = list(taken), []
    monkeypatch.setattr(Taking, "send", lambda self, key, value, done: (taken.append(value), done(None, 0, 0)))
    assert producer.run(parse_replay(argv), threading.Event()) == 0
    assert first + taken == gzip.decompress(recorded.read_bytes()).splitlines()
    assert rows(tmp_path / "state") == 100


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["none.csv"], "none.csv is not a file"),
        ([str(CASES / "replay_rees46" / "events.csv"), "--format", "retailrocket"], "is it --format retailrocket?"),
        ([str(CASES / "replay_rees46" / "events.csv"), "--speed", "-1"], "--speed"),
    ],
)
def test_wrong_options_name_the_fix(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_replay(argv)
    assert error.value.code == 2
    assert said in capsys.readouterr().err
