"""Writes the report of a day. The work is `clickstream report`."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param
from orchestration import clock, command, shared

DOC = """
### daily_report
Writes the funnel, the top products, the products with high interest and low conversion and the data-quality ledger of
a day to `/var/lib/pipeline/reports/DATE`: `report.html` with plots, and CSV files.
`/var/lib/pipeline/reports/index.html` lists all days. It runs at 01:30 UTC for the day before, after `gold_recompute`
has gone over it.

**To write a day again** trigger it with `date`: the same files are written anew, each in one step.

**After an outage of Airflow** only the last day is written: trigger it with `date` for each day before.

**When it fails**: *no data of that day*: are there windows of it in the marts (`make gold`)? They go back 90 days.
*No space left on device*: `df -h /var/lib/pipeline` on the node; the day's old files are as they were.
"""

with DAG(
    dag_id="daily_report",
    description="The day's funnel, products and data quality, as HTML and CSV",
    schedule=clock("30 1 * * *"),
    doc_md=DOC,
    tags=["report"],
    params={"date": Param(None, type=["null", "string"], format="date", description="Day, UTC; without: yesterday.")},
    **shared(deadline=timedelta(minutes=15)),
):
    command("report", "report", "--date={{ report_date(dag_run, params) }}")
