"""Opens and closes episodes of products with high interest and low conversion. The work is `clickstream alerts`."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG
from orchestration import clock, shared, spark_job

DOC = """
### product_alerts
Compares each product's views and conversion of the last hour with the catalogue's, and opens and closes episodes in
`gold.product_alerts`. `business_alerts` tells them.

**When it fails**: the log has the cause in its last line. *No resources*: the Spark master's page shows whether the
worker has a free core and the executor's memory; *another run holds …*: the next try waits for it. The next run
goes on from what the last one wrote: minutes that were missed are made up for. By hand: `make alerts`.
"""

with DAG(
    dag_id="product_alerts",
    description="Opens and closes episodes of products with high interest and low conversion",
    schedule=clock("*/5 * * * *"),
    doc_md=DOC,
    tags=["alerts"],
    **shared(deadline=timedelta(minutes=15), retry_delay=timedelta(seconds=30)),
):
    spark_job("find", "alerts")
