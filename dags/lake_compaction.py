"""Compacts the lake's tables: hourly OPTIMIZE, daily VACUUM. The work is `clickstream compact`, run by spark-submit."""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import DAG, CronTriggerTimetable

RELEASE = "/opt/pipeline/current"
PYTHON = f"{RELEASE}/venv/bin/python"
# A JVM that lives for a minute does not earn back what the optimising compiler takes from the streams' cores.
JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"


def compaction(dag_id: str, cron: str, description: str, what: str, arguments: list[str]) -> DAG:
    with DAG(
        dag_id=dag_id,
        description=description,
        # Without a start date the first run is the next one due: a new platform has enough to do with starting.
        schedule=CronTriggerTimetable(cron, timezone="UTC", run_immediately=False),
        catchup=False,
        max_active_runs=1,
        dagrun_timeout=timedelta(minutes=50),
        default_args={
            "owner": "data-platform",
            "retries": 2,
            "retry_delay": timedelta(minutes=1),
            "retry_exponential_backoff": True,
            "max_retry_delay": timedelta(minutes=10),
            "execution_timeout": timedelta(minutes=20),
        },
        tags=["lake", "maintenance"],
        doc_md=f"""
### {dag_id}
{what}

**It is safe beside the running streams and safe to run again**: it changes no row, the streams do not see
its commits, and a conflicting commit is retried.

**When it fails**: read the task's log; the last lines name the table. *No resources*: the Spark master's page shows
whether the worker has a free core and the executor's memory. *Permission denied*: Airflow's user must be in the group
`lake`. Missed runs need no catching up, the next one does all of the work.

**By hand** on a pipeline node: `clickstream {" ".join(arguments)}`.
""",
    ) as dag:
        SparkSubmitOperator(
            task_id="compact",
            conn_id="spark_default",
            application=f"{RELEASE}/clickstream_job.py",
            application_args=[*arguments, "--json"],
            driver_memory="512m",
            conf={
                "spark.pyspark.python": PYTHON,
                "spark.pyspark.driver.python": PYTHON,
                "spark.driver.extraJavaOptions": JAVA,
                "spark.executor.extraJavaOptions": JAVA,
                "spark.ui.enabled": "false",
            },
        )
    return dag


lake_compaction = compaction(
    "lake_compaction",
    "0 * * * *",
    "Joins the small files the streams write",
    "The streams commit every few seconds, so every table gathers small files. This run joins them (Delta OPTIMIZE).",
    ["compact"],
)
lake_vacuum = compaction(
    "lake_vacuum",
    "40 3 * * *",
    "Removes files that no reader needs any more",
    "Compaction leaves the joined files behind for readers of older versions. This run removes those that are past\n"
    "the table's retention (Delta VACUUM).",
    ["compact", "--vacuum"],
)
