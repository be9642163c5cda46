"""What the platform's figures mean, told a second time: which records count, in Python over Bronze's bytes, and what
Gold makes of them, in DuckDB's SQL over a table `event`. It knows nothing of Spark, nor of what Silver decided.

What is a matter of decision, not of logic, is decided here as in the rules: a price is the double that its JSON number
is read as; bytes that are no UTF-8 are read on with replacement characters; of equal keys the last counts.

What it assumes of the records it is asked about:
- A topic's history is known whole: of all valid records with one event_id, ever, one is an event. The stream forgets
  an id once the watermark has passed it, and takes one that comes back with a time after the watermark for a new event.
  So the records of an id have the same event time, or else none of them is late.
- That one is its partition's first. Between partitions nothing is promised: the stream keeps whichever its batches
  bring first. Here it is the one with the earliest time at Kafka, unless the caller says which it was.
- Bronze and Silver read a record at about the same time. Their clocks judge it only when Kafka's is ahead of them.
- Nothing is nested 500 deep, and no number or key is longer than 1,000 characters: where JSON ends is the parser's say.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from duckdb import DuckDBPyConnection

Position = tuple[int, int]

EPOCH = datetime(1970, 1, 1)
SECOND = 1_000_000
MAX_SKEW = 5 * 60 * SECOND
MAX_AGE = 7 * 24 * 3600 * SECOND

IDS = {
    "event_id": re.compile("evt_[0-9]{8,20}"),
    "user_id": re.compile("user_[0-9]{4,20}"),
    "product_id": re.compile("prod_[0-9]{4,20}"),
    "session_id": re.compile("session_[0-9]{4,20}"),
}
FIELDS = (*IDS, "event_type", "timestamp", "product_category", "device_type", "page_url", "price")
CATEGORIES = ("Electronics", "Clothing", "Home", "Sports", "Books", "Beauty", "Toys")
ISO = re.compile(
    r"([0-9]{4})(-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.][0-9]{1,6})?)(?:Z|([+-])([0-9]{2}):([0-9]{2}))"
)


class Record(NamedTuple):
    """What Bronze has of a record; its time at Kafka and at Bronze in microseconds since 1970."""

    partition: int
    offset: int
    value: bytes | None
    timestamp: int
    ingested_at: int

    @property
    def position(self) -> Position:
        return self.partition, self.offset


class Event(NamedTuple):
    """A valid event; its time in UTC, without a zone."""

    event_id: str
    event_time: datetime
    user_id: str
    session_id: str
    product_id: str
    product_category: str
    device_type: str
    event_type: str
    price: Decimal
    page_url: str


class Number(str):
    """A number of JSON as it is written."""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _last_counts(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members. Of prices the last number or null counts, and null after another is no missing price."""
    found: dict[str, Any] = {}
    for name, value in members:
        before = found.get(name)
        if name != "price" or before is None or isinstance(value, Number):
            found[name] = value
        elif value is None:
            found[name] = "null"
        elif not isinstance(before, Number):
            found[name] = value
    return found


_JSON = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=_refuse, object_pairs_hook=_last_counts)


def _object(text: str) -> dict[str, Any] | None:
    """The one JSON object that the text is."""
    try:
        found = _JSON.decode(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_text(value: Any) -> bool:
    return type(value) is str


def _micros(text: str) -> int | None:
    """A moment with a zone, in microseconds since 1970."""
    match = ISO.fullmatch(text)
    if not match:
        return None
    year, rest, sign, hours, minutes = match.groups()
    # The year 0 has the days of the year 400, and datetime begins with the year 1.
    days = 146_097 if year == "0000" else 0
    try:
        local = datetime.fromisoformat(("0400" if days else year) + rest)
    except ValueError:
        return None
    ahead = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    if ahead > timedelta(hours=18) or int(minutes or 0) > 59:
        return None
    past = local - EPOCH - timedelta(days=days)
    return (past + ahead if sign == "-" else past - ahead) // timedelta(microseconds=1)


def judge(
    value: bytes | None, timestamp: int, ingested_at: int, ruleset: int = 1
) -> tuple[frozenset[str], Event | None]:
    """The codes of all rules that a record fails; when there are none, its event. Times as a Record's."""
    if value is None:
        return frozenset({"tombstone"}), None
    codes: set[str] = set()
    try:
        text = value.decode()
    except UnicodeDecodeError:
        codes.add("not_utf8")
        text = value.decode(errors="replace")
    if not text.strip(" \t\n\r"):
        return frozenset({"empty_value"}), None
    found = _object(text)
    if found is None:
        return frozenset({*codes, "not_json_object"}), None
    known = {name: found[name] for name in FIELDS if found.get(name) is not None}
    codes |= {f"{name}_missing" for name in FIELDS if name not in known}
    wrong = {name for name, value in known.items() if not _is_text(value)}

    for name, pattern in IDS.items():
        if name in known and (name in wrong or not pattern.fullmatch(known[name])):
            codes.add(f"{name}_format")
    if known.get("event_type", "view") not in ("view", "add_to_cart", "purchase"):
        codes.add("event_type_unknown")
    if known.get("product_category", "Home") not in CATEGORIES:
        codes.add("category_unknown")
    device = known.get("device_type", "mobile")
    if ruleset == 1 and device not in ("mobile", "desktop", "tablet"):
        codes.add("device_unknown")
    if ruleset == 2 and (
        not _is_text(device) or not re.fullmatch("[a-z]{2,20}", device) or device in ("true", "false")
    ):
        codes.add("device_format")
    if {"page_url", "product_id"} <= known.keys():
        # A number has a page, too.
        product = known["product_id"]
        if not isinstance(product, str) or known["page_url"] != f"/product/{product}":
            codes.add("page_url_mismatch")

    price = 0.0
    if isinstance(known.get("price"), Number):
        price = float(known["price"])
        if price <= 0:
            codes.add("price_not_positive")
        elif price >= 10**10 or float(f"{price:.2f}") != price:
            codes.add("price_not_exact")
        if ruleset == 2 and price > 100_000:
            codes.add("price_implausible")
    elif "price" in known:
        codes.add("price_not_number")

    at = 0
    if "timestamp" in known:
        moment = None if "timestamp" in wrong else _micros(known["timestamp"])
        # A record without a time at Kafka has -1 there.
        reference = min(timestamp, ingested_at) if timestamp > 0 else ingested_at
        if moment is None:
            codes.add("timestamp_format")
        elif moment > reference + MAX_SKEW:
            codes.add("timestamp_future")
        elif moment < reference - MAX_AGE:
            codes.add("timestamp_too_old")
        at = moment or 0
    if codes:
        return frozenset(codes), None
    values = {name: known[name] for name in Event._fields if name in known and name != "price"}
    return frozenset(), Event(**values, event_time=EPOCH + timedelta(microseconds=at), price=Decimal(f"{price:.2f}"))


class Verdict(NamedTuple):
    """Where a record belongs: `event`, or a reject's disposition; an invalid one's codes, and any other's event."""

    place: str
    codes: frozenset[str]
    event: Event | None


def verdicts(
    records: Iterable[Record], ruleset: int = 1, survivors: Collection[Position] = ()
) -> dict[Position, Verdict]:
    """Where each record of a topic belongs. Of the first records that partitions have of one id, one among the
    survivors is the event; without one there, the earliest at Kafka."""
    result: dict[Position, Verdict] = {}
    valid: dict[str, list[tuple[Record, Event]]] = defaultdict(list)
    for record in records:
        assert record.position not in result, f"{record.position} is there twice"
        codes, event = judge(record.value, record.timestamp, record.ingested_at, ruleset)
        result[record.position] = Verdict("invalid", codes, event)
        if event:
            valid[event.event_id].append((record, event))
    for same_id in valid.values():
        same_id.sort(key=lambda of: of[0].position)
        firsts: dict[int, tuple[Record, Event]] = {}
        for record, event in same_id:
            firsts.setdefault(record.partition, (record, event))
        first, kept = min(
            firsts.values(), key=lambda of: (of[0].position not in survivors, of[0].timestamp, of[0].partition)
        )
        for record, event in same_id:
            place = "event" if record is first else "duplicate" if event == kept else "conflicting_duplicate"
            result[record.position] = Verdict(place, frozenset(), event)
    return result


def events(judged: Mapping[Position, Verdict]) -> list[Event]:
    """The events that count."""
    return [verdict.event for verdict in judged.values() if verdict.place == "event" and verdict.event]


COLUMNS = {
    "event_id": "STRING",
    "event_time": "TIMESTAMP",
    "user_id": "STRING",
    "session_id": "STRING",
    "product_id": "STRING",
    "product_category": "STRING",
    "device_type": "STRING",
    "event_type": "STRING",
    "price": "DECIMAL(12,2)",
}


def load(database: DuckDBPyConnection, rows: Iterable[tuple[Any, ...]]) -> None:
    """Makes the table `event` that ORACLES ask; a row begins with COLUMNS."""
    columns = ", ".join(f"(row ->> {n})::{kind} AS {name}" for n, (name, kind) in enumerate(COLUMNS.items()))
    # As one list: row by row, or column by column, hundreds of thousands take minutes.
    lines = [json.dumps(row[: len(COLUMNS)], default=str) for row in rows]
    database.execute(f"CREATE TABLE event AS SELECT {columns} FROM (SELECT unnest(?::VARCHAR[])::JSON AS row)", [lines])


def gold(database: DuckDBPyConnection, name: str) -> list[tuple[Any, ...]]:
    """The rows of a Gold table, without its date."""
    return database.execute(ORACLES[name]).fetchall()


COUNTS = """
    count(*) FILTER (event_type = 'view'), count(*) FILTER (event_type = 'add_to_cart'),
    count(*) FILTER (event_type = 'purchase'),
    coalesce(sum(price) FILTER (event_type = 'purchase'), 0)::DECIMAL(22, 2)"""


def _funnel(unit: str) -> str:
    return f"""
        SELECT date_trunc('{unit}', event_time), date_trunc('{unit}', event_time) + INTERVAL 1 {unit}, product_id,
               last(product_category ORDER BY event_time, product_category), {COUNTS},
               count(DISTINCT user_id), count(DISTINCT session_id), max(event_time)
        FROM event GROUP BY 1, 2, 3"""


# A row is the table's, without its date.
ORACLES = {
    "gold.product_funnel_1m": _funnel("minute"),
    "gold.product_funnel_1h": _funnel("hour"),
    "gold.conversion_1h": f"""
        WITH by_value AS (
            SELECT *, 'category' AS dimension, product_category AS value FROM event
            UNION ALL SELECT *, 'device', device_type FROM event),
        hours AS (
            SELECT *, date_trunc('hour', event_time) AS hour, user_id || '/' || session_id AS session FROM by_value),
        bought AS (
            SELECT DISTINCT hour, dimension, value, session, true AS bought FROM hours WHERE event_type = 'purchase')
        SELECT hour, hour + INTERVAL 1 HOUR, dimension, value, {COUNTS},
               count(DISTINCT session) FILTER (event_type = 'view') AS seen,
               count(DISTINCT session) FILTER (event_type = 'view' AND bought) AS converted,
               count(*) FILTER (event_type = 'purchase') / nullif(count(*) FILTER (event_type = 'view'), 0),
               converted / nullif(seen, 0)
        FROM hours LEFT JOIN bought USING (hour, dimension, value, session) GROUP BY 1, 2, 3, 4""",
    # Without numbering: an event begins a visit when there is none before it for half an hour, and belongs to the
    # visit that began last.
    "gold.sessions": f"""
        WITH visit AS (
            SELECT user_id, session_id, event_time AS start FROM event e WHERE NOT EXISTS (
                SELECT 1 FROM event b WHERE b.user_id = e.user_id AND b.session_id = e.session_id
                AND b.event_time > e.event_time - INTERVAL 30 MINUTE
                AND (b.event_time < e.event_time OR b.event_time = e.event_time AND b.event_id < e.event_id)))
        SELECT start, max(event_time), e.user_id, e.session_id, first(device_type ORDER BY event_time, event_id),
               count(*), {COUNTS},
               CASE max(CASE event_type WHEN 'purchase' THEN 3 WHEN 'add_to_cart' THEN 2 ELSE 1 END)
                    WHEN 3 THEN 'purchase' WHEN 2 THEN 'cart' ELSE 'view' END,
               (epoch_us(max(event_time)) - epoch_us(start)) / 1000000,
               first(product_id ORDER BY event_time, event_id), last(product_id ORDER BY event_time, event_id)
        FROM event e ASOF JOIN visit v
             ON e.user_id = v.user_id AND e.session_id = v.session_id AND e.event_time >= v.start
        WHERE event_time < start + INTERVAL 24 HOUR GROUP BY start, e.user_id, e.session_id""",
}
