"""The pipeline: what is produced arrives in every layer, nothing is lost, everything stops in order.

The lake is counted from a copy, with delta-rs and DuckDB: no line of Spark or of the package is asked about itself.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pytest
from deltalake import DeltaTable
from testinfra.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable

TOPIC = "ecom_clickstream_raw"
LAKE = "/var/lib/lake"
Offsets = set[tuple[int, int]]
# Each breaks another rule; the last is cut inside a character.
BAD_RECORDS = [
    rb"this is not JSON",
    rb'{"event_id": 7}',
    rb'{"event_id": "a", "event_type": "teleport"}',
    rb'{"product_id": "prod_\xc3',
]


@pytest.fixture(scope="module")
def produced(host: Host, address: str, wait_until: Callable[..., Any]) -> None:
    """Let the shop work for a while, send bad records beside it, then close it."""
    wait_until(lambda: len(topic_offsets(host, address)) > 100, 90)
    # In octal, because some of these bytes are no text.
    octal = "".join(f"\\{byte:03o}" for record in BAD_RECORDS for byte in record + b"\n")
    host.check_output(f"printf %s | kafka-console-producer --bootstrap-server {address}:9092 --topic {TOPIC}", octal)
    host.check_output("systemctl stop ecom-producer")


def topic_offsets(host: Host, address: str) -> Offsets:
    lines = host.check_output(f"kafka-get-offsets --bootstrap-server {address}:9092 --topic {TOPIC}").splitlines()
    ends = {int(line.split(":")[1]): int(line.split(":")[2]) for line in lines}
    return {(partition, offset) for partition, end in ends.items() for offset in range(end)}


class Lake:
    """A copy of the lake's tables."""

    def __init__(self, host: Host, folder: Path) -> None:
        copied = host.run(f"tar -C {LAKE} --exclude=_checkpoints --warning=no-file-changed -cf - . || [ $? = 1 ]")
        assert copied.rc == 0, copied.stderr
        with tarfile.open(fileobj=io.BytesIO(copied.stdout_bytes)) as archive:
            archive.extractall(folder, filter="data")
        self.folder = folder

    def query(self, table: str, columns: str) -> list[tuple[Any, ...]]:
        files = DeltaTable(self.folder / table).file_uris()
        return duckdb.execute(f"SELECT {columns} FROM read_parquet({files})").fetchall() if files else []

    def offsets(self, table: str) -> list[tuple[int, int]]:
        return [(row[0], row[1]) for row in self.query(table, '"partition", "offset"')]


@pytest.fixture(scope="module")
def lake(host: Host, address: str, produced: None, tmp_path_factory: Any, wait_until: Callable[..., Any]) -> Lake:
    """The lake once the streams have caught up with the closed topic."""
    expected = len(topic_offsets(host, address))

    def caught_up() -> Lake | None:
        copy = Lake(host, tmp_path_factory.mktemp("lake"))
        done = len(copy.offsets("silver/events")) + len(copy.offsets("silver/rejects"))
        counts = (len(copy.offsets("bronze/clickstream")), done)
        assert counts == (expected, expected), f"bronze and silver hold {counts} of {expected} records"
        return copy

    copy: Lake = wait_until(caught_up, 120)
    return copy


@pytest.mark.parametrize(("service", "watchdog"), [("ecom-producer", "1min"), ("ecom-streams", "3min")])
def test_systemd_watches_over_it(host: Host, wait_until: Callable[..., Any], service: str, watchdog: str) -> None:
    # It waits longer while the hours' query starts.
    wait_until(lambda: host.check_output("systemctl show --property WatchdogUSec --value %s", service) == watchdog, 90)


def test_the_producer_stopped_in_order(host: Host, produced: None) -> None:
    said = host.check_output("systemctl show --property Result,ExecMainStatus ecom-producer").split()
    assert set(said) == {"Result=success", "ExecMainStatus=0"}


def test_every_record_is_in_bronze_once(host: Host, address: str, lake: Lake) -> None:
    found = lake.offsets("bronze/clickstream")
    assert len(found) == len(set(found))
    assert set(found) == topic_offsets(host, address)


def test_every_record_is_an_event_or_a_reject_and_never_both(host: Host, address: str, lake: Lake) -> None:
    events, rejects = lake.offsets("silver/events"), lake.offsets("silver/rejects")
    assert events
    assert len(events) + len(rejects) == len(set(events) | set(rejects))
    assert set(events) | set(rejects) == topic_offsets(host, address)


def test_bad_records_are_kept_as_they_came_with_their_reasons(lake: Lake) -> None:
    rejects = lake.query("silver/rejects", "value, disposition, codes")
    values = {bytes(value): (disposition, codes) for value, disposition, codes in rejects}
    assert set(BAD_RECORDS) <= set(values)
    for record in BAD_RECORDS:
        disposition, codes = values[record]
        assert disposition == "invalid" and codes, record


def test_a_prometheus_finds_what_was_read_and_refused(host: Host, address: str, lake: Lake) -> None:
    with urllib.request.urlopen(f"http://{address}:9108/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
    total = len(topic_offsets(host, address))
    # One process since the start, which no test before this one restarted.
    assert values['clickstream_rows_read_total{query="bronze"}'] == total
    assert values['clickstream_rows_written_total{table="silver.rejects"}'] == len(lake.offsets("silver/rejects"))
    assert values['clickstream_rejects_total{code="not_json_object"}'] >= 1
    assert values['clickstream_offsets_behind_latest{query="silver"}'] == 0
    assert values['clickstream_batch_seconds_count{query="gold"}'] > 0


def test_the_mart_holds_what_bronze_says(host: Host, lake: Lake, wait_until: Callable[..., Any]) -> None:
    # Counted from Bronze's bytes, by another engine than the one that filled the mart.
    bad = {bytes(value) for (value,) in lake.query("silver/rejects", "value")}
    good = [bytes(value).decode() for (value,) in lake.query("bronze/clickstream", "value") if bytes(value) not in bad]
    connection = duckdb.connect()
    connection.execute("CREATE TABLE event (body JSON)")
    connection.executemany("INSERT INTO event VALUES (?)", [(text,) for text in good])
    kinds = dict(connection.sql("SELECT body->>'event_type', count(*) FROM event GROUP BY 1").fetchall())
    expected = "|".join(str(kinds.get(kind, 0)) for kind in ("view", "add_to_cart", "purchase"))

    def same() -> bool:
        found = host.check_output(
            "cd / && runuser -u postgres -- psql -X -At -d analytics -c %s",
            "SELECT sum(views), sum(carts), sum(purchases) FROM gold.product_funnel_1m",
        )
        assert found == expected, f"the mart has {found}, Bronze {expected} views, carts and purchases"
        return True

    wait_until(same, 60)


def test_the_streams_stop_in_order_and_go_on_where_they_were(
    host: Host, address: str, lake: Lake, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    host.check_output("systemctl stop ecom-streams")
    said = host.check_output("systemctl show --property Result,ExecMainStatus ecom-streams").split()
    assert set(said) == {"Result=success", "ExecMainStatus=0"}
    host.check_output("ecom-producer --duration 2 --rate 5")
    host.check_output("systemctl start ecom-streams")

    def complete() -> bool:
        copy = Lake(host, tmp_path / str(time.monotonic_ns()))
        found = copy.offsets("bronze/clickstream")
        assert len(found) == len(set(found))
        assert set(found) == topic_offsets(host, address), "Bronze is behind"
        assert set(copy.offsets("silver/events") + copy.offsets("silver/rejects")) == set(found), "Silver is behind"
        return True

    wait_until(complete, 150)


def test_compaction_by_hand_changes_no_row(host: Host, tmp_path: Path, lake: Lake) -> None:
    before = set(Lake(host, tmp_path / "before").offsets("silver/events"))
    # As root, who must not leave files behind that the streams cannot read.
    said = host.check_output("cd /tmp && sudo clickstream compact --vacuum --json 2>/dev/null")
    assert "silver.events" in said
    assert host.check_output("find /var/lib/lake -mindepth 1 -user root") == ""
    assert set(Lake(host, tmp_path / "after").offsets("silver/events")) == before


def test_an_edit_restarts_the_service_it_concerns(
    host: Host, tmp_path: Path, deploy: Callable[..., None], processes: Callable[..., Any]
) -> None:
    host.check_output("nodectl restart ecom-producer")
    before = processes()
    dags = tmp_path / "dags"
    shutil.copytree(Path(__file__).parents[3] / "dags", dags, ignore=shutil.ignore_patterns("__pycache__"))
    (dags / "molecule.py").write_text("# an edit\n")
    deploy("pipeline", pipeline_dags_dir=str(dags), pipeline_trigger_bronze="11 seconds")
    assert host.file("/opt/pipeline/dags/current/molecule.py").exists
    after = processes()
    assert {name for name in before if before[name] != after[name]} == {"ecom-streams"}


def test_a_service_that_is_no_longer_wanted_is_gone(
    host: Host, deploy: Callable[..., None], processes: Callable[..., Any]
) -> None:
    before = processes()
    del before["ecom-producer"]
    deploy("pipeline", pipeline_producer_enabled=False, pipeline_trigger_bronze="11 seconds")
    assert processes() == before
    state = host.check_output("systemctl show --property ActiveState,LoadState ecom-producer").split()
    assert set(state) == {"ActiveState=inactive", "LoadState=not-found"}
