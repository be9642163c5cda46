"""Keeps Airflow itself small: old rows of its database, old and many task logs."""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG
from orchestration import Command, clock, shared, trim_logs

DOC = """
### airflow_maintenance
Each night removes rows of Airflow's database that are older than the variable `database_retention_days` (`airflow db
clean`), and task logs: those older than `log_retention_days`, then the oldest until the rest is below `log_max_mib`.
The three are `airflow_database_retention_days`, `airflow_log_retention_days` and `airflow_log_max_mib` of the
inventory.

**When it fails**: the log names the table or file. Safe to run again; missed runs need no catching up. By hand:
`airflow db clean --clean-before-timestamp DATE --dry-run`.
"""


with DAG(
    dag_id="airflow_maintenance",
    description="Removes old rows of Airflow's database and old logs",
    schedule=clock("20 4 * * *"),
    doc_md=DOC,
    tags=["airflow", "maintenance"],
    **shared(deadline=timedelta(minutes=30)),
):
    Command(
        task_id="clean_database",
        # By the command of the node: a task itself has no way to the database.
        command=[
            *("/usr/local/bin/airflow", "db", "clean", "--yes", "--skip-archive", "--error-on-cleanup-failure"),
            *(
                "--clean-before-timestamp",
                "{{ days_before(dag_run, var.value.database_retention_days) }}",
            ),
        ],
    )
    PythonOperator(
        task_id="trim_logs",
        python_callable=trim_logs,
        op_args=["{{ var.value.log_retention_days }}", "{{ var.value.log_max_mib }}"],
    )
