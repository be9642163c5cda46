"""Accounts for every offset, each hour. The work is `clickstream account`, run by spark-submit."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG
from orchestration import FIRST, SILVER_ACCOUNTED, clock, shared, spark_job

DOC = """
### silver_account
Puts what the streams' deduplication dropped where it belongs: duplicates into `silver.rejects`, valid events that
came too late into `silver.events`. Then checks that every closed offset of Bronze is once in Silver, and writes the
ledger (`silver.ledger`). Its asset starts `gold_recompute`.

**When it fails**

* *unexplained: TOPIC/PARTITION offset N*: records are missing in Silver, or there twice. The ledger was not advanced.
  Look at them in Bronze (`spark-sql`: `SELECT * FROM delta.`/var/lib/lake/bronze/clickstream` WHERE offset = N`) and
  in `silver/events` and `silver/rejects`; `DESCRIBE HISTORY` of these names the write that did it. Of a record that is
  there twice, delete all copies (`DELETE FROM delta.`/var/lib/lake/silver/events` WHERE partition = P AND offset = N`):
  what Silver lacks, the next run judges again from Bronze. If the ledger itself is wrong, the row is in
  `silver/ledger`.
* *another run holds …*: a recompute or backfill is at work; the next try waits for it.
* *No resources*: the Spark master's page shows whether the worker has a free core and the executor's memory.

**It is safe to run again** at any time and beside the streams: what is accounted for is not looked at again. Missed
runs need no catching up. By hand: `make account`.
"""

with DAG(
    dag_id="silver_account",
    description="Accounts for every offset: bronze = silver.events + silver.rejects",
    schedule=clock("5 * * * *"),
    doc_md=DOC,
    tags=["silver", "batch"],
    **shared(deadline=timedelta(minutes=20)),
):
    spark_job("account", "account", outlets=[SILVER_ACCOUNTED], priority_weight=FIRST)
