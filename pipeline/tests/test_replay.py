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
    from collections.abc import Callable
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
    replay = Replay(recorded, "events", speed=4.0)
    due, stamps = [], []
    for seconds in replay.arrivals(lambda due: 1_800_000_000 + due):
        due.append(seconds)
        stamps.append(replay.current["timestamp"])
    assert due == [n / 4 for n in range(100)]
    assert stamps[:2] == ["2027-01-15T08:00:00.000Z", "2027-01-15T08:00:00.250Z"]


def test_a_time_that_goes_back_does_not_wait() -> None:
    replay = Replay(CASES / "replay_retailrocket" / "events.csv", "retailrocket", keep_timestamps=True)
    due = list(replay.arrivals(lambda due: due))
    assert due == sorted(due)
    assert due[-1] == due[-2]


def rows(state: Path) -> int:
    return int(json.loads(state.read_bytes())["rows"])


def test_the_position_stays_before_what_is_not_acknowledged(recorded: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    replay = Replay(recorded, "events", state=state)
    sent = []
    for _ in replay.arrivals(lambda due: due):
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


def sent_after(replay: Replay, now: float, count: int) -> list[bytes]:
    """The first records of a run that starts then."""
    return [orjson.dumps(replay.current) for _ in islice(replay.arrivals(lambda due: now + due), count)]


@pytest.mark.parametrize("speed", [0.0, 2.0])
def test_what_is_sent_again_after_a_crash_has_the_same_bytes(speed: float, recorded: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = sent_after(Replay(recorded, "events", speed=speed, state=state), 1_800_000_000.0, 10)
    assert rows(state) == 0  # nothing was answered before the crash
    assert sent_after(Replay(recorded, "events", speed=speed, state=state), 1_800_000_500.0, 10) == first


def test_what_is_overdue_after_a_crash_does_not_wait(recorded: Path, tmp_path: Path) -> None:
    for now, due in ((1_800_000_000.0, list(range(10))), (1_800_000_005.0, list(range(-5, 5)))):
        replay = Replay(recorded, "events", state=tmp_path / "state")
        assert list(islice(replay.arrivals(lambda due, now=now: now + due), 10)) == due


@pytest.mark.parametrize(
    ("flags", "data", "said"),
    [
        (["--speed", "2"], b"one", "is of a run with speed 1.0;"),
        (["--keep-timestamps"], b"one", "is of a run with keep_timestamps False;"),
        (["--first-id", "9"], b"one", "is of a run with first_id "),
        ([], b"two", "is of another file, events.jsonl of 3 bytes;"),
        ([], b"one more", "is of another file, events.jsonl of 3 bytes;"),
    ],
)
def test_a_state_is_of_one_file_and_one_way_to_run_it(
    flags: list[str], data: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    argv = [str(path), "--resume", str(tmp_path / "state")]
    path.write_bytes(b"one")
    parse_replay(argv)
    parse_replay(argv)
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        parse_replay([*argv, *flags])
    assert said in capsys.readouterr().err


HOUR = 3600_000  # in the milliseconds of the data set
WEEK = 7 * 24 * HOUR


@pytest.mark.parametrize(
    ("timestamps", "elapsed", "unmapped"),
    [
        ([WEEK, WEEK + HOUR, 30_000 * WEEK, WEEK + 2 * HOUR], [0, 1, 2], [4]),  # a wrong clock
        ([0, 99 * WEEK, 99 * WEEK + HOUR, 99 * WEEK + 2 * HOUR], [0, 0, 1], [3]),  # the first one's is
        ([0, WEEK, WEEK + 1000, 0, WEEK + HOUR], [0, 168, 168, 168, 169], []),
        ([0, 10**30, 10**400, -(10**30), "x", HOUR], [0, 1], [3, 4, 5, 6]),
    ],
)
def test_a_wrong_time_neither_stops_nor_hurries_the_others(
    timestamps: list[object], elapsed: list[int], unmapped: list[int], tmp_path: Path
) -> None:
    replay = Replay(csv_file(tmp_path, *timestamps), "retailrocket")
    assert [int(seconds / 3600) for seconds, _ in replay.events()] == elapsed
    assert [int(text.split(":")[1]) for text in replay.named] == unmapped


def test_a_row_before_the_latest_has_that_ones_time(tmp_path: Path) -> None:
    replay = Replay(csv_file(tmp_path, HOUR, HOUR + 1000, 5, HOUR + 2000), "retailrocket")
    stamps = [replay.current["timestamp"][-6:] for _ in replay.arrivals(lambda due: 1_800_000_000 + due)]
    assert stamps == ["0.000Z", "1.000Z", "1.000Z", "2.000Z"]


class Taking:
    """A client whose broker takes everything."""

    def send(self, key: bytes, value: bytes | None, done: clients.Done) -> None:
        done(None, 0, 0)

    def close(self, timeout: float) -> None: ...


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clickstream.clients.connect", lambda *_: Taking())


@pytest.mark.usefixtures("taking")
def test_a_long_wait_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    stop.wait = lambda timeout=None: True  # type: ignore[method-assign]
    path = csv_file(tmp_path, 0, 2 * HOUR)
    assert producer.run(parse_replay([str(path), "--format", "retailrocket", "--keep-timestamps"]), stop) == 0
    (record,) = caplog.records
    assert record.getMessage().startswith("the next event is due in 7200 s, at ")


@pytest.mark.usefixtures("taking")
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("cut.csv.gz", lambda data: gzip.compress(data)[:-9]),
        ("noise.csv.gz", lambda data: gzip.compress(data) + b"noise"),
        ("huge.csv", lambda data: data + b"1,1,view," + b"2" * 200_000 + b",\n"),
    ],
)
def test_a_file_that_cannot_be_read_on_ends_the_run_and_keeps_the_account(
    name: str,
    broken: Callable[[bytes], bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path, state = tmp_path / name, tmp_path / "state"
    path.write_bytes(broken(csv_file(tmp_path, *range(100)).read_bytes()))
    argv = [str(path), "--format", "retailrocket", "--speed", "0", "--quiet"]
    assert producer.run(parse_replay([*argv, "--resume", str(state)]), threading.Event()) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} cannot be read after line 101: ")
    assert f"Total events sent: {rows(state)}" in capfd.readouterr().out
    assert rows(state) == 100
    assert producer.dry_run(parse_replay([*argv, "--dry-run"]), threading.Event()) == 1


def test_a_character_that_is_none_fails_the_row_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    header, row = (CASES / "replay_rees46" / "events.csv").read_bytes().splitlines(keepends=True)[:2]
    path.write_bytes(header + row.replace(b"f1dd33", b"\xff") + row.replace(b"xiaomi", b"\xff"))
    replay = Replay(path, "rees46")
    assert len(list(replay.events())) == 1
    assert [text.split(":")[1] for text in replay.named] == ["2"]


@pytest.mark.usefixtures("taking")
def test_a_full_disk_under_the_state_ends_the_run_with_an_error(
    recorded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    options = parse_replay([str(recorded), "--speed", "0", "--quiet", "--resume", str(state)])
    (tmp_path / "state.new").symlink_to("/dev/full")
    assert producer.run(options, threading.Event()) == 1
    assert {record.getMessage() for record in caplog.records} == {
        f"--resume: {state} cannot be written: No space left on device"
    }


def test_a_dry_run_keeps_nothing(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clickstream.replay.SAVE_SECONDS", -1.0)
    options = parse_replay([str(recorded), "--dry-run", "--resume", str(tmp_path / "state")])
    assert producer.dry_run(options, threading.Event()) == 0
    assert not (tmp_path / "state").exists()
    assert not options.replay._open


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            [str(CASES / "replay_rees46" / "events.csv"), "--format", "rees46", "--resume", "/nowhere/state"],
            "--resume: /nowhere/state cannot be written: No such file or directory",
        ),
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
