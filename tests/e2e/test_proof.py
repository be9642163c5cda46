"""The long proof, `make prove`: 200,000 records with faults of every kind, through restarts of the streams and of the
guest; then the batch layer's verbs over them. Figures are compared with a recount that has nothing but Bronze's bytes:
neither Spark nor Silver tells it what counts."""

from __future__ import annotations

import base64
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from platform_under_test import ROOT, Platform, encoded, wait_until

pytestmark = pytest.mark.proof

RECORDS = 200_000
RATE = 2_000
# Into an hour that is closed, for the batch layer.
LATE_BY = 4_000
# In the guest; a reload leaves it.
TRUTHS = "/var/tmp/clickstream-truth"
CASES = ROOT / "pipeline/tests/cases"
WINDOWED = ("gold.product_funnel_1m", "gold.product_funnel_1h", "gold.conversion_1h")
PATIENCE = 600


class Run:
    """A run of the producer in the guest, beside the shop."""

    def __init__(self, platform: Platform, part: int, records: int) -> None:
        self.platform, self.unit, self.truth = platform, f"ecom-proof-{part}", f"{TRUTHS}/{part}.jsonl"
        platform.run(f"sudo mkdir -p {TRUTHS}; sudo rm -f {self.truth}")
        rate = f"--rate {RATE} --duration {records / RATE:g}"
        platform.produce(self.unit, f"{rate} --faults all=0.25 --late-by {LATE_BY} --truth {self.truth}")

    def sent(self) -> int:
        """Lines of the truth so far."""
        return int(self.platform.run(f"sudo cat {self.truth} 2>/dev/null | wc -l"))


def closed_hours() -> tuple[datetime, datetime]:
    """From three hours ago to the last full hour that the streams have finished, without a zone."""
    end = (datetime.now(UTC) - timedelta(minutes=5)).replace(minute=0, second=0, microsecond=0, tzinfo=None)
    return end - timedelta(hours=3), end


def command(platform: Platform, words: str, *codes: int) -> dict[str, Any]:
    """The JSON that a command of `clickstream` prints; its exit code has to be one of those named."""
    said = platform.run(f"sudo clickstream {words} --json 2>/tmp/said; code=$?; echo; echo $code", timeout=PATIENCE)
    *report, code = said.strip().splitlines()
    assert int(code) in codes, f"{code}: {platform.run('tail -20 /tmp/said')}"
    return dict(json.loads(report[0]))


def recompute(platform: Platform, *options: str) -> dict[str, Any]:
    """Gold of the closed hours, computed again."""
    start, end = closed_hours()
    return command(platform, " ".join((f"recompute --from {start:%Y-%m-%dT%HZ} --to {end:%Y-%m-%dT%HZ}", *options)), 0)


def assert_gold_is_the_recount(platform: Platform) -> dict[str, int]:
    """All windows of all marts, live ones too; rows by table."""
    platform.quiesce(PATIENCE)
    counted = platform.lake().recount(*WINDOWED)

    def same() -> bool:
        for name, rows in counted.items():
            found = platform.served(name)
            assert found == rows, (
                f"{name}: only served {sorted(found - rows)[:3]}, only counted {sorted(rows - found)[:3]}"
            )
        return True

    # The hours are counted each minute.
    wait_until(same, 180, "the marts are what the recount says")
    return {name: len(rows) for name, rows in counted.items()}


def test_faults_of_every_kind_through_restarts(platform: Platform) -> None:
    platform.healthy()
    since = platform.end_offsets()
    parts = [Run(platform, 1, 80_000)]
    wait_until(lambda: parts[0].sent() > 20_000, 120, "the first run is under way")
    platform.run("sudo systemctl restart ecom-streams")
    platform.wait_for_producer(parts[0].unit, PATIENCE)
    parts.append(Run(platform, 2, 80_000))
    wait_until(lambda: parts[1].sent() > 20_000, 120, "the second run is under way")
    platform.vagrant("reload")
    platform.healthy()
    interrupted = parts[1].sent()
    assert 20_000 < interrupted < 80_000
    parts.append(Run(platform, 3, RECORDS - 80_000 - interrupted))
    wait_until(lambda: parts[2].sent() > 20_000, 120, "the third run is under way")
    pid = platform.main_pids()["ecom-streams.service"]
    platform.run(f"sudo kill -KILL {pid}")
    platform.wait_for_producer(parts[2].unit, PATIENCE)
    platform.healthy()

    platform.run("sudo systemctl stop ecom-producer")
    platform.wait_for_streams(PATIENCE)
    report = platform.account()
    assert {row["partition"]: row["end_offset"] for row in report["ledger"]} == platform.end_offsets()
    truth = [json.loads(line) for part in parts for line in platform.run(f"sudo cat {part.truth}").splitlines()]
    assert len(truth) == RECORDS
    platform.figures += [
        f"{RECORDS} records, of which {dict(Counter(entry['kind'] for entry in truth))}",
        *(json.dumps(row) for row in report["ledger"]),
        f"against the truth: {platform.assert_told_apart(truth, since)}",
    ]
    assert sum(row["late_added"] for row in report["ledger"]) > 0
    lake = platform.lake()
    assert set(lake.offsets("silver/events")) == lake.kept(), "Silver's events are not the oracle's"
    rows = assert_gold_is_the_recount(platform)
    platform.figures.append(f"marts equal to DuckDB's recount of Bronze's bytes, rows: {rows}")


def test_late_events_are_in_gold_after_a_recomputation(platform: Platform) -> None:
    platform.quiesce(PATIENCE)
    report = recompute(platform)
    assert recompute(platform, "--dry-run")["differences"] == 0
    platform.figures.append(f"recompute {report['start']} to {report['end']}: {report['differences']} differences")
    lake = platform.lake()
    start, end = closed_hours()
    for name, rows in lake.recount(*WINDOWED).items():
        # Delta has final windows; those of the closed hours all are.
        path = name.replace(".", "/")
        keys = "window_start AT TIME ZONE 'UTC'"
        (final,) = lake.query(f"SELECT count(*) FROM t WHERE {keys} < TIMESTAMP '{end}'", t=path)[0]
        closed = {row for row in rows if row[0] < end}
        assert closed and final == len(closed), (name, final, len(closed))
        assert closed <= platform.served(name)
    visits = lake.recount("gold.sessions")["gold.sessions"]
    found = platform.served("gold.sessions")
    assert found and found <= visits, sorted(found - visits)[:3]
    # Those that begin up to half an hour after the range are computed too.
    near = {row for row in visits if start - timedelta(days=1) <= row[0] < end + timedelta(minutes=30)}
    assert len(near - found) == report["left_out"], sorted(near - found)[:3]
    platform.figures.append(f"gold.sessions: {len(found)} visits equal to the recount, {report['left_out']} left out")


def test_a_rule_change_is_shown_swapped_and_taken_back(platform: Platform) -> None:
    """Version 2 of the rules takes any kind of device."""
    platform.quiesce(PATIENCE)
    hour_ago = (datetime.now(UTC) - timedelta(seconds=LATE_BY)).isoformat(timespec="milliseconds")
    stamp = hour_ago.replace("+00:00", "Z")
    values = [encoded(device_type="fridge", timestamp=stamp) for _ in range(20)]
    sent = platform.send([(f"fridge {n}", b"user_0042", value) for n, value in enumerate(values)])
    platform.wait_for_streams()
    platform.account()
    recompute(platform)
    _, end = closed_hours()

    def closed(name: str) -> set[tuple[Any, ...]]:
        return {row for row in platform.served(name) if row[0] < end}

    before = {name: closed(name) for name in (*WINDOWED, "gold.sessions")}
    shown = command(platform, "backfill --ruleset 2 --dry-run", 3)
    assert not shown["swapped"]
    (valid,) = (line for line in shown["lines"] if line["becomes"] == "event")
    assert valid["was"] == "invalid" and valid["records"] >= len(sent) and set(valid["codes"]) == {"device_unknown"}
    # What fails another rule too goes on failing it.
    assert {(line["was"], line["becomes"]) for line in shown["lines"]} <= {("invalid", "event"), ("invalid", "invalid")}
    assert set(sent).isdisjoint(platform.lake().offsets("silver/events")), "a dry run changed Silver"

    swapped = command(platform, "backfill --ruleset 2", 0)
    assert swapped["swapped"] and swapped["differences"] == shown["differences"] >= len(sent)
    assert set(sent) <= set(platform.lake().offsets("silver/events"))
    followed = recompute(platform)
    assert followed["differences"] > 0
    counted = platform.lake().recount(*WINDOWED, ruleset=2)
    for name in WINDOWED:
        after = closed(name)
        assert after == {row for row in counted[name] if row[0] < end}
        assert name == "gold.product_funnel_1m" or after != before[name]

    back = command(platform, "backfill --rollback", 0)
    assert back["swapped"] and back["differences"] == shown["differences"]
    assert set(sent).isdisjoint(platform.lake().offsets("silver/events"))
    recompute(platform)
    assert {name: closed(name) for name in before} == before
    platform.figures.append(
        f"backfill: {shown['records']} records, {shown['differences']} differences shown, swapped and taken back;"
        f" Gold followed with {followed['differences']} differences and went back"
    )


@pytest.mark.parametrize("kind", ["retailrocket", "rees46"])
def test_a_public_data_set_goes_through_to_gold(platform: Platform, kind: str) -> None:
    platform.quiesce(PATIENCE)
    case = CASES / f"replay_{kind}"
    content = base64.b64encode((case / "events.csv").read_bytes()).decode()
    file = f"/tmp/{kind}.csv"
    platform.run(f"echo {content} | base64 -d > {file}")
    # As it is in the golden case, but of now.
    said = platform.run(f"ecom-producer replay {file} --format {kind} --speed 1000 2>&1", check=False)
    wanted = Counter(
        (event["product_id"], event["event_type"])
        for event in map(json.loads, (case / "expected.jsonl").read_text().splitlines())
    )
    assert f"Total events sent: {wanted.total()}" in said, said
    assert_gold_is_the_recount(platform)
    counts: Counter[tuple[str, str]] = Counter()
    for product, *numbers in platform.mart(
        "SELECT product_id, sum(views)::int, sum(carts)::int, sum(purchases)::int "
        "FROM gold.product_funnel_1m GROUP BY 1"
    ):
        for event_type, number in zip(("view", "add_to_cart", "purchase"), numbers, strict=True):
            counts[product, event_type] += number
    ours = {product for product, _ in wanted if product != "prod_0012"}
    assert {key: n for key, n in counts.items() if key[0] in ours and n} == {
        key: n for key, n in wanted.items() if key[0] in ours
    }
    platform.figures.append(f"replay of {kind}: {wanted.total()} events in Gold")
