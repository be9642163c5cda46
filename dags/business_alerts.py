"""Tells people what they have to know: `clickstream notify`, then delivery."""

from __future__ import annotations

from datetime import timedelta

import delivery
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG, TriggerRule
from orchestration import clock, command, shared

DOC = """
### business_alerts
`notify` puts the episodes that `product_alerts` found, falls of a category's conversion, stalls of revenue and failed
data-quality checks into `alerts.outbox`, each once; `deliver` sends the outbox, in which failed and late DAGs are too,
to every sink that has a connection. Neither needs Spark, so a cluster that is busy or away cannot keep them from it.

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

If it is `notify`, what is in the outbox is delivered all the same. By hand: `clickstream notify` on a pipeline node.
"""

with DAG(
    dag_id="business_alerts",
    description="Tells people what they have to know, once",
    # Two minutes after product_alerts began.
    schedule=clock("2-59/5 * * * *"),
    doc_md=DOC,
    tags=["alerts"],
    **shared(deadline=timedelta(minutes=15), retry_delay=timedelta(seconds=30)),
):
    notify = command("notify", "notify")
    # What could not be found must not keep from telling what was.
    deliver = PythonOperator(task_id="deliver", python_callable=delivery.deliver, trigger_rule=TriggerRule.ALL_DONE)
    notify >> deliver
    # The run is green when both are.
    [notify, deliver] >> EmptyOperator(task_id="done")
