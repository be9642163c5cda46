"""Keeps the lake's tables small: joins files each hour, removes old ones each night: `clickstream compact`."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param
from orchestration import clock, shared, spark_job

DOC = """
### lake_maintenance
The streams commit every few seconds, so every table gathers small files. Each hour this joins them (Delta OPTIMIZE).
The run of 03:40 UTC, and one triggered with `vacuum`, also writes checkpoints, removes the files that are past the
tables' retention (VACUUM) and rows that are past the marts'.

**It is safe beside the running streams and safe to run again**: it changes no row, the streams do not see its
commits, and a conflicting commit is retried. VACUUM refuses, and says which reader it would break, when a stream is
further behind than the retention or a backfill can still be taken back: let the stream catch up, or wait until the
backfill's time is over.

**When it fails**: the last lines of the log name the table. *No resources*: the Spark master's page shows whether the
worker has a free core and the executor's memory. *Permission denied*: Airflow's user must be in the group `lake`.
Missed runs need no catching up. By hand on a pipeline node: `clickstream compact`, `clickstream compact --vacuum`.
"""

with DAG(
    dag_id="lake_maintenance",
    description="Joins the small files the streams write; at night removes what no reader needs",
    schedule=clock("40 * * * *"),
    doc_md=DOC,
    tags=["lake", "maintenance"],
    params={"vacuum": Param(False, type="boolean", description="Also remove what is past the retention.")},
    **shared(deadline=timedelta(minutes=30)),
):
    spark_job(
        "compact",
        "compact",
        "{{ option('vacuum', params.vacuum or (dag_run.run_type == 'scheduled' and dag_run.run_after.hour == 3)) }}",
    )
