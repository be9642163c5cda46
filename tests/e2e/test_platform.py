"""From nothing to Gold, and then everything that a platform has to survive. The tests run in this order."""

from __future__ import annotations

import json
import re
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from airflow_under_test import Airflow
from platform_under_test import ADDRESS, TOPIC, Platform, encoded, wait_until

GIB = 2**30


def bad_records() -> dict[str, tuple[bytes | None, str]]:
    """Twenty ways to be wrong: the value, and a code that silver.rejects has to name."""
    later = (datetime.now(UTC) + timedelta(hours=2)).isoformat(timespec="milliseconds")
    return {
        "not JSON": (b"hello, shop", "not_json_object"),
        "cut short": (encoded()[:-20], "not_json_object"),
        "truncated UTF-8": (encoded()[:-1] + "é".encode()[:1], "not_utf8"),
        "a JSON array": (b"[1, 2, 3]", "not_json_object"),
        "a JSON number": (b"42", "not_json_object"),
        "two objects": (encoded() + encoded(), "not_json_object"),
        "empty value": (b"", "empty_value"),
        "white space": (b" \t\r\n", "empty_value"),
        "tombstone": (None, "tombstone"),
        "price is a text": (encoded(price="299.99"), "price_not_number"),
        "price is an object": (encoded(price={"amount": 1}), "price_not_number"),
        "negative price": (encoded(price=-1), "price_not_positive"),
        "no keys": (b"{}", "event_id_missing"),
        "no price": (encoded(price=None), "price_missing"),
        "unknown event type": (encoded(event_type="teleport"), "event_type_unknown"),
        "unknown device": (encoded(device_type="fridge"), "device_unknown"),
        "page of another product": (encoded(page_url="/product/prod_0001"), "page_url_mismatch"),
        "future timestamp": (encoded(timestamp=later), "timestamp_future"),
        "ancient timestamp": (encoded(timestamp="1999-12-31T23:59:59.000Z"), "timestamp_too_old"),
        "900 KB": (b"x" * 900_000, "not_json_object"),
    }


def test_up_ends_with_gold_and_says_where_everything_is(platform: Platform) -> None:
    said = platform.up_output
    (rows,) = platform.mart("SELECT count(*) FROM gold.product_funnel_1m")[0]
    assert rows > 0
    assert f"http://{ADDRESS}:8087" in said and f"http://{ADDRESS}:8080" in said
    assert "admin / admin" in said
    assert "Three things to try next" in said
    assert "all services are healthy" in said


def test_the_forwarded_ports_answer(platform: Platform) -> None:
    with urllib.request.urlopen("http://127.0.0.1:18087/api/v2/monitor/health", timeout=30) as answer:
        assert json.load(answer)["scheduler"]["status"] == "healthy"
    with urllib.request.urlopen("http://127.0.0.1:18080/json/", timeout=30) as answer:
        assert json.load(answer)["status"] == "ALIVE"


def test_the_users_verbs(platform: Platform) -> None:
    assert f"Topic: {TOPIC}" in platform.make("topics").stdout
    lag = platform.make("lag").stdout
    assert "ecom-bronze" in lag and "ecom-silver" in lag
    assert "zookeeper" in platform.make("logs", "SERVICE=zookeeper").stdout
    assert "prod_0042" in platform.make("gold").stdout
    wrong = platform.make("logs", "SERVICE=kafak", check=False)
    assert wrong.returncode != 0 and "SERVICE is one of" in wrong.stdout and "kafka" in wrong.stdout
    pid = platform.main_pids()["spark-history.service"]
    platform.make("restart", "SERVICE=spark-history")
    assert platform.main_pids()["spark-history.service"] != pid


def test_three_hundred_events_on_a_quiet_topic(platform: Platform) -> None:
    platform.quiesce()
    before = platform.end_offsets()
    said = platform.make("produce", "ARGS=--rate 50 --duration 6").stdout
    after = platform.end_offsets()
    assert sum(after.values()) - sum(before.values()) == 300
    line = r"^Sent: \S+ +\| User: user_\d{4} +\| Product: prod_\d{4} +\| Partition: \d \| Offset: \d+$"
    assert re.search(line, said, re.MULTILINE)
    assert "Producer closed. Total events sent: 300" in said
    new = platform.records(before)
    assert len(new) == 300
    partitions: dict[bytes, set[int]] = {}
    for (partition, _), record in new.items():
        body = json.loads(record.value)
        assert record.key.decode() == body["user_id"]
        partitions.setdefault(record.key, set()).add(partition)
    assert all(len(found) == 1 for found in partitions.values()), "one user's events are in two partitions"
    platform.assert_conserved()
    platform.resume()


def test_a_second_up_changes_nothing(platform: Platform) -> None:
    """On the settled platform: while the streams of a fresh guest warm up, they compete with it for the processor."""
    before = platform.main_pids()
    first = platform.phases["make up"]
    said = platform.make("up").stdout
    recaps = re.findall(r"changed=(\d+)", said)
    assert recaps and set(recaps) == {"0"}
    assert platform.main_pids() == before
    second = platform.phases["make up (2)"]
    platform.figures.append(f"make up: first run {first:.0f} s, second {second:.0f} s: {second / first:.0%}")


def test_bad_input_is_kept_with_its_reasons(platform: Platform) -> None:
    bad = bad_records()
    pids = platform.main_pids()
    sent = platform.send([(name, b"user_0042", value) for name, (value, _) in bad.items()])
    whole_second = encoded(timestamp=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    good = platform.send([("no milliseconds", b"user_0042", whole_second)])
    platform.known_bad |= sent
    platform.assert_conserved()
    lake = platform.lake()
    rejects = lake.query('SELECT partition, "offset", codes FROM t', t="silver/rejects")
    codes = {(partition, offset): found for partition, offset, found in rejects}
    wrong = {name: codes[offset] for offset, name in sent.items() if bad[name][1] not in codes[offset]}
    assert not wrong, f"rejected for another reason than expected: {wrong}"
    assert set(good) <= set(lake.offsets("silver/events"))
    streams = "ecom-streams.service"
    assert platform.main_pids()[streams] == pids[streams], "a bad record restarted the streams"
    platform.resume()


def test_every_wrong_record_is_told_from_every_right_one(platform: Platform) -> None:
    """Faults of every kind among the shop's events: what became of each offset, against the producer's truth."""
    began = platform.end_offsets()
    # Late by more than an hour: into an hour that is closed, for the batch layer.
    faults = "--rate 100 --duration 12 --faults all=0.25 --late-by 4000 --truth /tmp/truth.jsonl"
    platform.run(f"rm -f /tmp/truth.jsonl; ecom-producer --client confluent --quiet {faults}")
    truth = [json.loads(line) for line in platform.run("cat /tmp/truth.jsonl").splitlines()]
    assert len(truth) == 1200
    platform.run("sudo systemctl stop ecom-producer")
    platform.wait_for_streams()
    report = platform.account()
    assert {row["partition"]: row["end_offset"] for row in report["ledger"]} == platform.end_offsets()
    measured = platform.assert_told_apart(truth, since=began)
    platform.figures.append(f"Silver against the truth of {len(truth)} records: {measured}")
    assert sum(row["late_added"] for row in report["ledger"]) > 0
    # Gold too: the windows of late events are counted again.
    platform.assert_conserved()
    platform.resume()


def test_the_batch_layer_agrees_with_the_streams(platform: Platform) -> None:
    """The late events that the accounting added are in the closed hours that the streams serve, and so are visits."""
    end = (datetime.now(UTC) - timedelta(minutes=5)).replace(minute=0, second=0, microsecond=0)
    closed = f"window_start < '{end.isoformat()}'"

    def hours_follow() -> bool:
        counted = "SELECT sum(views), sum(carts), sum(purchases), sum(revenue) FROM gold.product_funnel_{} WHERE {}"
        minutes, hours = (platform.mart(counted.format(length, closed)) for length in ("1m", "1h"))
        assert minutes == hours and minutes[0][0] is not None, f"minutes {minutes}, hours {hours}"
        assert platform.mart(f"SELECT count(*) FROM gold.product_funnel_1h WHERE {closed} AND NOT is_final") == [(0,)]
        return True

    wait_until(hours_follow, 180, "the closed hours have what their minutes have")
    span = f"--from {end - timedelta(hours=3):%Y-%m-%dT%HZ} --to {end:%Y-%m-%dT%HZ}"
    report = json.loads(platform.run(f"sudo clickstream recompute {span} --json 2>/dev/null"))
    lines = {(line["table"], line["place"]): line for line in report["lines"]}
    for (table, place), line in lines.items():
        if table != "gold.sessions":
            assert line["rows"] > 0 and not line["missing"] + line["surplus"] + line["differing"], (table, place, line)
    visits = lines["gold.sessions", "mart"]["rows"]
    assert visits > 0 and platform.mart("SELECT count(*) FROM gold.sessions") == [(visits,)]


def test_a_dag_runs_green_on_the_cluster(platform: Platform) -> None:
    airflow = Airflow(ADDRESS)
    began = platform.lake().version("bronze/clickstream")
    run = airflow.trigger("lake_maintenance")

    def gives_way() -> bool:
        executors = platform.run("ps -C java -o ni=,args= | awk '/CoarseGrainedExecutorBackend/ {print $1}'").split()
        assert sorted(executors) == ["0", "10"], f"niceness of the executors: {executors}"
        return True

    wait_until(gives_way, 240, "the job's executor runs and gives way to the streams'")
    airflow.green("lake_maintenance", run, timeout=420)
    airflow.pause()
    lake = platform.lake()
    done = [entry["operation"] for entry in lake.history("bronze/clickstream", since=began)]
    assert "OPTIMIZE" in done, f"the run compacted nothing; commits since its trigger: {done}"
    with urllib.request.urlopen(f"http://{ADDRESS}:18080/api/v1/applications", timeout=30) as answer:
        assert "clickstream-compact" in {application["name"] for application in json.load(answer)}


SERVICES = (
    "zookeeper",
    "kafka",
    "postgresql",
    "spark-master",
    "spark-worker",
    "spark-history",
    "airflow-api-server",
    "airflow-scheduler",
    "airflow-dag-processor",
    "airflow-triggerer",
    "ecom-producer",
    "ecom-streams",
)


def test_every_service_is_covered_by_the_kills(platform: Platform) -> None:
    assert {service["name"] for service in platform.services()} == set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back(platform: Platform, service: str) -> None:
    unit = next(entry["unit"] for entry in platform.services() if entry["name"] == service)
    pid = platform.main_pids()[unit]
    assert pid > 0
    platform.run(f"sudo kill -KILL {pid}")
    wait_until(lambda: platform.main_pids()[unit] not in (0, pid), 60, f"systemd starts {service} again")
    platform.run(f"sudo nodectl wait {service}", timeout=420)


def test_nothing_was_lost_by_the_kills(platform: Platform) -> None:
    platform.healthy()
    platform.assert_conserved()
    platform.resume()


def test_the_high_interest_product_is_found(platform: Platform) -> None:
    def episodes() -> list[dict[str, Any]]:
        return list(json.loads(platform.run("sudo clickstream alerts --json 2>/dev/null")))

    found = wait_until(episodes, 300, "an episode opens")
    assert [(episode["product_id"], episode["closed_at"]) for episode in found] == [("prod_0042", None)]
    mart = platform.mart("SELECT product_id, views, purchases, closed_at FROM gold.product_alerts")
    assert mart == [("prod_0042", found[0]["views"], found[0]["purchases"], None)]


def test_down_up_and_a_reload_leave_everything_as_it_was(platform: Platform) -> None:
    before = sum(platform.end_offsets().values())
    platform.make("down")
    said = platform.make("status", check=False)
    assert said.returncode != 0 and "make up" in said.stdout
    # No playbook is needed: what starts is what was there.
    platform.vagrant("up")
    # Amid its start.
    platform.vagrant("reload")
    platform.healthy(timeout=420)
    wait_until(lambda: sum(platform.end_offsets().values()) > before, 60, "the shop produces again")


def test_nothing_was_lost_by_the_stops(platform: Platform) -> None:
    platform.assert_conserved()
    platform.resume()


def test_memory(platform: Platform) -> None:
    """Speed and processor are printed, not asserted: they are the machine's as much as ours."""
    platform.healthy()
    platform.figures.append(platform.make("latency", "ARGS=--seconds 30", check=False).stdout)

    def no_job_runs() -> bool:
        # A bounded job, the hourly compaction, is not part of the settled platform.
        with urllib.request.urlopen(f"http://{ADDRESS}:8080/json/", timeout=30) as answer:
            active = [application["name"] for application in json.load(answer)["activeapps"]]
        assert active == ["ecom-streams"], f"applications on the cluster: {active}"
        return True

    wait_until(no_job_runs, 300, "only the streams run on the cluster")
    platform.figures.append(platform.make("status").stdout)
    report = platform.status()
    assert report["memory_bytes"] <= 5 * GIB, f"{report['memory_bytes'] / GIB:.2f} GiB resident"


def test_a_stopped_service_makes_status_fail(platform: Platform) -> None:
    platform.run("sudo systemctl stop spark-history")
    said = platform.make("status", check=False)
    assert said.returncode != 0
    assert "UNHEALTHY" in said.stdout and "make logs SERVICE=spark-history" in said.stdout
    platform.make("restart", "SERVICE=spark-history")
    assert platform.make("status").returncode == 0
