"""The batch layer as its users meet it: every DAG green, every failure told once, every daemon killed amid a run.

The tests run in this order, on the platform that test_platform.py has left."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import duckdb
import pytest
from airflow_under_test import BRIDGE, Airflow, Mailbox, Webhook
from deltalake import DeltaTable, write_deltalake
from platform_under_test import ADDRESS, ROOT, SSH, TOPIC, Lake, Platform, wait_until
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions as found
from selenium.webdriver.support.ui import WebDriverWait

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GIB = 2**30
# Of the webhook.
PATH = "hooks/T0C1I2C3K"
DAEMONS = ("airflow-api-server", "airflow-dag-processor", "airflow-triggerer", "airflow-scheduler")
DAGS = [
    "airflow_maintenance",
    "backfill",
    "business_alerts",
    "daily_report",
    "data_quality",
    "gold_recompute",
    "lake_maintenance",
    "product_alerts",
    "silver_account",
]
ARTIFACTS = ROOT / "artifacts"
NOT_YET = (
    NoSuchElementException,
    ElementNotInteractableException,
    ElementClickInterceptedException,
    StaleElementReferenceException,
)


@pytest.fixture(scope="module")
def airflow(platform: Platform) -> Iterator[Airflow]:
    """Airflow with all DAGs paused, so that only what a test starts is running."""
    api = Airflow(ADDRESS)
    wait_until(lambda: api.dags() == DAGS, 120, "the DAG processor has read all DAGs")
    api.pause()
    api.close()
    platform.resume()
    platform.healthy()
    yield api
    api.pause()
    rows = [f"{dag:<22}{kind:<18}{state:<10}{seconds:>7.1f} s" for dag, kind, state, seconds in api.history]
    platform.figures += ["DAG runs, by the API:", *rows]


@pytest.fixture
def run(airflow: Airflow) -> Iterator[Airflow]:
    """The same, paused again when the test ends, and without a run that the next test would wait behind."""
    yield airflow
    airflow.pause()
    airflow.close()


def outbox(platform: Platform, where: str) -> list[tuple[Any, ...]]:
    return platform.mart(f"SELECT alert_key, subject, message FROM alerts.outbox WHERE {where} ORDER BY raised_at")


def table_out(platform: Platform, name: str) -> Path:
    """A copy of one table of the lake, which no stream writes to."""
    target = platform.scratch / "table"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    packed = subprocess.Popen([*SSH, f"sudo tar -c -C /var/lib/lake/{name} ."], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", target, "-f", "-"], stdin=packed.stdout, check=True)
    assert packed.wait() == 0
    return target


def table_back(platform: Platform, name: str, since: float) -> None:
    """Bring what was written to the copy into the lake, the commit last."""
    copy = platform.scratch / "table"
    new = [path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and path.stat().st_mtime > since]
    for part in ([path for path in new if "_delta_log" not in path.parts], [p for p in new if "_delta_log" in p.parts]):
        if part:
            packed = subprocess.Popen(["tar", "-c", "-C", copy, *map(str, part)], stdout=subprocess.PIPE)
            unpack = (
                f"sudo -u pipeline sh -c {shlex.quote(f'umask 007; tar -x --no-same-owner -m -C /var/lib/lake/{name}')}"
            )
            subprocess.run([*SSH, unpack], stdin=packed.stdout, check=True)
            assert packed.wait() == 0


def ledger_row(platform: Platform, start: int, end: int, unexplained: int) -> None:
    """Write a row into the ledger that says this of partition 0."""
    began = time.time()
    table = DeltaTable(str(table_out(platform, "silver/ledger")))
    row: Any = duckdb.sql(
        f"SELECT now() AS accounted_at, '{TOPIC}' AS topic, 0::INT AS partition, {start}::BIGINT AS start_offset, "
        f"{end}::BIGINT AS end_offset, 0::BIGINT AS bronze, 0::BIGINT AS events, 0::BIGINT AS invalid, "
        f"0::BIGINT AS duplicates, 0::BIGINT AS conflicting, {unexplained}::BIGINT AS unexplained, "
        "current_date AS ledger_date"
    )
    write_deltalake(table, row, mode="append")
    table_back(platform, "silver/ledger", began - 1)


def accounted(platform: Platform, partition: int) -> int:
    """Up to where a partition is accounted for, by the ledger."""
    query = f"SELECT end_offset FROM t WHERE partition = {partition} ORDER BY accounted_at DESC LIMIT 1"
    return int(Lake(table_out(platform, "silver/ledger")).query(query, t=".")[0][0])


# --- Every DAG, green ------------------------------------------------------------------------------------------


def test_the_idle_daemons_fit(platform: Platform, airflow: Airflow) -> None:
    used = {row["name"]: row["memory_bytes"] for row in platform.status()["services"] if row["name"] in DAEMONS}
    platform.figures += [f"{name}: {size / 2**20:.0f} MiB idle" for name, size in used.items()]
    assert used.keys() == set(DAEMONS) and sum(used.values()) < 1.6 * GIB, used


def test_the_dags_are_read_without_an_error(airflow: Airflow) -> None:
    assert airflow.call("GET", "/api/v2/importErrors")["import_errors"] == []


def test_secrets_are_neither_in_the_database_nor_on_a_command_line(platform: Platform, airflow: Airflow) -> None:
    password = platform.run("sudo sed -n s/^password=//p /etc/clickstream/pg_service.conf").strip()
    assert len(password) >= 16
    dump = platform.run("sudo -u postgres pg_dump airflow", timeout=120)
    assert "CREATE TABLE public.connection" in dump and password not in dump
    assert airflow.call("GET", "/api/v2/connections")["connections"] == []
    assert password not in platform.run("ps -eo args")
    modes = platform.run("sudo stat -c '%a %U:%G' /etc/airflow/connections.json /etc/airflow/airflow.env")
    assert modes.splitlines() == ["640 root:airflow"] * 2


def test_every_dag_goes_green(platform: Platform, run: Airflow) -> None:
    """One after the other, so that none waits for a slot; gold_recompute by what silver_account publishes."""
    # Late ones, into an hour that is closed.
    platform.run("ecom-producer --client confluent --quiet --rate 100 --duration 3 --faults late=0.5 --late-by 4000")
    # Only while nothing comes do the streams reach the end of the topic.
    platform.run("sudo systemctl stop ecom-producer")
    platform.wait_for_streams(300)
    platform.resume()
    before = {entry["dag_run_id"] for entry in run.runs("gold_recompute")}
    run.call("PATCH", "/api/v2/dags/gold_recompute?update_mask=is_paused", {"is_paused": False})
    began = platform.lake().version("bronze/clickstream")
    since = platform.mart("SELECT now()::text")[0][0]
    today = f"{datetime.now(UTC):%Y-%m-%d}"

    def green(dag: str, **conf: Any) -> str:
        started = run.trigger(dag, **conf)
        run.green(dag, started)
        run.pause(dag)
        return started

    def followed() -> str | None:
        new = [entry for entry in run.runs("gold_recompute") if entry["dag_run_id"] not in before]
        return next((entry["dag_run_id"] for entry in new if entry["run_type"] == "asset_triggered"), None)

    green("silver_account")
    run.green("gold_recompute", wait_until(followed, 60, "the asset starts gold_recompute"))
    run.pause("gold_recompute")
    # Only what is accounted for is judged again.
    backfill = green("backfill")
    green("lake_maintenance", vacuum=True)
    green("data_quality")
    green("product_alerts")
    green("business_alerts")
    green("daily_report", date=today)
    green("airflow_maintenance")
    assert {dag for dag, *_ in run.history} >= set(DAGS)

    done = [entry["operation"] for entry in platform.lake().history("bronze/clickstream", since=began)]
    assert "OPTIMIZE" in done, f"lake_maintenance compacted nothing: {done}"
    failed = f"SELECT check_name, subject FROM quality.checks WHERE status = 'fail' AND checked_at > '{since}'"
    assert platform.mart(failed) == []
    assert platform.mart("SELECT count(DISTINCT check_name) > 3 FROM quality.checks") == [(True,)]
    report = platform.run(f"sudo cat /var/lib/pipeline/reports/{today}/report.html")
    assert "<html" in report and "prod_0042" in report
    assert "backfill --dry-run" in run.log("backfill", backfill, "backfill")
    lines = platform.run("sudo sh -c 'cat /var/lib/airflow/alerts/*.jsonl'", check=False).splitlines()
    assert {json.loads(line)["key"] for line in lines} == {key for key, _, _ in outbox(platform, "true")}


@pytest.mark.load
def test_gold_follows_an_hour_in_time(platform: Platform, run: Airflow) -> None:
    took = run.green("gold_recompute", run.trigger("gold_recompute", hours=1))["duration"]
    platform.figures.append(f"gold_recompute of one hour: {took:.0f} s")
    assert took <= 90


# --- Failures, on purpose --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dag", "conf", "said"),
    [
        (
            "backfill",
            {"from_": "2025-11-02T00:00:00Z", "to": "2025-11-01T00:00:00Z"},
            "is not before to 2025-11-01T00:00Z",
        ),
        ("backfill", {"ruleset": 77}, "77"),
        ("daily_report", {"date": "2999-01-01"}, "choose an earlier day"),
    ],
)
def test_a_wrong_request_is_told_at_once(run: Airflow, dag: str, conf: dict[str, Any], said: str) -> None:
    wrong = run.trigger(dag, **conf)
    assert run.end(dag, wrong)["state"] == "failed"
    (task,) = run.tasks(dag, wrong)
    assert run.tasks(dag, wrong)[task]["try_number"] == 1, "a wrong request was tried again"
    assert said in run.log(dag, wrong, task)


def test_an_unexplained_offset_stops_the_accounting(platform: Platform, run: Airflow) -> None:
    end = accounted(platform, 0)
    # There is no record before the first.
    ledger_row(platform, start=-1, end=end, unexplained=1)
    wrong = run.trigger("silver_account")
    assert run.end("silver_account", wrong)["state"] == "failed"
    ledger_row(platform, start=0, end=end, unexplained=0)
    said = f"unexplained: {TOPIC}/0 offset -1"
    assert said in run.log("silver_account", wrong, "account")
    told = outbox(platform, "kind = 'task_failed' AND subject LIKE 'silver_account%'")
    assert [message for _, _, message in told] == [said]


def test_the_gate_keeps_a_corrupted_gold_as_it_is(platform: Platform, run: Airflow) -> None:
    began = time.time()
    table = DeltaTable(str(table_out(platform, "gold/sessions")))
    changed = table.update(updates={"views": "views + 1000"}, predicate="views < 1000")
    assert changed["num_updated_rows"] > 1
    table_back(platform, "gold/sessions", began - 1)
    version = table.version()
    wrong = run.trigger("gold_recompute", max_differences=1)
    assert run.end("gold_recompute", wrong)["state"] == "failed"
    assert run.tasks("gold_recompute", wrong)["recompute"]["try_number"] == 1, "the gate was asked again"
    assert DeltaTable(str(table_out(platform, "gold/sessions"))).version() == version, "the gate let something through"
    ((_, _, message),) = outbox(platform, "kind = 'task_failed' AND subject LIKE 'gold_recompute%'")
    assert "--max-differences" in message
    platform.figures.append(f"the gate said: {message}")
    run.green("gold_recompute", run.trigger("gold_recompute"))
    left = Lake(table_out(platform, "gold/sessions")).query("SELECT count(*) FROM t WHERE views >= 1000", t=".")
    assert left == [(0,)], "what was corrupted was not repaired"


def test_a_stream_that_stands_is_caught_and_a_late_run_is_told(platform: Platform, run: Airflow) -> None:
    """The run waits for a slot first, until its deadline is over. Layers may be a minute old, for this test only."""
    platform.run("sudo systemctl stop ecom-streams")
    stopped = time.monotonic()
    environment = "/etc/clickstream/clickstream.env"
    platform.run(f"echo CLICKSTREAM_QUALITY_FRESHNESS_MINUTES=1 | sudo tee -a {environment} >/dev/null")
    try:
        platform.run("sudo systemctl restart airflow-scheduler")
        platform.run("sudo nodectl wait airflow-scheduler", timeout=180)
        run.slots("spark", 0)
        late = run.trigger("data_quality")
        run.reached("data_quality", late, "check", "scheduled")
        platform.run(
            f"sudo -u postgres psql airflow -qc \"UPDATE deadline SET deadline_time = now() - interval '1 minute' "
            f"WHERE dagrun_id = (SELECT id FROM dag_run WHERE run_id = '{late}')\""
        )
        told = wait_until(
            lambda: outbox(platform, f"alert_key LIKE 'run:data_quality:{late}:%'"), 90, "the missed deadline is told"
        )
        assert [subject for _, subject, _ in told] == ["data_quality is late"]
        time.sleep(max(0.0, 75 - (time.monotonic() - stopped)))  # nothing to ask: the layers have to grow old
        run.slots("spark", 1)
        assert run.end("data_quality", late)["state"] == "failed"
    finally:
        platform.run("sudo systemctl start ecom-streams")
        platform.run(f"sudo sed -i '$d' {environment}; sudo systemctl restart airflow-scheduler")
        run.slots("spark", 1)
    ((_, _, message),) = outbox(platform, "kind = 'task_failed' AND subject LIKE 'data_quality%'")
    assert "freshness" in message and "bronze" in message
    platform.figures.append(f"the stale stream: {message.splitlines()[0]}")
    failed = (
        "SELECT count(*) FROM quality.checks WHERE status = 'fail' AND check_name = 'freshness' AND subject = 'bronze'"
    )
    assert platform.mart(failed) == [(1,)]


def test_alerts_reach_every_sink_once_though_one_is_down(platform: Platform, run: Airflow) -> None:
    webhook, mailbox = Webhook(), Mailbox()
    # As new sinks, also where an earlier run of these tests had some.
    platform.run("sudo -u postgres psql analytics -qc \"DELETE FROM alerts.deliveries WHERE sink <> 'file'\"")
    connections = json.loads(platform.run("sudo cat /etc/airflow/connections.json"))
    added = {
        "alerts_webhook": {"conn_type": "http", "host": f"http://{BRIDGE}:{webhook.port}/{PATH}"},
        "alerts_smtp": {
            "conn_type": "smtp",
            "host": BRIDGE,
            "port": mailbox.port,
            "extra": {
                "from_email": "clickstream@example.com",
                "to_email": "team@example.com",
                "disable_ssl": True,
                "disable_tls": True,
            },
        },
    }
    try:
        write_connections(platform, connections | added)
        first = run.trigger("business_alerts")
        run.reached("business_alerts", first, "deliver", "up_for_retry")
        waiting = platform.mart("SELECT count(*), min(last_error) FROM alerts.deliveries WHERE delivered_at IS NULL")
        assert waiting[0][0] > 0 and "Connection refused" in waiting[0][1]
        for said in (waiting[0][1], run.log("business_alerts", first, "deliver")):
            assert PATH not in said, "the path of a webhook is its secret"
        assert mailbox.keys and not webhook.keys, "a sink that is down holds up another"
        webhook.up()
        run.green("business_alerts", first)
        run.green("business_alerts", run.trigger("business_alerts"))
    finally:
        write_connections(platform, connections)
        webhook.down()
        mailbox.close()
    keys = {key for key, _, _ in outbox(platform, "raised_at > now() - interval '1 day'")}
    lines = platform.run("sudo sh -c 'cat /var/lib/airflow/alerts/*.jsonl'").splitlines()
    received = {"webhook": webhook.keys, "mailbox": mailbox.keys, "file": Counter(json.loads(x)["key"] for x in lines)}
    platform.figures += [f"alerts received by the {sink}: {sum(got.values())}" for sink, got in received.items()]
    for sink, got in received.items():
        assert got == Counter(keys), f"the {sink} got {got}"
    kinds = {body["kind"] for body in webhook.bodies}
    assert {"task_failed", "dag_late", "quality", "episode_opened"} <= kinds, kinds
    assert all(body["link"].startswith("http") for body in webhook.bodies)


def write_connections(platform: Platform, connections: dict[str, Any]) -> None:
    text = shlex.quote(json.dumps(connections))
    platform.run(f"echo {text} | sudo tee /etc/airflow/connections.json >/dev/null")


# --- kill -9 in the middle of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("daemon", DAEMONS[:3])
def test_a_run_goes_on_when_a_daemon_is_killed(platform: Platform, run: Airflow, daemon: str) -> None:
    hit = run.trigger("airflow_maintenance")
    run.reached("airflow_maintenance", hit, "clean_database", "running")
    kill(platform, daemon)
    run.green("airflow_maintenance", hit)
    assert {task["try_number"] for task in run.tasks("airflow_maintenance", hit).values()} == {1}
    platform.healthy()


def test_a_run_is_made_again_when_the_scheduler_is_killed(platform: Platform, run: Airflow) -> None:
    """With it go the task and its Spark driver, which held a lock of the lake."""
    hit = run.trigger("silver_account")
    locks = "sudo sh -c 'ls /var/lib/lake/_locks'"
    wait_until(lambda: "account" in platform.run(locks).split(), 120, "the accounting is at work")
    kill(platform, "airflow-scheduler")
    run.green("silver_account", hit)
    platform.healthy()
    lake = platform.lake()
    offsets = lake.offsets("silver/events") + lake.offsets("silver/rejects")
    assert len(offsets) == len(set(offsets)), "the killed run and the next one both wrote a record"


def kill(platform: Platform, daemon: str) -> None:
    pid = platform.main_pids()[f"{daemon}.service"]
    platform.run(f"sudo kill -KILL {pid}")
    wait_until(lambda: platform.main_pids()[f"{daemon}.service"] not in (0, pid), 60, f"systemd starts {daemon} again")


# --- In a browser ----------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def test_a_person_starts_a_dag_on_the_page(run: Airflow, browser: webdriver.Chrome) -> None:
    dag = "airflow_maintenance"
    run.call("PATCH", f"/api/v2/dags/{dag}?update_mask=is_paused", {"is_paused": False})
    known = {entry["dag_run_id"] for entry in run.runs(dag)}
    # the page is redrawn while it loads: an element found a moment ago may be gone
    wait = WebDriverWait(browser, 60, ignored_exceptions=NOT_YET)

    def click(by: str, value: str) -> None:
        def clicked(page: webdriver.Chrome) -> bool:
            page.find_element(by, value).click()
            return True

        wait.until(clicked)

    browser.get(f"http://{ADDRESS}:8087/")
    wait.until(found.presence_of_element_located((By.NAME, "username"))).send_keys("admin")
    browser.find_element(By.NAME, "password").send_keys("admin")
    click(By.CSS_SELECTOR, "input[type=submit], button[type=submit]")
    browser.get(f"http://{ADDRESS}:8087/dags")
    for name in DAGS:
        wait.until(found.visibility_of_element_located((By.LINK_TEXT, name)))
    click(By.LINK_TEXT, dag)
    wait.until(found.url_contains(f"/dags/{dag}"))
    for button in ("trigger-dag-button", "trigger-dag-submit"):
        click(By.CSS_SELECTOR, f"[data-testid={button}]")
    new = wait_until(
        lambda: next((r["dag_run_id"] for r in run.runs(dag) if r["dag_run_id"] not in known), None), 60, "a run starts"
    )
    run.green(dag, new)
    browser.get(f"http://{ADDRESS}:8087/dags/{dag}/runs/{new}")
    wait.until(found.visibility_of_element_located((By.XPATH, "//*[normalize-space()='Success']")))
    ARTIFACTS.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(ARTIFACTS / "airflow.png"))
