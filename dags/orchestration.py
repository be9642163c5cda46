"""What the DAGs share: how a command of the package runs, how times become its arguments, who is told of a failure."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import (
    Asset,
    BaseHook,
    BaseOperator,
    CronTriggerTimetable,
    DeadlineAlert,
    DeadlineReference,
    SyncCallback,
)
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException

log = logging.getLogger(__name__)

RELEASE = "/opt/pipeline/current"
PYTHON = f"{RELEASE}/venv/bin/python"
# Has the settings of the node's services.
CLICKSTREAM = "/usr/local/bin/clickstream"
# A JVM that lives for a minute does not earn back what the optimising compiler takes from the streams' cores.
JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
# As many slots as the cluster has room for batch jobs; the inventory says how many.
SPARK_POOL = "spark"
# The weight of those that go before when several wait for a slot: others build on what they write.
FIRST = 10
# Every offset of the hours before is accounted for.
SILVER_ACCOUNTED = Asset("clickstream://silver/accounted")

# Exit codes of `clickstream`.
DIFFERENCES, REFUSED, WRONG_USAGE = 3, 4, 2

# --- How a command runs ----------------------------------------------------------------------------------------


def conclude(code: int, said: str) -> None:
    """Ends a task as an exit code asks: a dry run's differences are an answer; what a second look would find the same,
    a refusal or an unexplained offset, is not tried again.

    Raises AirflowException with what the command said of itself, else with the end of its output.
    """
    if code in (0, DIFFERENCES):
        return
    own = re.findall(r"^clickstream(?: \w+)?: (?:error: )?(.*)$", said, re.MULTILINE)
    told = "\n".join(own) or said.strip()[-2000:] or f"the command ended with {code} and said nothing"
    settled = code in (REFUSED, WRONG_USAGE) or told.startswith("unexplained: ")
    raise (AirflowFailException if settled else AirflowException)(told)


class SparkJob(SparkSubmitOperator):  # type: ignore[misc]
    """A command of the package as an application of the Spark cluster; empty arguments are left out."""

    def execute(self, context: Any) -> None:
        try:
            # The hook itself would go on without, to a cluster of another kind.
            BaseHook.get_connection(self._conn_id)
        except AirflowNotFoundException:
            raise AirflowFailException(
                f"there is no connection {self._conn_id}: the role writes it from airflow_spark_master_host; "
                "deploy again (make up, make deploy)"
            ) from None
        arguments: list[str] = self.application_args  # type: ignore[has-type]
        self.application_args = [argument for argument in arguments if argument]
        try:
            super().execute(context)
        except AirflowException as error:
            code = re.search(r"Error code is: (\d+)\.", str(error))
            if code is None:
                raise
            conclude(int(code[1]), str(error))


def spark_job(task_id: str, *arguments: str, **options: Any) -> SparkJob:
    """The task that runs `clickstream ARGUMENTS` on the Spark cluster, when the pool has a slot."""
    return SparkJob(
        task_id=task_id,
        conn_id="spark_default",
        pool=SPARK_POOL,
        application=f"{RELEASE}/clickstream_job.py",
        application_args=[*arguments, "--json"],
        name=f"airflow-{task_id}",
        driver_memory="512m",
        conf={
            "spark.pyspark.python": PYTHON,
            "spark.pyspark.driver.python": PYTHON,
            "spark.driver.extraJavaOptions": JAVA,
            "spark.executor.extraJavaOptions": JAVA,
            "spark.ui.enabled": "false",
        },
        **options,
    )


class Command(BaseOperator):  # type: ignore[misc]
    """A command without Spark; its output goes to the task's log, its last line is the task's result."""

    template_fields = ("command",)

    def __init__(self, *, command: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.command = command

    def execute(self, context: Any) -> str:
        process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = process
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            log.info(line.rstrip())
            lines = [*lines[-99:], line]
        conclude(process.wait(), "".join(lines))
        return lines[-1].strip() if lines else ""

    def on_kill(self) -> None:
        self.process.terminate()


def command(task_id: str, *arguments: str, **options: Any) -> Command:
    """The task that runs `clickstream ARGUMENTS`, which needs no Spark."""
    return Command(task_id=task_id, command=[CLICKSTREAM, *arguments, "--json"], **options)


# --- Times as arguments ----------------------------------------------------------------------------------------


def _moment(name: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise AirflowFailException(f"{name} is {text!r}; write a time, for example 2025-11-29T12:00Z") from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)


def _written(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment.second else f"{moment:%Y-%m-%dT%H:%MZ}"


def chosen_span(params: dict[str, Any]) -> tuple[str, str]:
    """`from` and `to` of a run that a person started, each empty when it was not given; raises where they are wrong."""
    start, end = (_moment(name, params[name]) if params.get(name) else None for name in ("from", "to"))
    if start and end and start >= end:
        raise AirflowFailException(f"from {_written(start)} is not before to {_written(end)}; exchange or correct them")
    if start and start > datetime.now(UTC):
        raise AirflowFailException(f"from {_written(start)} is in the future; choose an earlier time")
    return _written(start) if start else "", _written(end) if end else ""


def recompute_span(dag_run: Any, params: dict[str, Any]) -> tuple[str, str]:
    """What a run of gold_recompute computes: the hours asked for, yesterday when the clock started it, else the last
    whole hours."""
    start, end = chosen_span(params)
    if bool(start) != bool(end):
        raise AirflowFailException(f"{'to' if start else 'from'} is missing; give both, or none for the last hours")
    for name, text in (("from", start), ("to", end)):
        if text and not text.endswith(":00Z"):
            raise AirflowFailException(f"{name} {text} is not a whole hour of UTC; write {text[:13]}:00Z")
    if start:
        return start, end
    now = dag_run.run_after.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if dag_run.run_type == "scheduled":
        today = now.replace(hour=0)
        return _written(today - timedelta(days=1)), _written(today)
    return _written(now - timedelta(hours=params["hours"])), _written(now)


def report_date(dag_run: Any, params: dict[str, Any]) -> str:
    """The day of a report: the one asked for, else the day before the run."""
    if not params.get("date"):
        return f"{dag_run.run_after.astimezone(UTC) - timedelta(days=1):%Y-%m-%d}"
    day = _moment("date", params["date"])
    if day > datetime.now(UTC):
        raise AirflowFailException(f"date {params['date']} is in the future; choose an earlier day")
    return f"{day:%Y-%m-%d}"


def days_before(dag_run: Any, days: str) -> str:
    """So many days before a run, as a time with its zone."""
    return str((dag_run.run_after - timedelta(days=int(days))).isoformat())


def option(name: str, value: Any) -> str:
    """`--name=value`, or nothing where there is no value; a flag for True."""
    return f"--{name}" if value is True else f"--{name}={value}" if value not in (None, "", False) else ""


# --- Who is told -----------------------------------------------------------------------------------------------

# The package makes this table, see `clickstream notify`; business_alerts delivers what is in it.
_RAISE = """
INSERT INTO alerts.outbox (alert_key, kind, subject, raised_at, message, numbers)
VALUES (%s, %s, %s, now(), %s, %s) ON CONFLICT (alert_key) DO NOTHING
"""


def raise_alert(key: str, kind: str, subject: str, message: str, numbers: dict[str, Any]) -> None:
    """Puts an alert into the outbox unless its key is there. One that cannot be put there is in the log at least."""
    from airflow.providers.postgres.hooks.postgres import PostgresHook
    from psycopg2.errors import InvalidSchemaName, UndefinedTable

    hook = PostgresHook(postgres_conn_id="analytics")
    row = (key, kind, subject, message, json.dumps(numbers))
    try:
        try:
            hook.run(_RAISE, parameters=row)
        except (InvalidSchemaName, UndefinedTable):
            # Nothing was to be told yet on this platform: the package makes its tables.
            subprocess.run([CLICKSTREAM, "notify", "--json"], check=True)
            hook.run(_RAISE, parameters=row)
    except Exception:
        log.exception("ALERT that could not be written to alerts.outbox: %s: %s", subject, message)


def _page(dag_id: str, run_id: str) -> str:
    from airflow.configuration import conf

    return f"{conf.get('api', 'base_url').rstrip('/')}/dags/{dag_id}/runs/{run_id}"


def tell_failure(context: Any) -> None:
    """The failure callback of every task: one alert for each time that a task begins to fail."""
    task = context["ti"]
    try:
        # By the clock, failures are one story until a run succeeds. Of runs that a person or an asset has started
        # Airflow does not know what went before: each is told.
        last = context["prev_start_date_success"]
        since = last.isoformat() if last else "ever" if context["dag_run"].logical_date else str(task.run_id)
    except Exception:  # told by the DAG processor, after a task's process was lost
        since = str(task.run_id)
    error = str(context.get("exception") or "the task's process ended without a word; see the scheduler's journal")
    raise_alert(
        f"task:{task.dag_id}.{task.task_id}:fails-since:{since}",
        "task_failed",
        f"{task.dag_id}.{task.task_id} failed",
        error[:4000],
        {"run_id": task.run_id, "tries": task.try_number, "link": _page(task.dag_id, task.run_id)},
    )


def tell_late(context: Any) -> None:
    """The callback of a missed deadline; the context has the DAG run and the deadline as the API would tell them."""
    run, deadline = context["dag_run"], context["deadline"]["deadline_time"]
    raise_alert(
        f"run:{run['dag_id']}:{run['dag_run_id']}:late",
        "dag_late",
        f"{run['dag_id']} is late",
        f"run {run['dag_run_id']} was to be done by {deadline} and is {run['state']}; see whether the pool "
        f"{SPARK_POOL} and the Spark master have a free slot",
        {"run_id": run["dag_run_id"], "link": _page(run["dag_id"], run["dag_run_id"])},
    )


# --- Upkeep ----------------------------------------------------------------------------------------------------


def trim_logs(days: str, max_mib: str) -> dict[str, int]:
    """Removes logs that are too old, then the oldest while there are too many; counts and sizes in MiB."""
    from airflow.configuration import conf

    folder = Path(conf.get("logging", "base_log_folder"))
    stats = sorted((path.lstat().st_mtime, path.lstat().st_size, path) for path in folder.rglob("*") if path.is_file())
    kept = sum(size for _, size, _ in stats)
    removed = 0
    for written, size, path in stats:
        if written > time.time() - 86400 * int(days) and kept <= int(max_mib) << 20:
            break
        path.unlink(missing_ok=True)
        removed += 1
        kept -= size
    # Deepest first; of those that were not used for a day the empty ones go.
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and path.lstat().st_mtime < time.time() - 86400:
            with contextlib.suppress(OSError):
                path.rmdir()
    return {"removed": removed, "kept": len(stats) - removed, "kept_mib": kept >> 20}


# --- What every DAG has ----------------------------------------------------------------------------------------


def clock(cron: str) -> CronTriggerTimetable:
    """Runs by UTC. The first is the next one due: a new platform has enough to do with starting."""
    # False would let a daily run that was due two hours ago begin.
    return CronTriggerTimetable(cron, timezone="UTC", run_immediately=timedelta(0))


def shared(*, deadline: timedelta, **default_args: Any) -> dict[str, Any]:
    """The arguments that all DAGs have. A run that is not done within the deadline after it was queued is told, and is
    ended after twice that time."""
    return {
        # Most jobs do all of the work that is left. gold_recompute and daily_report are of a day: their pages say how
        # to ask for the days of an outage.
        "catchup": False,
        "max_active_runs": 1,
        "dagrun_timeout": 2 * deadline,
        "deadline": DeadlineAlert(
            reference=DeadlineReference.DAGRUN_QUEUED_AT, interval=deadline, callback=SyncCallback(tell_late)
        ),
        "default_args": {
            "owner": "data-platform",
            "retries": 2,
            "retry_delay": timedelta(minutes=1),
            "retry_exponential_backoff": True,
            "max_retry_delay": timedelta(minutes=10),
            "execution_timeout": deadline,
            "on_failure_callback": tell_failure,
            **default_args,
        },
        "user_defined_macros": {
            "chosen_span": chosen_span,
            "days_before": days_before,
            "option": option,
            "recompute_span": recompute_span,
            "report_date": report_date,
        },
    }
