"""Computes Gold again, the last hours after each accounting, yesterday each night: `clickstream recompute`."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, AssetOrTimeSchedule, Param
from orchestration import FIRST, SILVER_ACCOUNTED, clock, shared, spark_job

DOC = """
### gold_recompute
Computes whole hours of all funnels, conversions and visits again from `silver.events`, beside what is served;
compares; and replaces what differs, in Delta and in the marts. After each `silver_account` it takes the last `hours`
hours, at 00:50 UTC yesterday. Hours that the streams have not finished are left to a later run.

**The gate**: more than `max_differences` differing rows, and nothing is replaced: *the run fails, is not tried again,
and what is served stays as it was*. The log has the report: by table and place how many rows are missing, surplus or
differ, and the first keys.

**When the gate stops it**

* Many late events or a backfill explain it: trigger it again with the same `from` and `to` and a higher
  `max_differences`.
* Nothing explains it: look at the keys in Gold and in `silver.events` before anything is replaced. `dry_run` only
  reports.

**After an outage of Airflow** that lasted over 00:50 UTC, or for more than `hours` hours, the hours in between are not
made up for by themselves: trigger it with `from` and `to` around them, else `gold.sessions`, which no stream writes,
lacks their visits.

**When it fails otherwise**: *no hour … is final*: the range is too young, or the streams are stopped; choose an
earlier range. *another run holds …*: the next try waits for it. By hand: `make recompute ARGS="--from T --to T"`.
"""

with DAG(
    dag_id="gold_recompute",
    description="Computes Gold again, compares, and replaces what differs when it is little enough",
    schedule=AssetOrTimeSchedule(assets=[SILVER_ACCOUNTED], timetable=clock("50 0 * * *")),
    doc_md=DOC,
    tags=["gold", "batch"],
    params={
        "from": Param(None, type=["null", "string"], format="date-time", description="First hour, UTC; with `to`."),
        "to": Param(None, type=["null", "string"], format="date-time", description="End, not included."),
        "hours": Param(
            3, type="integer", minimum=1, maximum=168, description="Without from and to: so many last hours."
        ),
        "max_differences": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            description="Differing rows, Delta and marts together, above which nothing is replaced. "
            "Without: the variable gold_max_differences.",
        ),
        "dry_run": Param(False, type="boolean", description="Only report what differs."),
    },
    **shared(deadline=timedelta(minutes=30)),
):
    spark_job(
        "recompute",
        "recompute",
        "{{ option('from', recompute_span(dag_run, params)[0]) }}",
        "{{ option('to', recompute_span(dag_run, params)[1]) }}",
        "{{ option('max-differences', params.max_differences or var.value.gold_max_differences) }}",
        "{{ option('dry-run', params.dry_run) }}",
        priority_weight=FIRST,
    )
