"""Records that are wrong on purpose, at given rates, and the truth about each record.

A wrapper around the shop: what it yields goes to Kafka as it is, and its truth says what Silver must make of it. So
what Silver keeps and refuses can be measured against what was sent, position by position.

  event       as the shop made it                                     -> event
  duplicate   an earlier event again, byte for byte                   -> duplicate
  conflicting an earlier event's id and key with other content        -> conflicting_duplicate
  late        valid, but older than the watermark                     -> late
  future      valid, but further ahead than the allowed skew          -> invalid
  malformed   each form of wrong record in turn                       -> invalid

Of an event and its repetition Silver keeps the one with the lower offset: both have one key, and so are in one
partition. An event is repeated at most once. The truth assumes that the broker took every record, in the order in which
they were sent: a run that reports failures measures nothing. It also assumes that the ids are new: a second run with
the same --seed against the same lake needs a --first-id of its own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
from collections import deque
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from clickstream import catalogue
from clickstream.event import FIELDS
from clickstream.settings import PREFIX, Settings, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from clickstream.event import Event

KINDS = ("duplicate", "conflicting", "late", "future", "malformed")
LATE_BY_SECONDS = 30 * 60.0
# How far a `future` timestamp is beyond the allowed skew: more than a broker's clock may differ from ours.
MARGIN_SECONDS = 60 * 60.0
# The events that may still be repeated.
REMEMBERED = 1_000


class Truth(NamedTuple):
    """What a record is and what Silver must make of it; `code` is the rule an invalid one fails."""

    kind: str
    event_id: str
    expect: str
    code: str | None = None


class Record(NamedTuple):
    """What Kafka gets, and the event it was made from."""

    key: bytes
    value: bytes | None
    event: Event
    truth: Truth


def record(event: Event, kind: str = "event", expect: str = "event", code: str | None = None) -> Record:
    key, value = event["user_id"].encode(), orjson.dumps(event)
    return Record(key, value, event, Truth(kind, event["event_id"], expect, code))


def plain(events: Iterator[Event]) -> Iterator[Record]:
    return map(record, events)


def _with(**changes: Any) -> Callable[[Event], bytes]:
    return lambda event: orjson.dumps(event | changes)


def _without(field: str) -> Callable[[Event], bytes]:
    return lambda event: orjson.dumps({key: value for key, value in event.items() if key != field})


def _cut(event: Event) -> bytes:
    value = orjson.dumps(event)
    return value[: len(value) // 2]


def _broken_character(event: Event) -> bytes:
    return orjson.dumps(event).replace(b'"device_type":"', b'"device_type":"\xff')


# (the rule's code, the record's value). Between them and `future` every rule of version 1
# is failed, by which the truth is told; most records fail one only.
MALFORMED: tuple[tuple[str, Callable[[Event], bytes | None]], ...] = (
    ("tombstone", lambda _: None),
    ("empty_value", lambda _: b""),
    ("empty_value", lambda _: b" \t\r\n"),
    ("not_utf8", _broken_character),
    ("not_json_object", lambda _: b"not JSON"),
    ("not_json_object", _cut),
    ("not_json_object", lambda event: orjson.dumps([event])),
    ("not_json_object", lambda event: orjson.dumps(event) * 2),
    *((f"{field}_missing", _without(field)) for field in FIELDS),
    ("price_missing", _with(price=None)),
    ("event_id_format", _with(event_id=1)),
    ("user_id_format", _with(user_id="nobody")),
    ("product_id_format", _with(product_id="42", page_url="/product/42")),
    ("session_id_format", _with(session_id="")),
    ("event_type_unknown", _with(event_type="click")),
    ("category_unknown", _with(product_category="Weapons")),
    ("device_unknown", _with(device_type="fridge")),
    ("page_url_mismatch", lambda event: orjson.dumps(event | {"page_url": event["page_url"] + "0"})),
    ("price_not_number", lambda event: orjson.dumps(event | {"price": str(event["price"])})),
    ("price_not_positive", lambda event: orjson.dumps(event | {"price": -event["price"]})),
    ("price_not_exact", lambda event: orjson.dumps(event | {"price": round(event["price"] + 0.001, 3)})),
    ("timestamp_format", _with(timestamp=1764419696789)),
    ("timestamp_too_old", _with(timestamp="1970-01-01T00:00:00.000Z")),
)


def limit(name: str) -> float:
    """Seconds of a limit of the streams, which the environment may set for them and us."""
    variable = PREFIX + name.upper()
    try:
        return seconds(os.environ.get(variable) or getattr(Settings, name))
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None


def moved(event: Event, by: float) -> Event:
    moment = datetime.fromisoformat(event["timestamp"]) + timedelta(seconds=by)
    return event | {"timestamp": f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"}


class Faults:
    """An endless iterator of records; with a seed, the same faults at the same places."""

    def __init__(
        self,
        events: Iterator[Event],
        rates: Mapping[str, float],
        *,
        seed: int | None = None,
        late_by: float = LATE_BY_SECONDS,
    ) -> None:
        self._events = events
        # One of its own: the shop makes the same events with and without faults.
        self._rng = random.Random(None if seed is None else f"faults {seed}")
        self._kinds = [*KINDS, "event"]
        self._weights = [*(rates.get(kind, 0.0) for kind in KINDS), max(0.0, 1.0 - sum(rates.values()))]
        self._late_by = late_by
        self._ahead_by = limit("max_clock_skew") + MARGIN_SECONDS
        self._memory: deque[Event] = deque(maxlen=REMEMBERED)
        self._malformed = itertools.cycle(MALFORMED)

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        kind = self._rng.choices(self._kinds, self._weights)[0]
        if kind in ("duplicate", "conflicting") and self._memory:
            return self._repeat(kind)
        event = next(self._events)
        if kind == "late":
            return record(moved(event, -self._late_by), kind, "late")
        if kind == "future":
            return record(moved(event, self._ahead_by), kind, "invalid", "timestamp_future")
        if kind == "malformed":
            code, value = next(self._malformed)
            return record(event, kind, "invalid", code)._replace(value=value(event))
        self._memory.append(event)
        return record(event)

    def _repeat(self, kind: str) -> Record:
        place = self._rng.randrange(len(self._memory))
        event = self._memory[place]
        del self._memory[place]
        if kind == "duplicate":
            return record(event, kind, "duplicate")
        if self._rng.random() < 0.5:
            change: Event = {"price": round(event["price"] + 1, 2)}
        else:
            others = [name for name in catalogue.EVENT_TYPES if name != event["event_type"]]
            change = {"event_type": self._rng.choice(others)}
        return record(event | change, kind, "conflicting_duplicate")


def parse_rates(text: str) -> dict[str, float]:
    """The rates in `late=0.01,malformed=0.02`; `all=0.05` is spread evenly over all kinds."""
    rates: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in (*KINDS, "all"):
            raise argparse.ArgumentTypeError(f"{name!r} is no fault; choose from all, {', '.join(KINDS)}")
        if name in rates:
            raise argparse.ArgumentTypeError(f"{name} is given twice; give it once")
        try:
            rates[name] = float(number)
        except ValueError:
            rates[name] = math.nan
        if not 0 <= rates[name] <= 1:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} has no rate from 0 to 1; write for example {name}=0.01")
    if "all" in rates:
        if len(rates) > 1:
            raise argparse.ArgumentTypeError("all stands alone; leave it out, or the other names")
        rates = dict.fromkeys(KINDS, rates["all"] / len(KINDS))
    total, repeated = math.fsum(rates.values()), rates.get("duplicate", 0.0) + rates.get("conflicting", 0.0)
    if total > 1 + 1e-9:
        raise argparse.ArgumentTypeError(f"the rates add up to {total:g}; lower them to 1 or less together")
    if repeated > 1 - total + 1e-9:
        raise argparse.ArgumentTypeError(
            f"only {1 - total:g} of the records are events to repeat; lower duplicate and conflicting to that together"
        )
    return rates


def check_late_by(value: float) -> None:
    """ValueError when an event so much later would not be late, or be refused as too old."""
    least, most = limit("watermark"), limit("max_event_age")
    if not least < value < most:
        raise ValueError(f"{value:g} is not above the watermark's {least:g} and below the age limit's {most:g} seconds")


def readable(record: Record) -> dict[str, str | None]:
    """A record for people: its truth, its key, and its value as text."""
    value = None if record.value is None else record.value.decode(errors="backslashreplace")
    return record.truth._asdict() | {"key": record.key.decode(), "value": value}


class TruthFile:
    """One JSON line for each acknowledged record: its place in Kafka and its truth."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")  # never over the truth of another run
        self.error: OSError | None = None

    def write(self, topic: str, partition: int, offset: int, truth: Truth) -> None:
        """Keeps the first error for the end: the client's thread that calls this has nobody to tell."""
        line = {"topic": topic, "partition": partition, "offset": offset} | truth._asdict()
        self._attempt(lambda: self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)))

    def close(self) -> None:
        self._attempt(self._file.close)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.error = self.error or error
