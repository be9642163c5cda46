"""The platform as a test sees it: its verbs from outside, its tables without Spark."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import oracle
import psycopg
from deltalake import DeltaTable, QueryBuilder
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = Path(__file__).parent / "inventory"
HOST = "ecom"
ADDRESS = "192.168.56.120"
TOPIC = "ecom_clickstream_raw"
SSH = [
    "ssh",
    *("-i", os.path.expanduser("~/.vagrant.d/insecure_private_key")),
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
    *("-o", "ConnectTimeout=10"),
    f"vagrant@{ADDRESS}",
]

T = TypeVar("T")
Offset = tuple[int, int]


def wait_until(condition: Callable[[], T | None], timeout: float, what: str) -> T:
    """Poll a condition until it gives something true; its value. A failure says what was waited for."""
    deadline = time.monotonic() + timeout
    problem: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            problem = value
        except Exception as error:  # the service asked may be the one that is being restarted
            problem = f"{type(error).__name__}: {error}"
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:.0f} s; last: {problem}")
        time.sleep(0.5)


def event(**changes: Any) -> dict[str, Any]:
    """A valid event, with changes; a change to None removes the field."""
    valid = {
        "event_id": f"evt_{time.time_ns():020d}",
        "user_id": "user_0042",
        "product_id": "prod_0042",
        "event_type": "view",
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "session_id": "session_5678",
        "product_category": "Electronics",
        "device_type": "mobile",
        "page_url": "/product/prod_0042",
        "price": 299.99,
    }
    return {name: value for name, value in (valid | changes).items() if value is not None}


def encoded(**changes: Any) -> bytes:
    """A valid event, with changes, as the producer would send it."""
    return json.dumps(event(**changes)).encode()


@dataclass
class Lake:
    """A copy of the lake's tables at a moment without writers, opened with delta-rs."""

    path: Path
    # By rule set: to judge takes a while, and a copy stays what it is.
    _verdicts: dict[int, dict[Offset, oracle.Verdict]] = field(default_factory=dict)

    def query(self, sql: str, **tables: str) -> list[tuple[Any, ...]]:
        """Ask DuckDB; the keywords name tables of the lake, which delta-rs reads."""
        database = duckdb.connect()
        for name, path in tables.items():
            table = DeltaTable(str(self.path / path))
            database.register(name, QueryBuilder().register("t", table).execute("SELECT * FROM t").read_all())
        return database.execute(sql).fetchall()

    def verdicts(self, ruleset: int = 1) -> dict[Offset, oracle.Verdict]:
        """Where each record belongs, by the oracle from Bronze's bytes. The tests' data are as it assumes: what comes
        again has the key and the time of the first."""
        if ruleset not in self._verdicts:
            rows = self.query(
                'SELECT partition, "offset", value, epoch_us("timestamp"), epoch_us(ingested_at) FROM t',
                t="bronze/clickstream",
            )
            self._verdicts[ruleset] = oracle.verdicts((oracle.Record(*row) for row in rows), ruleset)
        return self._verdicts[ruleset]

    def kept(self, ruleset: int = 1) -> set[Offset]:
        """The offsets that have to be in silver.events when all is accounted for."""
        return {offset for offset, verdict in self.verdicts(ruleset).items() if verdict.place == "event"}

    def recount(self, *names: str, ruleset: int = 1) -> dict[str, set[tuple[Any, ...]]]:
        """The rows of these Gold tables, counted from Bronze's bytes alone."""
        database = duckdb.connect()
        oracle.load(database, oracle.events(self.verdicts(ruleset)))
        return {name: set(oracle.gold(database, name)) for name in names}

    def version(self, path: str) -> int:
        """The present version of a table."""
        return DeltaTable(str(self.path / path)).version()

    def history(self, path: str, since: int) -> list[dict[str, Any]]:
        """The commits of a table after a version."""
        return [entry for entry in DeltaTable(str(self.path / path)).history() if entry["version"] > since]

    def offsets(self, path: str) -> list[Offset]:
        """(partition, offset) of every row, in no order, repeated where a row is."""
        return self.query('SELECT partition, "offset" FROM t', t=path)


@dataclass
class Platform:
    """One guest with everything on it, driven as a user would."""

    scratch: Path
    up_output: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    # Lines for the end of the run: measured, not asserted.
    figures: list[str] = field(default_factory=list)
    # Offsets of the records that the tests themselves made wrong.
    known_bad: dict[Offset, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What points `make` and Vagrant at the tests' own guest."""
        return os.environ | {
            "CLICKSTREAM_INVENTORY": str(INVENTORY),
            "VAGRANT_DOTFILE_PATH": str(ROOT / ".vagrant/e2e"),
        }

    def make(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a verb; what it printed is shown as it comes and kept."""
        began = time.monotonic()
        process = subprocess.Popen(
            ["make", *words],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
        self.note("make " + " ".join(words), began)
        output = "".join(lines)
        if check and code:
            raise AssertionError(f"make {' '.join(words)} ended with {code}:\n{output[-6000:]}\n{self.journals()}")
        return subprocess.CompletedProcess(words, code, output, "")

    def note(self, verb: str, began: float) -> None:
        """Keep the time of a verb; a repeated one gets a number."""
        times = sum(name == verb or name.startswith(f"{verb} (") for name in self.phases)
        self.phases[f"{verb} ({times + 1})" if times else verb] = time.monotonic() - began

    def vagrant(self, *words: str) -> None:
        """Run a Vagrant verb on the tests' guest."""
        began = time.monotonic()
        subprocess.run(["vagrant", *words], cwd=ROOT, env=self.environment, check=True, stdin=subprocess.DEVNULL)
        self.note("vagrant " + " ".join(words), began)

    def run(self, command: str, check: bool = True, timeout: float = 300) -> str:
        """Run a shell command in the guest."""
        done = subprocess.run(
            [*SSH, command], capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            output = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            raise AssertionError(f"{command!r} ended with {done.returncode}:\n{output}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        """`nodectl status` of the guest."""
        return dict(json.loads(self.run("sudo nodectl status --json --sample 0.2", check=False)))

    def services(self) -> list[dict[str, Any]]:
        """The registered services."""
        return list(json.loads(self.run("sudo nodectl list --json"))["services"])

    def main_pids(self) -> dict[str, int]:
        """The main process of each service's unit."""
        units = [service["unit"] for service in self.services()]
        lines = self.run(f"systemctl show --property Id,MainPID {' '.join(units)}")
        blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in lines.strip().split("\n\n")]
        return {block["Id"]: int(block["MainPID"]) for block in blocks}

    def journals(self) -> str:
        """The newest lines of every unhealthy service's journal, for a failure's report."""
        try:
            report = self.status()
        except Exception as error:
            return f"(the guest does not answer: {error})"
        text = []
        for service in report["services"]:
            if not service["healthy"]:
                text.append(f"--- {service['name']}: {service['detail']}")
                text.append(self.run(f"sudo nodectl logs {service['name']} -n 80", check=False))
        return "\n".join(text) or "(all services are healthy)"

    def healthy(self, timeout: float = 420) -> None:
        """Wait until every service is healthy."""

        def all_healthy() -> bool:
            report = self.status()
            bad = [f"{row['name']}: {row['detail']}" for row in report["services"] if not row["healthy"]]
            assert not bad, "; ".join(bad)
            return True

        wait_until(all_healthy, timeout, "all services healthy")

    # --- Kafka -----------------------------------------------------------------------------------

    def consumer(self) -> tuple[KafkaConsumer, list[TopicPartition]]:
        """A consumer outside every group, and the topic's partitions."""
        consumer = KafkaConsumer(bootstrap_servers=f"{ADDRESS}:9092", max_partition_fetch_bytes=8 << 20)
        partitions = [TopicPartition(TOPIC, p) for p in sorted(consumer.partitions_for_topic(TOPIC))]
        consumer.assign(partitions)
        return consumer, partitions

    def end_offsets(self) -> dict[int, int]:
        """The end of each partition."""
        consumer, partitions = self.consumer()
        ends = {p.partition: end for p, end in consumer.end_offsets(partitions).items()}
        consumer.close()
        return ends

    def records(self, start: dict[int, int] | None = None) -> dict[Offset, Any]:
        """Every record of the topic, from the start or from given offsets, up to the present end."""
        consumer, partitions = self.consumer()
        ends = consumer.end_offsets(partitions)
        for partition in partitions:
            consumer.seek(partition, (start or {}).get(partition.partition, 0))
        found: dict[Offset, Any] = {}
        deadline = time.monotonic() + 120
        while any(consumer.position(p) < ends[p] for p in partitions):
            assert time.monotonic() < deadline, "the topic could not be read to its end"
            for partition, records in consumer.poll(timeout_ms=1000).items():
                found |= {(r.partition, r.offset): r for r in records if r.offset < ends[partition]}
        consumer.close()
        return found

    def send(self, values: list[tuple[str, bytes | None, bytes | None]]) -> dict[Offset, str]:
        """Produce (name, key, value) records as they are; their offsets with the names."""
        producer = KafkaProducer(bootstrap_servers=f"{ADDRESS}:9092", acks="all", max_request_size=2 << 20)
        sent = {name: producer.send(TOPIC, key=key, value=value).get(timeout=30) for name, key, value in values}
        producer.close()
        return {(meta.partition, meta.offset): name for name, meta in sent.items()}

    # --- Tables ----------------------------------------------------------------------------------

    def mart(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the marts."""
        password = (INVENTORY / "secrets/postgres_analytics").read_text().strip()
        with psycopg.connect(host=ADDRESS, dbname="analytics", user="analytics", password=password) as connection:
            return connection.execute(query).fetchall()

    def served(self, name: str, where: str = "true") -> set[tuple[Any, ...]]:
        """The rows of a mart as `Lake.recount` has them: figures only, times in UTC without a zone."""
        listed = self.mart(
            f"SELECT column_name FROM information_schema.columns WHERE table_schema || '.' || table_name = '{name}' "
            "AND column_name NOT IN ('is_final', 'updated_at') ORDER BY ordinal_position"
        )
        rows = self.mart(f"SELECT {', '.join(column for (column,) in listed)} FROM {name} WHERE {where}")
        return {
            tuple(v.astimezone(UTC).replace(tzinfo=None) if isinstance(v, datetime) else v for v in row) for row in rows
        }

    def quiesce(self, patience: float = 180) -> None:
        """Stop the shop and wait until all that was sent has reached Gold, by the streams' positions, then the mart."""
        self.run("sudo systemctl stop ecom-producer")
        self.wait_for_streams(patience)
        events = len(self.lake().offsets("silver/events"))

        def counted() -> bool:
            (found,) = self.mart("SELECT sum(views + carts + purchases) FROM gold.product_funnel_1m")[0]
            assert (found or 0) >= events, f"the mart counts {found} of {events} events"
            return True

        wait_until(counted, patience, "everything sent has reached Gold")

    def wait_for_streams(self, patience: float = 120) -> None:
        """Wait until Bronze and Silver have committed all that is in the topic, by the positions they publish."""

        def committed() -> bool:
            ends = self.end_offsets()
            for group in ("ecom-bronze", "ecom-silver"):
                consumer = KafkaConsumer(bootstrap_servers=f"{ADDRESS}:9092", group_id=group, enable_auto_commit=False)
                found = {p: consumer.committed(TopicPartition(TOPIC, p)) for p in ends}
                consumer.close()
                assert found == ends, f"{group} is at {found} of {ends}"
            return True

        wait_until(committed, patience, "Bronze and Silver committed everything sent")

    def account(self) -> dict[str, Any]:
        """`clickstream account` in the guest."""
        report = dict(json.loads(self.run("sudo -u pipeline clickstream account --json", timeout=900)))
        assert report["unexplained"] == []
        for row in report["ledger"]:
            kinds = ("events", "invalid", "duplicates", "conflicting")
            assert row["end_offset"] - row["start_offset"] == row["bronze"] == sum(row[kind] for kind in kinds), row
        return report

    def assert_told_apart(self, truth: list[dict[str, Any]], since: dict[int, int]) -> dict[str, str]:
        """What became of each record that the producer's truth names, and of all others from these offsets on.

        Returns, by what Silver had to make of them, how many of the records were found so (recall), and how many of
        those found so had to be (precision).
        """
        lake = self.lake()
        became = dict.fromkeys(lake.offsets("silver/events"), ("event", ""))
        for partition, offset, disposition, codes in lake.query(
            'SELECT partition, "offset", disposition, codes FROM t', t="silver/rejects"
        ):
            became[partition, offset] = (disposition, codes)
        repeated = {entry["event_id"] for entry in truth if entry["kind"] in ("duplicate", "conflicting")}
        pairs: dict[str, list[tuple[str, str]]] = {}
        answers: list[tuple[str, str]] = []
        for entry in truth:
            offset = (entry["partition"], entry["offset"])
            found, codes = became[offset]
            expect = {"late": "event"}.get(entry["expect"], entry["expect"])
            if found != "event":
                self.known_bad[offset] = entry["kind"]
            if entry["event_id"] in repeated and expect != "invalid":
                # Silver keeps one of the two; which one is its own business.
                pairs.setdefault(entry["event_id"], []).append((expect, found))
                continue
            answers.append((expect, found))
            assert entry["code"] is None or entry["code"] in codes, (entry, codes)
        for both in pairs.values():
            answers += zip(sorted(expect for expect, _ in both), sorted(found for _, found in both), strict=True)
        answers += [
            ("event", found)
            for offset, (found, _) in became.items()
            if offset[1] >= since[offset[0]] and found != "event" and offset not in self.known_bad
        ]
        right, wanted, given = (
            Counter(expect for expect, found in answers if expect == found),
            Counter(expect for expect, _ in answers),
            Counter(found for _, found in answers),
        )
        figures = {
            kind: f"recall {right[kind]}/{wanted[kind]}, precision {right[kind]}/{given[kind]}"
            for kind in sorted(wanted)
        }
        assert right == wanted == given, figures
        return figures

    def resume(self) -> None:
        """Start the shop again."""
        self.run("sudo systemctl start ecom-producer")

    def produce(self, unit: str, options: str) -> None:
        """Start a run of the producer in the guest, beside the shop, as a unit that a shutdown stops before Kafka."""
        self.run(
            f"sudo systemctl reset-failed {unit} 2>/dev/null; sudo systemd-run --unit {unit} --quiet"
            " --property After=kafka.service --property EnvironmentFile=/etc/clickstream/clickstream.env"
            f" ecom-producer --client confluent --quiet {options}"
        )

    def wait_for_producer(self, unit: str, patience: float) -> None:
        """Until such a run is over; it has to end well."""

        def over() -> bool:
            state = self.run(f"systemctl is-active {unit}", check=False).strip()
            assert state != "failed", self.run(f"sudo journalctl -u {unit} -n 30 --no-pager", check=False)
            return state == "inactive"

        wait_until(over, patience, f"{unit} ends")

    def lake(self) -> Lake:
        """Copy the lake out of the guest."""
        target = self.scratch / "lake"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        # A job may be committing: the logs are packed before the data they name, which stays until VACUUM, and
        # without the hint that may name a checkpoint newer than the copy.
        pack = "tar -c --exclude=_checkpoints --exclude=*.crc --ignore-failed-read --warning=no-file-changed -f -"
        script = (
            "cd /var/lib/lake && "
            f"{{ {pack} --exclude=_last_checkpoint $(find . -name _delta_log -type d) || [ $? = 1 ]; }} && "
            f"{{ {pack} --exclude=_delta_log . || [ $? = 1 ]; }}"
        )
        packed = subprocess.Popen([*SSH, f"sudo sh -c {shlex.quote(script)}"], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", target, "--ignore-zeros", "-f", "-"], stdin=packed.stdout, check=True)
        assert packed.wait() == 0, "the lake could not be copied"
        return Lake(target)

    def assert_conserved(self) -> None:
        """Every offset of the topic is once in Bronze, byte for byte, and once in Silver; Gold equals a recount."""
        self.quiesce()
        records = self.records()
        lake = self.lake()
        expected = set(records)
        for partition, end in self.end_offsets().items():
            offsets = {o for p, o in expected if p == partition}
            assert offsets == set(range(end)), f"the topic has a gap in partition {partition}"

        bronze = lake.query('SELECT partition, "offset", key, value FROM t', t="bronze/clickstream")
        assert len(bronze) == len(expected), f"Bronze has {len(bronze)} rows for {len(expected)} offsets"
        differing = [
            (partition, offset)
            for partition, offset, key, value in bronze
            if (record := records.get((partition, offset))) is None or (key, value) != (record.key, record.value)
        ]
        assert not differing, f"Bronze differs from Kafka at {differing[:10]}"

        events, rejects = lake.offsets("silver/events"), lake.offsets("silver/rejects")
        assert len(events) == len(set(events)), "an offset is twice in silver.events"
        assert len(rejects) == len(set(rejects)), "an offset is twice in silver.rejects"
        assert not set(events) & set(rejects), f"both event and reject: {sorted(set(events) & set(rejects))[:10]}"
        missing = expected - set(events) - set(rejects)
        assert not missing, f"{len(missing)} offsets are neither event nor reject: {sorted(missing)[:10]}"
        assert set(events) | set(rejects) == expected
        assert set(rejects) == set(self.known_bad), (
            f"rejected without being made wrong: {sorted(set(rejects) - set(self.known_bad))[:10]}; "
            f"made wrong and not rejected: {[self.known_bad[o] for o in sorted(set(self.known_bad) - set(rejects))]}"
        )
        kept = lake.kept()
        assert set(events) == kept, (
            f"events that the oracle refuses: {sorted(set(events) - kept)[:10]}; "
            f"not events, but to the oracle: {sorted(kept - set(events))[:10]}"
        )
        self.assert_gold_equals_a_recount(lake)

    def assert_gold_equals_a_recount(self, lake: Lake) -> None:
        """The mart, and the final windows in Delta, equal a recount from Bronze's bytes."""
        name = "gold.product_funnel_1m"
        recount = lake.recount(name)[name]
        mart = self.served(name)
        assert mart == recount, (
            f"the mart differs from a recount: only in the mart {sorted(mart - recount)[:5]}, "
            f"only in the recount {sorted(recount - mart)[:5]}"
        )
        final = set(
            lake.query(
                """SELECT * EXCLUDE (event_date) REPLACE (
                       window_start AT TIME ZONE 'UTC' AS window_start, window_end AT TIME ZONE 'UTC' AS window_end,
                       last_event_at AT TIME ZONE 'UTC' AS last_event_at) FROM gold""",
                gold="gold/product_funnel_1m",
            )
        )
        assert final <= recount, f"Delta Gold differs from a recount: {sorted(final - recount)[:5]}"
        declared = self.served(name, "is_final")
        assert final == declared, "the mart's final windows are not those of Delta Gold"
