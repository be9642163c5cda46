"""Delivers the alerts of alerts.outbox to the sinks that have a connection, with Airflow's own hooks.

A sink is there when its connection is: alerts_webhook, alerts_smtp, alerts_file. Each alert goes to each sink once:
alerts.deliveries notes a try before it is made and the delivery after it. What fails is tried again by the next run.
Only a crash between a delivery and its note sends an alert twice, and then with the same key: Idempotency-Key of the
webhook, Message-ID of the mail; the file is looked into before.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException
from airflow.sdk.log import mask_secret

log = logging.getLogger(__name__)

# So many failures one after the other are a sink that is away: the rest waits for the next try.
PATIENCE = 3
TIMEOUT_S = 10

# Oldest first, but behind those that were not tried yet: one that a sink refuses does not stand in the others' way. A
# new sink gets what was raised in the last day, and from then on everything.
_PENDING = """
SELECT o.alert_key, o.kind, o.subject, o.raised_at, o.message, o.numbers
FROM alerts.outbox o LEFT JOIN alerts.deliveries d ON d.alert_key = o.alert_key AND d.sink = %(sink)s
WHERE d.delivered_at IS NULL AND o.raised_at >= coalesce(
  (SELECT min(f.raised_at) FROM alerts.deliveries e JOIN alerts.outbox f USING (alert_key) WHERE e.sink = %(sink)s),
  now() - interval '1 day'
)
ORDER BY coalesce(d.attempts, 0), o.raised_at, o.alert_key
"""
_TRY = """
INSERT INTO alerts.deliveries AS d (alert_key, sink, attempts) VALUES (%(key)s, %(sink)s, 1)
ON CONFLICT (alert_key, sink) DO UPDATE SET attempts = d.attempts + 1 RETURNING attempts
"""
_DONE = """
UPDATE alerts.deliveries SET delivered_at = now(), last_error = NULL WHERE alert_key = %(key)s AND sink = %(sink)s
"""
_FAILED = "UPDATE alerts.deliveries SET last_error = %(error)s WHERE alert_key = %(key)s AND sink = %(sink)s"

Alert = dict[str, Any]


def to_webhook(alert: Alert, again: bool) -> None:
    """POSTs the alert as JSON; any answer but 2xx raises: a redirected POST would go on without its body."""
    from airflow.providers.http.hooks.http import HttpHook

    answer = HttpHook(method="POST", http_conn_id="alerts_webhook").run(
        data=json.dumps(alert),
        headers={"Content-Type": "application/json", "Idempotency-Key": alert["key"]},
        extra_options={"timeout": TIMEOUT_S, "allow_redirects": False},
    )
    if not 200 <= answer.status_code < 300:
        raise AirflowException(
            f"the webhook answered {answer.status_code} {answer.reason}; write the address that takes the POST itself "
            "into alerts_webhook"
        )


def to_smtp(alert: Alert, again: bool) -> None:
    """Mails the alert to the connection's `to_email`."""
    from airflow.providers.smtp.hooks.smtp import SmtpHook

    with SmtpHook(smtp_conn_id="alerts_smtp") as hook:
        recipients = hook.conn.extra_dejson.get("to_email")
        if not recipients:
            raise AirflowException("the connection alerts_smtp names nobody: add to_email to its extra")
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
            for name, value in alert["numbers"].items()
        )
        hook.send_email_smtp(
            to=recipients,
            subject=f"[clickstream] {alert['subject']}",
            html_content=f"<p>{html.escape(alert['message'])}</p><table>{rows}</table><p>{html.escape(alert['link'])}</p>",
            custom_headers={
                "Message-ID": f"<{hashlib.sha256(alert['key'].encode()).hexdigest()}@clickstream>",
                "X-Alert-Key": alert["key"],
            },
        )


def to_file(alert: Alert, again: bool) -> None:
    """Appends the alert to a file of the month, a line of JSON; the task's log takes it to the journal."""
    folder = Path(BaseHook.get_connection("alerts_file").extra_dejson["path"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"alerts-{alert['raised_at'][:7]}.jsonl"
    line = json.dumps(alert) + "\n"
    if not (again and file.exists() and line in file.read_text()):
        with file.open("a") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
    log.warning("ALERT %s: %s (%s)", alert["subject"], alert["message"], alert["link"])


SINKS = {"file": to_file, "webhook": to_webhook, "smtp": to_smtp}


def configured() -> dict[str, str]:
    """The sinks that have a connection, each with what no log may show: of a webhook the path is the secret."""
    found = {}
    for sink in SINKS:
        with contextlib.suppress(AirflowNotFoundException):
            host = BaseHook.get_connection(f"alerts_{sink}").host or ""
            found[sink] = host.partition("://")[2].partition("/")[2] if sink == "webhook" else ""
    return found


def _alert(row: tuple[Any, ...], page: str) -> Alert:
    key, kind, subject, raised_at, message, numbers = row
    assert isinstance(raised_at, datetime)
    numbers = dict(numbers or {})
    return {
        "key": key,
        "kind": kind,
        "subject": subject,
        "raised_at": raised_at.isoformat(),
        "message": message,
        "link": numbers.pop("link", page),
        "numbers": numbers,
    }


def _deliver_to(sink: str, secret: str, connection: Any, page: str) -> tuple[int, list[str]]:
    """How many alerts a sink took, and what it said of the others."""
    sent, errors, in_a_row = 0, [], 0
    with connection.cursor() as cursor:
        # A run that lost its scheduler may still be at it.
        cursor.execute("SELECT pg_advisory_lock(hashtext(%(lock)s))", {"lock": f"alerts.deliveries/{sink}"})
        cursor.execute(_PENDING, {"sink": sink})
        for row in cursor.fetchall():
            alert = _alert(row, page)
            names = {"key": alert["key"], "sink": sink}
            cursor.execute(_TRY, names)
            (attempts,) = cursor.fetchone()
            try:
                SINKS[sink](alert, attempts > 1)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                said = said.replace(secret, "***") if secret else said
                log.warning("%s did not take %s: %s", sink, alert["key"], said)
                cursor.execute(_FAILED, names | {"error": said[:1000]})
                errors.append(f"{sink}: {said}")
                in_a_row += 1
                if in_a_row == PATIENCE:
                    break
            else:
                cursor.execute(_DONE, names)
                sent += 1
                in_a_row = 0
    return sent, errors


def deliver() -> dict[str, int]:
    """Sends every sink what it has not had yet; how many each took. Raises when one of them failed, after all had their
    turn."""
    from airflow.configuration import conf
    from airflow.providers.postgres.hooks.postgres import PostgresHook

    sinks = configured()
    if not sinks:
        raise AirflowFailException(
            "there is no connection for alerts: add alerts_webhook, alerts_smtp or alerts_file to airflow_connections "
            "in the inventory and deploy (make up, make deploy)"
        )
    sent, errors = {}, []
    for sink, secret in sinks.items():
        # For the logs of Airflow's own hook.
        if secret:
            mask_secret(secret)
        with contextlib.closing(PostgresHook(postgres_conn_id="analytics").get_conn()) as connection:
            connection.autocommit = True
            sent[sink], said = _deliver_to(sink, secret, connection, conf.get("api", "base_url"))
            errors += said
    if errors:
        raise AirflowException(f"{len(errors)} deliveries failed and are tried again: {errors[-1]}")
    return sent
