"""Judges records again by another version of the rules, when a person asks. The work is `clickstream backfill`."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param
from orchestration import shared, spark_job

DOC = """
### backfill
Judges the records of a range of Kafka's time again from Bronze's bytes, by another version of the rules, and replaces
their rows in `silver.events` and `silver.rejects`. Only started by hand:

1. Trigger `silver_account`: only what the ledger has is judged again.
2. Trigger this with `ruleset` and `dry_run` (the default): the log says what would change its place and by which
   rules.
3. Trigger it without `dry_run`. The log ends with the hours that Gold has to follow.
4. Trigger `gold_recompute` with these hours as `from` and `to`, and a `max_differences` that lets them pass.

`rollback` takes the latest backfill back at once, while the tables keep what was before (48 hours); Gold follows as
in 4.

**When it fails**: a wrong range or rule set is told in one line, before Spark starts or by the command, and nothing
is changed. *none of the records … is in the ledger yet*: step 1. *was interrupted while it wrote*: trigger it with
`rollback`.
"""

with DAG(
    dag_id="backfill",
    description="Judges records again by another version of the rules; can be taken back",
    schedule=None,
    doc_md=DOC,
    tags=["silver", "manual"],
    params={
        "ruleset": Param(
            None, type=["null", "integer"], minimum=1, description="Version of the rules; without: the streams'."
        ),
        "from": Param(
            None, type=["null", "string"], format="date-time", description="Begin, of Kafka's time; without: all."
        ),
        "to": Param(None, type=["null", "string"], format="date-time", description="End, not included; without: all."),
        "dry_run": Param(True, type="boolean", description="Only report what would change."),
        "rollback": Param(
            False, type="boolean", description="Take the latest backfill back, at once: dry_run does not matter."
        ),
    },
    **shared(deadline=timedelta(hours=1)),
):
    spark_job(
        "backfill",
        "backfill",
        "{{ option('ruleset', params.ruleset) }}",
        "{{ option('from', chosen_span(params)[0]) }}",
        "{{ option('to', chosen_span(params)[1]) }}",
        "{{ option('dry-run', params.dry_run and not params.rollback) }}",
        "{{ option('rollback', params.rollback) }}",
        # A person is there to look; a write that was interrupted has to be taken back first.
        retries=0,
    )
