"""Asks whether the data can be trusted, twice an hour. The work is `clickstream quality`, run by spark-submit."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG
from orchestration import clock, shared, spark_job

DOC = """
### data_quality
Looks at the freshness of each layer, at gaps in Bronze's offsets, at schema and nulls, at the rejects by rule and at
the volume against their own history. Each result is a row of `quality.checks` in the marts' database; a failed one is
an alert.

    SELECT check_name, subject, status, value, threshold, detail FROM quality.checks
    WHERE run_id = (SELECT run_id FROM quality.checks ORDER BY checked_at DESC LIMIT 1) ORDER BY status, 1, 2;

**When it fails** the log names each failed check.

* *freshness*: is the service up (`make status`) and does it keep up (`make lag`)? Then the streams' journal.
* *offset continuity*: records are missing in Bronze; compare with Kafka (`make topics`) before its retention removes
  them.
* *reject rate*: `silver.rejects` has the raw bytes and the codes; a producer has changed, or a rule is wrong
  (`backfill`).
* *volume*: is the shop open? Thresholds are `CLICKSTREAM_QUALITY_*`, set with `pipeline_settings` in the inventory.

It is not tried again when a check fails: the next run asks again. It changes no table but its own.
"""

with DAG(
    dag_id="data_quality",
    description="Freshness, continuity, schema, rejects and volume, against their own history",
    schedule=clock("25,55 * * * *"),
    doc_md=DOC,
    tags=["quality"],
    **shared(deadline=timedelta(minutes=15)),
):
    spark_job("check", "quality")
