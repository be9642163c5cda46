"""What people are told of the business: found in the marts, put once into the outbox; Airflow delivers it from there.

Four kinds, each with a key made of what it is about, so that looking again finds the same and adds nothing:

  episode_opened, episode_closed   of gold.product_alerts
  conversion_drop                  a category's final hour, when the upper confidence bound of its session conversion is
                                   below a fraction of the lower bound of its own history; only the first such hour
  revenue_stall                    no purchase for a time that the history makes improbable
  quality                          a check of the newest quality run that fails; once until it passes again

**The stall.** Seen K purchases in T minutes, the chance of none in the next s minutes is (T / (T + s))^(K + 1/2): the
predictive distribution of a Poisson count under Jeffreys' prior (A. Gelman et al., Bayesian Data Analysis, 2.6), so a
short history is little evidence by itself. The history is the same time of day on earlier days, as far as the mart has
them whole; else the day before the silence.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import attrgetter
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from clickstream.detector import wilson_upper
from clickstream.limits import NotifyLimits
from clickstream.marts import MartWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clickstream.settings import Settings

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)

SCHEMA = "alerts"
DDL = (
    """CREATE TABLE IF NOT EXISTS alerts.outbox (
        alert_key text        PRIMARY KEY,
        kind      text        NOT NULL,
        subject   text        NOT NULL,
        raised_at timestamptz NOT NULL,
        message   text        NOT NULL,
        numbers   jsonb       NOT NULL
    )""",
    # Whoever delivers writes this one: a row for each sink, delivered_at once it has taken the alert.
    """CREATE TABLE IF NOT EXISTS alerts.deliveries (
        alert_key    text        NOT NULL REFERENCES alerts.outbox ON DELETE CASCADE,
        sink         text        NOT NULL,
        attempts     int         NOT NULL DEFAULT 0,
        last_error   text,
        delivered_at timestamptz,
        PRIMARY KEY (alert_key, sink)
    )""",
)


@dataclass(frozen=True)
class Alert:
    """One message; of two with the same key the first counts."""

    alert_key: str
    kind: str
    subject: str
    message: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Hour:
    """A category's final hour: how many sessions viewed, and how many of these bought."""

    window_start: datetime
    value: str
    sessions: int
    converted: int


class Purchases(NamedTuple):
    """A minute of the whole shop."""

    window_start: datetime
    purchases: int


# What fails in the newest run, and since when without a pass in between.
FAILING = """
    SELECT c.*, (
        SELECT min(f.checked_at) FROM quality.checks f
        WHERE (f.check_name, f.subject, f.status) = (c.check_name, c.subject, 'fail') AND f.checked_at > coalesce(
            (SELECT max(g.checked_at) FROM quality.checks g
             WHERE (g.check_name, g.subject) = (c.check_name, c.subject) AND g.status = 'pass'),
            '-infinity')
    ) AS failing_since
    FROM quality.checks c
    WHERE c.status = 'fail' AND c.checked_at >= %(since)s
      AND c.run_id = (SELECT run_id FROM quality.checks ORDER BY checked_at DESC LIMIT 1)
    ORDER BY c.check_name, c.subject
"""


def at(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%MZ}"


def percent(part: float) -> str:
    return f"{100 * part:.3g} %"


def wilson_lower(successes: int, trials: int, z: float) -> float:
    """The lower bound of Wilson's score interval; 0 when nothing was tried."""
    return 1 - wilson_upper(trials - successes, trials, z)


def episodes(rows: Iterable[dict[str, Any]], since: datetime) -> list[Alert]:
    """What opened or closed since then, of rows of gold.product_alerts. Pure."""
    found = []
    for row in rows:
        product, opened, closed = row["product_id"], row["opened_at"], row["closed_at"]
        key = f"episode:{product}:{at(opened)}"
        numbers = {name: row[name] for name in ("views", "carts", "purchases")} | {
            name: round(row[name], 6) for name in ("interest_ratio", "interest_z", "conversion_upper", "catalogue_rate")
        }
        numbers |= {"opened_at": at(opened), "closed_at": closed and at(closed)}
        if opened >= since:
            message = (
                f"{product}: high interest, low conversion since {at(opened)}. {row['views']} views, "
                f"{row['interest_ratio']:.1f} times the others' median, and {row['purchases']} purchases: at most "
                f"{percent(row['conversion_upper'])} of views, where the catalogue has {percent(row['catalogue_rate'])}"
            )
            opening = numbers | {"closed_at": None}
            found.append(Alert(f"{key}:opened", "episode_opened", product, message, opening))
        if closed is not None and closed >= since:
            message = (
                f"{product}: no longer high interest with low conversion, from {at(opened)} to {at(closed)} "
                f"({(closed - opened) // MINUTE} minutes)"
            )
            found.append(Alert(f"{key}:closed", "episode_closed", product, message, numbers))
    return found


def conversion_drops(hours: Iterable[Hour], limits: NotifyLimits, z: float, since: datetime) -> list[Alert]:
    """The first hours of drops that began since then; hours sorted by category and time. Pure."""
    found = []
    for category, own in groupby(hours, key=attrgetter("value")):
        history: deque[Hour] = deque()
        sessions = converted = 0
        previous: Hour | None = None
        for hour in own:
            while history and history[0].window_start < hour.window_start - limits.history_days * DAY:
                old = history.popleft()
                sessions, converted = sessions - old.sessions, converted - old.converted
            before = wilson_lower(converted, sessions, z)
            upper = wilson_upper(hour.converted, hour.sessions, z)
            low = sessions >= limits.min_sessions and upper < limits.conversion_fraction * before
            follows = previous is not None and hour.window_start - previous.window_start == timedelta(hours=1)
            if low and not follows and hour.window_start >= since:
                message = (
                    f"{category}: conversion dropped in the hour from {at(hour.window_start)}. {hour.converted} of "
                    f"{hour.sessions} sessions that viewed bought, {percent(hour.converted / hour.sessions)} and at "
                    f"most {percent(upper)}; in its history {percent(converted / sessions)} did"
                )
                numbers = {
                    "window_start": at(hour.window_start),
                    "sessions_with_view": hour.sessions,
                    "sessions_converted": hour.converted,
                    "conversion_upper": round(upper, 6),
                    "history_sessions_with_view": sessions,
                    "history_sessions_converted": converted,
                    "history_conversion_lower": round(before, 6),
                }
                key = f"conversion:{category}:{at(hour.window_start)}:dropped"
                found.append(Alert(key, "conversion_drop", category, message, numbers))
            previous = hour if low else None
            history.append(hour)
            sessions, converted = sessions + hour.sessions, converted + hour.converted
    return found


def revenue_stall(minutes: Sequence[Purchases], first: datetime, now: datetime, limits: NotifyLimits) -> Alert | None:
    """Whether the time since the last purchase is improbably long; `minutes` have purchases, in order, and `first` is
    the first one that the mart has at all. Pure."""
    if not minutes:
        return None
    last = minutes[-1].window_start
    began = last + MINUTE
    silence = now - began
    if silence < limits.stall_minutes * MINUTE:
        return None
    spans = [(began - day * DAY, now - day * DAY) for day in range(1, limits.history_days + 1)]
    spans = [(start, end) for start, end in spans if start >= first and end <= began]
    if not spans:
        spans = [(max(first, began - DAY), began)]
    seen = sum(m.purchases for m in minutes for start, end in spans if start <= m.window_start < end)
    exposure = sum((end - start) / MINUTE for start, end in spans)
    silent = silence / MINUTE
    probability = (exposure / (exposure + silent)) ** (seen + 0.5)
    if probability >= limits.stall_probability:
        return None
    expected = seen / exposure * silent
    message = (
        f"no revenue for {silent:.0f} minutes, since {at(began)}; {expected:.3g} purchases were to be expected, and "
        f"none by chance has a probability of {probability:.1g}"
    )
    numbers = {
        "silent_minutes": round(silent, 1),
        "expected_purchases": round(expected, 1),
        "probability": float(f"{probability:.3g}"),
        "last_revenue_before": at(began),
    }
    return Alert(f"revenue:{at(began)}:stalled", "revenue_stall", "revenue", message, numbers)


def quality_failures(rows: Iterable[dict[str, Any]]) -> list[Alert]:
    """The failures of a quality run, each with `failing_since`. Pure."""
    return [
        Alert(
            f"quality:{row['check_name']}:{row['subject']}:{at(row['failing_since'])}:failed",
            "quality",
            f"{row['check_name']} {row['subject']}",
            f"data quality: {row['check_name']} of {row['subject']} fails: {row['detail']}",
            {name: row[name] for name in ("value", "threshold")} | {"failing_since": at(row["failing_since"])},
        )
        for row in rows
    ]


def _exists(connection: psycopg.Connection[Any], table: str) -> bool:
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (table,)).fetchone()
    return bool(row and row[0])


def _find(connection: psycopg.Connection[Any], limits: NotifyLimits, now: datetime) -> list[Alert]:
    """Everything there is to tell, known or new. What is not in the marts yet has nothing to tell."""
    lookback, history = timedelta(hours=limits.lookback_hours), limits.history_days * DAY
    found: list[Alert] = []
    as_of = now
    if _exists(connection, "gold.product_funnel_1m"):
        row = connection.execute("SELECT min(window_start), max(window_end) FROM gold.product_funnel_1m").fetchone()
        if row and row[0]:
            first, newest = row
            # Marts of the past have their own clock: events that are replayed from a file are no stall.
            as_of = now if now - newest < lookback else newest
            since = as_of - history - DAY
            query = (
                "SELECT window_start, sum(purchases)::bigint FROM gold.product_funnel_1m "
                "WHERE window_start >= %s AND purchases > 0 GROUP BY window_start ORDER BY window_start"
            )
            minutes = [Purchases(*row) for row in connection.execute(query, (since,))]
            stalled = revenue_stall(minutes, max(first, since), as_of, limits)
            found += [stalled] if stalled else []
    since = as_of - lookback
    if _exists(connection, "gold.product_alerts"):
        with connection.cursor(row_factory=dict_row) as cursor:
            query = "SELECT * FROM gold.product_alerts WHERE greatest(opened_at, closed_at) >= %s ORDER BY opened_at"
            found += episodes(cursor.execute(query, (since,)).fetchall(), since)
    if _exists(connection, "gold.conversion_1h"):
        with connection.cursor(row_factory=class_row(Hour)) as cursor:
            query = (
                "SELECT window_start, value, sessions_with_view AS sessions, sessions_converted AS converted "
                "FROM gold.conversion_1h WHERE is_final AND dimension = 'category' AND window_start >= %s "
                "ORDER BY value, window_start"
            )
            hours = cursor.execute(query, (since - timedelta(hours=1) - history,)).fetchall()
        z = NormalDist().inv_cdf(limits.confidence)
        found += conversion_drops(hours, limits, z, since)
    if _exists(connection, "quality.checks"):
        with connection.cursor(row_factory=dict_row) as cursor:
            found += quality_failures(cursor.execute(FAILING, {"since": now - lookback}).fetchall())
    return found


def update(marts: MartWriter, limits: NotifyLimits, now: datetime) -> list[Alert]:
    """Puts what is new into the outbox; returns that. Another run at the same time does no harm."""
    marts.create(SCHEMA, [sql.SQL(statement) for statement in DDL])

    def work(connection: psycopg.Connection[Any]) -> list[Alert]:
        new = []
        for alert in _find(connection, limits, now):
            added = connection.execute(
                "INSERT INTO alerts.outbox (alert_key, kind, subject, raised_at, message, numbers) "
                "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (alert.alert_key, alert.kind, alert.subject, now, alert.message, Jsonb(alert.numbers)),
            )
            if added.rowcount:
                new.append(alert)
        # What a sink has not taken yet stays.
        connection.execute(
            "DELETE FROM alerts.outbox o WHERE raised_at < %s AND NOT EXISTS "
            "(SELECT FROM alerts.deliveries d WHERE d.alert_key = o.alert_key AND d.delivered_at IS NULL)",
            (now - limits.retention_days * DAY,),
        )
        return new

    return marts.transact(work)


def run(settings: Settings) -> dict[str, Any]:
    """`{"new": [alert, ...]}`. Raises SettingsError without marts, ParameterError when a limit is wrong."""
    settings.require_marts()
    limits = NotifyLimits.from_env()
    marts = MartWriter(settings.marts_dsn, application_name="clickstream-notify")
    try:
        return {"new": [asdict(alert) for alert in update(marts, limits, datetime.now(UTC))]}
    finally:
        marts.close()
