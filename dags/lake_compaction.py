"""Compacts the lake's tables every hour; the work is `clickstream compact`, run by spark-submit."""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import DAG, CronTriggerTimetable

RELEASE = "/opt/pipeline/current"
PYTHON = f"{RELEASE}/venv/bin/python"

with DAG(
    dag_id="lake_compaction",
    description="Joins the small files the streams write and removes what no reader needs any more",
    # Without a start date the first run is the next hour's: a new platform has enough to do with starting.
    schedule=CronTriggerTimetable("0 * * * *", timezone="UTC", run_immediately=False),
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
    doc_md="""
### lake_compaction
The streams commit every few seconds, so every table gathers small files. This run joins them
(Delta OPTIMIZE) and removes replaced files that are past the table's retention (VACUUM).

**It is safe beside the running streams and safe to run again**: it changes no row, the streams do not see
its commits, and a conflicting commit is retried.

**When it fails**: read the task's log; the last lines name the table. *No resources*: the Spark master's page shows
whether the worker has a free core and 768 MiB. *Permission denied*: Airflow's user must be in the group `lake`.
Missed runs need no catching up, the next one does all of the work.

**By hand** on a pipeline node: `clickstream compact`.
""",
) as dag:
    SparkSubmitOperator(
        task_id="compact",
        conn_id="spark_default",
        application=f"{RELEASE}/clickstream_job.py",
        application_args=["compact", "--json"],
        name="lake_compaction",
        total_executor_cores=1,
        executor_cores=1,
        executor_memory="768m",
        driver_memory="512m",
        conf={
            "spark.pyspark.python": PYTHON,
            "spark.pyspark.driver.python": PYTHON,
            # The driver only plans; the jars of Delta are on the node's own class path.
            "spark.ui.enabled": "false",
        },
    )
