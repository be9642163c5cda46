"""Records that are wrong on purpose: as many as asked for, and their truth is true."""

from __future__ import annotations

import errno
import itertools
import json
import threading
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING

import orjson
import pytest

from clickstream import account, faults, producer, rules, silver
from clickstream.faults import KINDS, MALFORMED, Faults, Record, Truth, TruthFile, parse_rates
from clickstream.producer import parse_args
from clickstream.settings import Settings
from clickstream.shop import Shop

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1764419696.789
RATES = {"duplicate": 0.05, "conflicting": 0.04, "late": 0.03, "future": 0.02, "malformed": 0.06}


def take(count: int, rates: dict[str, float] = RATES, seed: int = 1, late_by: float = 1800) -> list[Record]:
    # Each event has a time of its own, as in a run.
    ticks = (NOW + n / 100 for n in itertools.count())
    shop = Shop(seed=seed, clock=lambda: next(ticks))
    return list(itertools.islice(Faults(shop, rates, seed=seed, late_by=late_by), count))


def of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record.truth.kind == kind]


@pytest.mark.parametrize("seed", range(3))
def test_the_rates_are_what_was_asked_for(seed: int) -> None:
    found = Counter(record.truth.kind for record in take(50_000, seed=seed))
    for kind, rate in RATES.items():
        # four standard deviations; a seeded run passes or fails for ever
        assert abs(found[kind] - 50_000 * rate) < 4 * (50_000 * rate * (1 - rate)) ** 0.5
    assert sum(found.values()) == 50_000


def test_without_faults_and_with_none_the_shop_is_the_same() -> None:
    shop = list(itertools.islice(Shop(seed=1, clock=lambda: NOW), 100))
    for records in (
        faults.plain(Shop(seed=1, clock=lambda: NOW)),
        Faults(Shop(seed=1, clock=lambda: NOW), {}, seed=1),
    ):
        taken = list(itertools.islice(records, 100))
        assert [orjson.loads(record.value or b"") for record in taken] == shop
        assert [record.key.decode() for record in taken] == [event["user_id"] for event in shop]
        assert [record.truth for record in taken] == [Truth("event", e["event_id"], "event") for e in shop]


def test_a_seeded_run_repeats() -> None:
    assert take(2_000, seed=7) == take(2_000, seed=7)
    assert take(2_000, seed=7) != take(2_000, seed=8)


def test_what_is_expected_has_the_names_silver_uses() -> None:
    expected = {record.truth.kind: record.truth.expect for record in take(5_000)}
    assert expected == {
        "event": "event",
        "duplicate": account.DUPLICATE,
        "conflicting": account.CONFLICTING,
        "late": account.LATE,
        "future": silver.INVALID,
        "malformed": silver.INVALID,
    }


def test_a_duplicate_is_an_earlier_event_byte_for_byte() -> None:
    seen: dict[str, Record] = {}
    repeated = Counter[str]()
    for record in take(20_000):
        if record.truth.kind == "event":
            assert record.truth.event_id not in seen
            seen[record.truth.event_id] = record
        elif record.truth.kind in ("duplicate", "conflicting"):
            first = seen[record.truth.event_id]
            repeated[record.truth.event_id] += 1
            assert record.key == first.key
            assert (record.value == first.value) == (record.truth.kind == "duplicate")
    assert max(repeated.values()) == 1


def test_a_conflict_has_other_content_that_is_valid() -> None:
    records = take(20_000)
    first = {record.truth.event_id: record.event for record in of_kind(records, "event")}
    changed = Counter[str]()
    for record in of_kind(records, "conflicting"):
        event = orjson.loads(record.value or b"")
        (field,) = [name for name, value in event.items() if value != first[event["event_id"]][name]]
        changed[field] += 1
        assert event["event_type"] in ("view", "add_to_cart", "purchase")
        assert event["price"] > 0
        assert round(event["price"], 2) == event["price"]
    assert set(changed) == {"price", "event_type"}


def test_only_the_last_thousand_events_are_repeated() -> None:
    records = take(20_000, {"duplicate": 0.01})
    place = {record.truth.event_id: n for n, record in enumerate(of_kind(records, "event"))}
    newest = 0
    for record in records:
        here = place[record.truth.event_id]
        newest = max(newest, here)
        assert newest - here < 1_000 * 1.1  # those repeated already are not among the thousand


@pytest.mark.parametrize(("kind", "by"), [("late", -7200.0), ("future", 5 * 60 + 3600.0)])
def test_late_and_future_events_differ_in_their_time_only(kind: str, by: float) -> None:
    ordinary = {e["event_id"]: e for e in (r.event for r in take(2_000, {}))}
    moved = of_kind(take(2_000, {kind: 0.2}, late_by=7200), kind)
    assert moved
    for record in moved:
        event = orjson.loads(record.value or b"")
        original = ordinary[event["event_id"]]
        ahead = datetime.fromisoformat(event["timestamp"]) - datetime.fromisoformat(original["timestamp"])
        assert ahead.total_seconds() == by
        assert event | {"timestamp": ""} == original | {"timestamp": ""}


def test_the_future_is_past_the_skew_the_streams_are_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKSTREAM_MAX_CLOCK_SKEW", "2 hours")
    record = take(1, {"future": 1.0})[0]
    assert datetime.fromisoformat(record.event["timestamp"]).timestamp() > NOW + 2 * 3600


def test_every_rule_has_a_record_that_fails_it() -> None:
    codes = {code for code, _ in MALFORMED} | {"timestamp_future"}
    assert codes == {rule.code for rule in rules.RULES if rule.applies(Settings.ruleset_version)}


def test_every_form_of_malformed_record_comes_in_turn() -> None:
    records = of_kind(take(1_000, {"malformed": 0.5}), "malformed")[: len(MALFORMED)]
    assert [record.truth.code for record in records] == [code for code, _ in MALFORMED]
    assert len({record.value for record in records}) == len(MALFORMED)
    for record in records:
        assert record.key == record.event["user_id"].encode()
        assert record.value != orjson.dumps(record.event)


def test_a_wrong_field_is_in_an_object_and_the_rest_is_not() -> None:
    whole = {"tombstone", "empty_value", "not_utf8", "not_json_object"}
    for record in of_kind(take(1_000, {"malformed": 0.5}), "malformed"):
        try:
            is_object = isinstance(json.loads(record.value or b""), dict)
        except ValueError:
            is_object = False
        assert is_object == (record.truth.code not in whole)


def test_one_rate_for_all_is_spread_evenly() -> None:
    assert parse_rates("all=0.05") == pytest.approx(dict.fromkeys(KINDS, 0.01))
    assert parse_rates("late=0.1, malformed=0.2") == {"late": 0.1, "malformed": 0.2}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--faults", "lost=0.1"], "choose from all, duplicate"),
        (["--faults", ""], "choose from all, duplicate"),
        (["--faults", "late"], "write for example late=0.01"),
        (["--faults", "late=much"], "write for example late=0.01"),
        (["--faults", "late=1.5"], "from 0 to 1"),
        (["--faults", "late=-0.1"], "from 0 to 1"),
        (["--faults", "late=nan"], "from 0 to 1"),
        (["--faults", "late=0.1,late=0.2"], "give it once"),
        (["--faults", "all=0.1,late=0.2"], "all stands alone"),
        (["--faults", "late=0.6,malformed=0.6"], "lower them to 1 or less"),
        (["--faults", "duplicate=0.6"], "lower duplicate and conflicting"),
        (["--faults", "all=0.05", "--late-by", "600"], "the watermark's 600"),
        (["--faults", "all=0.05", "--late-by", "604800"], "the age limit's 604800"),
        (["--truth", "t", "--dry-run"], "leave out --dry-run"),
        (["--progress", "--dry-run"], "--progress is of acknowledged records; leave out --dry-run"),
        (["--truth", "/"], "name another file"),
    ],
)
def test_wrong_options_name_the_fix(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_args(argv)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_a_dry_run_with_faults_is_still_json_lines(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = parse_args(["--dry-run", "--seed", "1", "--faults", "all=0.5"])
    assert producer.dry_run(options, threading.Event()) == 0
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert len(lines) == 300
    assert {line["kind"] for line in lines} == {"event", *KINDS}
    assert {line["value"] for line in lines if line["code"] == "tombstone"} == {None}
    assert all(json.loads(line["value"])["event_id"] == line["event_id"] for line in lines if line["kind"] == "event")


def test_the_truth_has_a_line_for_each_record(tmp_path: Path) -> None:
    file = TruthFile(tmp_path / "truth")
    records = take(200)
    for offset, record in enumerate(records):
        file.write("clicks", 2, offset, record.truth)
    file.close()
    lines = [json.loads(line) for line in (tmp_path / "truth").read_text().splitlines()]
    assert [line["offset"] for line in lines] == list(range(200))
    assert list(lines[0].items()) == [
        ("topic", "clicks"),
        ("partition", 2),
        ("offset", 0),
        *records[0].truth._asdict().items(),
    ]
    assert [Truth(*(line[name] for name in Truth._fields)) for line in lines] == [record.truth for record in records]
    assert file.error is None


def test_the_truth_of_another_run_stays(tmp_path: Path) -> None:
    (tmp_path / "truth").write_text("kept")
    with pytest.raises(FileExistsError):
        TruthFile(tmp_path / "truth")
    assert (tmp_path / "truth").read_text() == "kept"


def test_a_full_disk_is_not_forgotten(tmp_path: Path) -> None:
    file = TruthFile(tmp_path / "truth")
    file._file.close()
    with open("/dev/full", "wb") as full:
        file._file = full  # type: ignore[assignment]
        file.write("t", 0, 0, Truth("event", "evt_00000001", "event"))
        file.close()
    assert file.error is not None
    assert file.error.errno == errno.ENOSPC
