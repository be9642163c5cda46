"""Another version of the rules: what it changes is shown, replaced, followed by Gold, and can be taken back."""

from __future__ import annotations

import contextlib
import json
import shutil
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from conftest import NOW, Topic, event
from test_account import Lake

from clickstream import account, backfill, cli, gold, recompute, silver
from clickstream.backfill import Line, Range
from clickstream.errors import JobError
from clickstream.lake import Table, append_once
from clickstream.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pyspark.sql import DataFrame, SparkSession

HOUR = timedelta(hours=1)


class Shop(Lake):
    def backfill(self, version: int = 2, **options: Any) -> backfill.Report:
        settings = Settings(
            **{name: getattr(self.settings, name) for name in ("lake_uri", "status_dir")}, ruleset_version=version
        )
        return backfill.backfill(self.spark, settings, **options)

    def roll_back(self, **options: Any) -> backfill.Report:
        return backfill.roll_back(self.spark, self.settings, **options)

    def versions(self) -> dict[int, int]:
        """The rule set that judged each offset of partition 0."""
        tables = (table.read(self.spark, self.settings) for table in silver.TABLES)
        return {
            row["offset"]: row["ruleset_version"]
            for table in tables
            for row in table.where("partition = 0").select("offset", "ruleset_version").collect()
        }

    def contents(self) -> list[list[Any]]:
        """All of Silver, but for the time at which it was written."""
        return [
            sorted(table.read(self.spark, self.settings).drop("processed_at", "rejected_at", "reject_date").collect())
            for table in silver.TABLES
        ]


@pytest.fixture(scope="module")
def lake(spark: SparkSession, empty_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rule set 2 judges otherwise: a fridge is a device (offset 1), and 250,000 is no price (2 and 4)."""
    path = tmp_path_factory.mktemp("backfill") / "lake"
    shutil.copytree(empty_lake, path)
    shop = Shop(spark, Settings(lake_uri=f"file://{path}"), Topic(spark))
    shop.send(
        [
            event(1),
            event(2, device_type="fridge"),
            event(3, price=250_000),
            b"rubbish",
            # valid by 1: a duplicate; invalid by 2
            event(3, price=250_000),
            # a duplicate of what is invalid by 1 and valid by 2
            event(2, device_type="fridge"),
            event(1, price=5),
        ]
    )
    shop.account()
    return path


@pytest.fixture
def shop(spark: SparkSession, bare: Settings, lake: Path) -> Shop:
    shutil.copytree(lake, bare.lake_uri.removeprefix("file://"))
    return Shop(spark, bare, Topic(spark, start=7))


BY_1 = {
    0: ["events"],
    1: ["invalid"],
    2: ["events"],
    3: ["invalid"],
    4: ["duplicate"],
    5: ["invalid"],
    6: ["conflicting_duplicate"],
}
BY_2 = BY_1 | {1: ["events"], 2: ["invalid"], 4: ["invalid"], 5: ["duplicate"]}


def test_a_rule_change_is_shown_swapped_and_taken_back(shop: Shop) -> None:
    assert shop.places() == BY_1
    before = shop.contents()

    shown = shop.backfill(dry_run=True)
    assert shown.ranges == [Range("topic", 0, 0, 7)]
    assert shown.lines == [
        Line("duplicate", "invalid", 1, {"price_implausible": 1}),
        Line("event", "invalid", 1, {"price_implausible": 1}),
        Line("invalid", "duplicate", 1, {"device_unknown": 1}),
        Line("invalid", "event", 1, {"device_unknown": 1}),
    ]
    assert shown.first[:2] == [
        "topic/0 offset 1: invalid becomes event (device_unknown)",
        "topic/0 offset 2: event becomes invalid (price_implausible)",
    ]
    assert (shown.differences, shown.relabelled, shown.swapped) == (4, 3, False)
    assert (shop.places(), shop.contents()) == (BY_1, before), "a dry run changes nothing"

    done = shop.backfill()
    assert (done.lines, done.swapped) == (shown.lines, True)
    assert done.hours == ("2025-11-29T12:00Z", "2025-11-29T13:00Z")
    assert shop.places() == BY_2
    assert set(shop.versions().values()) == {2}
    again = shop.backfill()
    assert (again.differences, again.relabelled, again.swapped) == (0, 0, False)

    with after_the_retention(), pytest.raises(JobError, match=r"kept what was before .* --ruleset`"):
        shop.roll_back()

    # What comes meanwhile stays.
    shop.send([event(9), b"more rubbish"])
    taken = shop.roll_back()
    assert {(line.was, line.becomes, line.records) for line in taken.lines} == {
        (line.becomes, line.was, line.records) for line in done.lines
    }
    assert shop.places() == BY_1 | {7: ["events"], 8: ["invalid"]}
    assert [[row for row in rows if row["offset"] < 7] for rows in shop.contents()] == before
    with pytest.raises(JobError, match="no backfill to roll back"):
        shop.roll_back()
    assert account.account(shop.spark, shop.settings, {("topic", 0): 9}).unexplained == []


def test_gold_follows_and_goes_back(shop: Shop) -> None:
    shop.send([event(8, timestamp="2025-11-29T14:00:00.000Z")], at=NOW + 2 * HOUR)
    noon = recompute.Span(NOW, NOW + HOUR)

    def served() -> dict[str, int]:
        recompute.recompute(shop.spark, shop.settings, noon, ["gold.conversion_1h"])
        rows = gold.CONVERSION_1H.table.read(shop.spark, shop.settings).where("dimension = 'device'").collect()
        return {row["value"]: row["views"] for row in rows}

    assert served() == {"mobile": 2}
    shop.backfill()
    assert served() == {"mobile": 1, "fridge": 1}
    shop.roll_back()
    assert served() == {"mobile": 2}


def test_the_same_rules_change_nothing(shop: Shop) -> None:
    shop.send([event(1), event(4, timestamp="2025-11-29T11:58:00.000Z")], at=NOW + timedelta(minutes=1))
    shop.send([event(10, timestamp="2025-11-29T12:30:00.000Z")], at=NOW + timedelta(minutes=30), partition=1)
    shop.send([event(11), event(11, price=3), event(1)], at=NOW + timedelta(minutes=31), partition=1)
    shop.send([event(12)], at=NOW + timedelta(minutes=31), partition=2)
    shop.account()
    found = shop.backfill(1)
    assert (found.lines, found.relabelled, found.swapped, found.records) == ([], 0, False, 14)


def test_a_range_is_of_kafkas_time_and_no_further_than_the_ledger(shop: Shop) -> None:
    def at(hours: float) -> datetime:
        return NOW + hours * HOUR

    moments = {hours: at(hours).isoformat() for hours in (1, 2, 3, 4)}
    for hours, moment in moments.items():
        shop.send([event(20 + hours, timestamp=moment, device_type="fridge")], at=at(hours))
    # not in the ledger: hour 4
    account.account(shop.spark, shop.settings, {("topic", 0): 10})
    found = shop.backfill(start=at(2), end=at(3))
    assert found.ranges == [Range("topic", 0, 8, 9)]
    assert shop.versions() == dict.fromkeys(range(11), 1) | {8: 2}
    assert found.hours == ("2025-11-29T14:00Z", "2025-11-29T15:00Z")
    later = shop.backfill(start=at(2.5), dry_run=True)
    assert (later.ranges, later.left_out) == ([Range("topic", 0, 9, 10)], 1)
    with pytest.raises(JobError, match="none of the 1 records of that time is in the ledger yet; run `clickstream acc"):
        shop.backfill(start=at(4))
    with pytest.raises(JobError, match="Bronze has no records of that time"):
        shop.backfill(start=at(5))


def test_an_event_outside_the_range_keeps_its_id(shop: Shop) -> None:
    """Valid by 2 and earlier, but the one that is in Silver counts, as it does for late events."""
    shop.send([event(2)], at=NOW + timedelta(minutes=1))
    shop.account()
    assert shop.places()[7] == ["events"]
    shop.backfill(end=NOW + timedelta(minutes=1))
    assert [shop.places()[offset] for offset in (1, 5, 7)] == [
        ["conflicting_duplicate"],
        ["conflicting_duplicate"],
        ["events"],
    ]


@contextlib.contextmanager
def after_the_retention() -> Iterator[None]:
    """As if the tables' files of before the backfill were gone by now."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=49)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backfill, "datetime", Later)
        yield


@contextlib.contextmanager
def full_disk(name: str) -> Iterator[None]:
    """Lets writes to a table fail, and expects that this is not swallowed."""
    replace = Table.replace

    def replaced(table: Table, rows: DataFrame, settings: Settings, where: str) -> None:
        if table.name == name:
            raise OSError("no space left on device")
        replace(table, rows, settings, where)

    def appended(rows: DataFrame, path: str, app_id: str, version: int) -> None:
        if path.endswith(name.replace(".", "/")):
            raise OSError("no space left on device")
        append_once(rows, path, app_id, version)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Table, "replace", replaced)
        patch.setattr(backfill, "append_once", appended)
        with pytest.raises(OSError, match="no space left"):
            yield


def test_a_run_that_was_interrupted_is_known_and_taken_back(shop: Shop) -> None:
    before = shop.contents()
    with full_disk("silver.backfills"):
        shop.backfill()
    assert shop.contents() == before
    # The commit to silver.rejects is there, that to silver.events is not.
    with full_disk("silver.events"):
        shop.backfill()
    with pytest.raises(JobError, match="was interrupted while it wrote; take it back with `clickstream backfill --r"):
        shop.backfill()
    # and again in the middle of that
    with full_disk("silver.events"):
        shop.roll_back()
    assert shop.roll_back().swapped
    assert shop.contents() == before
    assert shop.backfill().swapped
    assert shop.places() == BY_2
    with full_disk("silver.events"):
        shop.roll_back()
    with pytest.raises(JobError, match="interrupted"):
        shop.backfill()
    shop.roll_back()
    assert shop.contents() == before


def test_a_run_that_was_interrupted_long_ago_is_closed_by_the_streams_rules(shop: Shop) -> None:
    before = shop.places(), shop.contents()
    with full_disk("silver.events"):
        shop.backfill()
    assert shop.contents() != before[1]
    with after_the_retention():
        assert shop.roll_back().swapped
    assert (shop.places(), shop.contents()) == before
    assert shop.backfill().swapped


def test_an_offset_that_is_not_exactly_once_in_both_is_refused(shop: Shop) -> None:
    shop.spark.sql(f"DELETE FROM delta.`{shop.settings.table('silver.events')}` WHERE offset = 0")
    with pytest.raises(JobError, match=r"7 offsets are asked for, but .* have 7 records of them, 1 in one only"):
        shop.backfill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ruleset 3", "invalid choice: 3"),
        ("--from yesterday", "'yesterday' is not a time"),
        ("--from 2025-11-29T12:00Z --to 2025-11-29T11:00Z", "is not before --to"),
        ("--rollback --ruleset 1", "--rollback takes the latest backfill as it was"),
    ],
)
def test_wrong_words_are_told_before_anything_starts(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["backfill", *words.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "relabelled", "code"), [("--ruleset 2", 0, 0), ("--ruleset 2 --dry-run", 0, 0), ("--dry-run", 5, 3)]
)
def test_the_command_says_what_to_do_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, relabelled: int, code: int
) -> None:
    def run(
        settings: Settings, version: int, start: None, end: None, *, dry_run: bool, rollback: bool
    ) -> dict[str, Any]:
        lines = [] if dry_run else [Line("invalid", "event", 3, {"device_unknown": 3})]
        hours = None if dry_run else ("2025-11-29T12:00Z", "2025-11-29T13:00Z")
        ranges = [Range("t", 0, 0, 9)]
        report = backfill.Report("id", version, ranges, 9, lines, [], relabelled, 2, not dry_run, hours)
        return backfill.as_dict(report)

    monkeypatch.setattr(backfill, "run", run)
    command = ["backfill", "--lake-uri", "file:///lake", *words.split()]
    assert cli.main(command) == code
    said = capsys.readouterr()
    assert "t/0: offsets 0 to 8" in said.out
    assert "2 records are left out: not accounted for yet" in said.err
    if "--dry-run" in words:
        assert "no record changes its place" in said.out
        assert "nothing was changed" in said.out
    else:
        assert "device_unknown 3" in said.out
        assert "recompute --from 2025-11-29T12:00Z --to 2025-11-29T13:00Z" in said.err
        assert "the streams judge by rule set 1; they take this one with" in said.err
    assert cli.main([*command, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["records"] == 9


def test_a_moment_needs_no_zone() -> None:
    assert cli._moment("2025-11-29T12:30") == datetime(2025, 11, 29, 12, 30, tzinfo=UTC)


def test_an_event_that_came_back_after_the_watermark_stays(spark: SparkSession, settings: Settings) -> None:
    """The streams had forgotten its id, so it is there twice, and the same rules do not say otherwise."""
    shop = Shop(spark, settings, Topic(spark))
    later = {"timestamp": "2025-11-29T15:00:00.000Z"}
    shop.send([event(1)])
    shop.send([event(9, **later)], at=NOW + timedelta(hours=3))
    shop.send([event(1, **later)], at=NOW + timedelta(hours=3))
    shop.account()
    assert shop.places() == {0: ["events"], 1: ["events"], 2: ["events"]}
    assert shop.backfill(version=1).differences == 0
    assert shop.backfill(version=2).differences == 0
    assert shop.places() == {0: ["events"], 1: ["events"], 2: ["events"]}
