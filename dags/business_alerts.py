"""Finds what people have to know, and tells them: `clickstream alerts`, `clickstream notify`, then delivery."""

from __future__ import annotations

from datetime import timedelta

import delivery
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG, TriggerRule
from orchestration import clock, command, shared, spark_job

DOC = """
### business_alerts
`find` opens and closes episodes of products with high interest and low conversion (`gold.product_alerts`); `notify`
puts these, falls of a category's conversion, stalls of revenue and failed data-quality checks into `alerts.outbox`,
each once; `deliver` sends the outbox, in which failed DAGs are too, to every sink that has a connection:

| connection | sink |
|---|---|
| `alerts_webhook` | POST of JSON, with the alert's key as `Idempotency-Key` |
| `alerts_smtp` | mail to `to_email` of its extra |
| `alerts_file` | a line in a file of the month, and in the scheduler's journal |

Connections are `airflow_connections` of the inventory; `make up` or `make deploy` brings them, no daemon restarts.

**When it fails**: if it is `deliver`, a sink is away: the log says which and why. Nothing is lost, the next run sends
what is left, and no sink gets an alert twice. What is waiting:

    SELECT o.alert_key, d.sink, d.attempts, d.last_error FROM alerts.outbox o JOIN alerts.deliveries d USING (alert_key)
    WHERE d.delivered_at IS NULL ORDER BY o.raised_at;

If it is `find` or `notify`, the others still do their work. By hand: `make alerts`; `clickstream notify` on a
pipeline node.
"""

with DAG(
    dag_id="business_alerts",
    description="Finds what people have to know, and tells them once",
    schedule=clock("*/5 * * * *"),
    doc_md=DOC,
    tags=["alerts"],
    **shared(deadline=timedelta(minutes=15), retry_delay=timedelta(seconds=30)),
):
    find = spark_job("find", "alerts")
    # What one step could not do must not keep the next from telling.
    notify = command("notify", "notify", trigger_rule=TriggerRule.ALL_DONE)
    deliver = PythonOperator(task_id="deliver", python_callable=delivery.deliver, trigger_rule=TriggerRule.ALL_DONE)
    find >> notify >> deliver
    # The run is green when all of them are.
    [find, notify, deliver] >> EmptyOperator(task_id="done")
