"""Recorded events again: our own as JSON lines, and two public data sets in their published CSV columns.

RetailRocket (kaggle.com/datasets/retailrocket/ecommerce-dataset, events.csv): timestamp (ms), visitorid, event
(view, addtocart, transaction), itemid, transactionid. REES46 (kaggle.com/datasets/mkechinov/
ecommerce-behavior-data-from-multi-category-store): event_time ('2019-11-01 00:00:00 UTC'), event_type (view, cart,
remove_from_cart, purchase), product_id, category_id, category_code, brand, price, user_id, user_session.

What a data set does not say follows from what it does, always alike:
- category: by the first part of category_code; else by a checksum of category_id, or of the product.
- price: when missing or 0, a price in the category's range by a checksum of the product.
- session: a digest of user_session, or of the visitor and the start of a visit without a gap of half an hour.
- device: by a checksum of the session.
- event id: a digest of the format and the file's name, and the row; so a row sent twice has the same id.

Time goes on by the file's own steps and never back: a row before the latest one is due at once, and with that one's
time unless the times are kept. A row more than MAX_LEAP_SECONDS after the latest is refused as a wrong clock's; when
the next one agrees with it, time goes on from there and the leap itself takes none. So a row's time follows from the
file, the speed and the start alone, and with the start in the state a row that is sent again has the same bytes.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import os
import time
import zlib
from collections import Counter
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import IO, TYPE_CHECKING, Final, cast

import orjson

from clickstream import catalogue
from clickstream.event import FIELDS, SESSION_GAP_SECONDS, Event, iso_millis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

COLUMNS: Final = {
    "retailrocket": ("timestamp", "visitorid", "event", "itemid", "transactionid"),
    "rees46": (
        *("event_time", "event_type", "product_id", "category_id", "category_code", "brand", "price"),
        *("user_id", "user_session"),
    ),
}
FORMATS: Final = ("events", *COLUMNS)
TYPES: Final = {"addtocart": "add_to_cart", "transaction": "purchase", "cart": "add_to_cart"} | {
    name: name for name in catalogue.EVENT_TYPES
}
SKIPPED: Final = frozenset({"remove_from_cart"})
CATEGORIES: Final = {
    "electronics": "Electronics",
    "computers": "Electronics",
    "apparel": "Clothing",
    "accessories": "Clothing",
    "appliances": "Home",
    "furniture": "Home",
    "construction": "Home",
    "country_yard": "Home",
    "sport": "Sports",
    "stationery": "Books",
    "medicine": "Beauty",
    "kids": "Toys",
}
MAX_LEAP_SECONDS: Final = 7 * 24 * 3600.0
HEAD_BYTES = 64 * 1024  # by these, its name and its size a state knows its file
NAMED = 5  # rows that cannot be mapped are named up to here, then counted
SAVE_SECONDS = 1.0


class ReplayError(Exception):
    """The file cannot be read on, or the position not be saved."""


class SkipError(Exception):
    """An event of a type that has no counterpart here."""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _pick(names: tuple[str, ...], text: str) -> str:
    return names[zlib.crc32(text.encode()) % len(names)]


def _id(prefix: str, text: str) -> str:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ValueError(f"{text!r} is not an id of 1 to 20 digits")
    return f"{prefix}_{text.zfill(4)}"


def _price(text: str, product: str, category: str) -> float:
    try:
        price = Decimal(text or 0).quantize(Decimal("0.01"), ROUND_HALF_UP)
    except InvalidOperation:
        raise ValueError(f"price {text!r} is no number") from None
    if not 0 <= price < 10**10:
        raise ValueError(f"price {text!r} is not from 0 to below 10^10")
    if price == 0:
        low, high = catalogue.CATEGORIES[category][:2]
        price = Decimal(low + zlib.crc32(product.encode()) % (high - low)) + Decimal("0.99")
    return float(price)


def _type(name: str) -> str:
    if name in SKIPPED:
        raise SkipError(name)
    if name not in TYPES:
        raise ValueError(f"{name!r} is no type of event of this format")
    return TYPES[name]


def _event(
    number: str, moment: float, user: str, kind: str, product: str, category: str, price: str, session: int
) -> Event:
    session_id = f"session_{session:04d}"
    product_id = _id("prod", product)
    return {
        "event_id": number,
        "user_id": _id("user", user),
        "product_id": product_id,
        "event_type": kind,
        "timestamp": iso_millis(moment),
        "session_id": session_id,
        "product_category": category,
        "device_type": _pick(catalogue.DEVICE_TYPES, session_id),
        "page_url": f"/product/{product_id}",
        "price": _price(price, product, category),
    }


class Replay:
    """The events of a file, in its order, and how far they are settled: acknowledged, or refused for good."""

    def __init__(
        self,
        path: Path,
        form: str,
        *,
        first_id: int | None = None,
        speed: float = 1.0,
        keep_timestamps: bool = False,
        state: Path | None = None,
        dry_run: bool = False,
    ) -> None:
        self._path = path
        self._format = form
        # A row's number is its place in the file, with the header or without.
        self._first_id = _digest(f"{form} {path.name}") % 10**8 * 10**11 if first_id is None else first_id
        self._speed = speed
        self._keep_timestamps = keep_timestamps
        self._state = state
        self._dry_run = dry_run
        self._start: float | None = None  # Unix time of the first event, once there is one
        self._latest: float | None = None  # of the rows so far, in the file's time
        self._leapt = math.nan  # where the row before wanted to go
        self._elapsed = 0.0  # from the first row, in the file's time
        self._visits: dict[str, tuple[int, float]] = {}
        self._open: dict[int, tuple[int, Event]] = {}
        self._identity = self._identify() if state else {}
        self._row = self._resumed = self._position()
        self._saved = time.monotonic()
        self.current: Event = {}
        self.skipped: Counter[str] = Counter()
        self.unmapped = 0
        self.named: list[str] = []

    def _identify(self) -> dict[str, object]:
        """What has to be the same for a row to be the same."""
        with self._path.open("rb") as file:
            head = hashlib.blake2b(file.read(HEAD_BYTES), digest_size=16).hexdigest()
        return {
            "file": self._path.name,
            "size": self._path.stat().st_size,
            "head": head,
            "format": self._format,
            "first_id": self._first_id,
            "speed": self._speed,
            "keep_timestamps": self._keep_timestamps,
        }

    def _position(self) -> int:
        """The rows that another run has had acknowledged, and when it started."""
        if self._state is None or not self._state.exists():
            return 0
        try:
            state = orjson.loads(self._state.read_bytes())
            rows, start = int(state["rows"]), None if state["start"] is None else float(state["start"])
            other = {name: state[name] for name in self._identity if state[name] != self._identity[name]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--resume: {self._state} is not a replay's state; remove it to begin anew") from None
        if not other.keys().isdisjoint(("file", "size", "head")):
            raise ValueError(
                f"--resume: {self._state} is of another file, {state['file']} of {state['size']} bytes; "
                f"name another state for {self._path}"
            )
        if other:
            was = ", ".join(f"{name} {value}" for name, value in other.items())
            raise ValueError(
                f"--resume: {self._state} is of a run with {was}; run it alike, or remove it to begin anew"
            )
        self._start = start
        return rows

    def _opened(self) -> IO[bytes]:
        return cast("IO[bytes]", gzip.open(self._path)) if self._path.suffix == ".gz" else self._path.open("rb")

    def check(self) -> None:
        """ValueError, OSError or ReplayError when the file cannot be of the format, or the position not be saved."""
        with self._opened() as file:
            next(self._lines(file), None)
        self.save()

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, str] | bytes]]:
        """Line numbers and rows."""
        if self._format == "events":
            yield from enumerate(file, 1)
            return
        # A character that is none fails the row only where it is used.
        reader = csv.DictReader((line.decode(errors="surrogateescape") for line in file), restval="")
        missing = [name for name in COLUMNS[self._format] if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{self._path} has no column {', '.join(missing)}; is it --format {self._format}?")
        for row in reader:
            yield reader.line_num, row

    def _map(self, row: dict[str, str] | bytes, number: int) -> tuple[float, Event]:
        if isinstance(row, bytes):
            event = orjson.loads(row)
            if not isinstance(event, dict) or (missing := [name for name in FIELDS if name not in event]):
                raise ValueError(f"no event: it has no {', '.join(missing) if isinstance(event, dict) else 'fields'}")
            if not isinstance(event["user_id"], str):
                raise ValueError("user_id is not a text")
            if any(isinstance(value, dict | list) for value in event.values()):
                orjson.dumps(event)  # reads deeper than it writes
            moment = datetime.fromisoformat(event["timestamp"])
            if moment.tzinfo is None:
                raise ValueError(f"timestamp {event['timestamp']!r} has no zone")
            return moment.timestamp(), event
        event_id = f"evt_{number:08d}"
        if self._format == "retailrocket":
            millis, visitor, product = int(row["timestamp"]), row["visitorid"], row["itemid"]
            moment_ = millis / 1000
            kind = _type(row["event"])
            category = _pick(tuple(catalogue.CATEGORIES), product)
            last, start = self._visits.get(visitor, (millis, moment_))
            if abs(millis - last) >= SESSION_GAP_SECONDS * 1000:
                start = moment_
            event = _event(event_id, moment_, visitor, kind, product, category, "", _digest(f"{visitor} {start}"))
            self._visits[visitor] = (millis, start)
            return moment_, event
        kind = _type(row["event_type"])
        moment_ = datetime.strptime(row["event_time"], "%Y-%m-%d %H:%M:%S %Z").replace(tzinfo=UTC).timestamp()
        product = row["product_id"]
        category = CATEGORIES.get(row["category_code"].partition(".")[0]) or _pick(
            tuple(catalogue.CATEGORIES), row["category_id"] or product
        )
        session = _digest(row["user_session"] or row["user_id"])
        return moment_, _event(event_id, moment_, row["user_id"], kind, product, category, row["price"], session)

    def _pass(self, moment: float) -> None:
        """Lets time go on to a row's; ValueError when that is too far ahead."""
        if self._latest is None:
            self._latest = moment
        step = moment - self._latest
        if step > MAX_LEAP_SECONDS:
            agreed = abs(moment - self._leapt) <= MAX_LEAP_SECONDS
            self._leapt = moment
            if not agreed:
                raise ValueError(f"timestamp is {step / 86400:.0f} days after the latest before it")
            step = 0.0
            self._latest = moment
        self._leapt = math.nan
        self._latest = max(self._latest, moment)
        self._elapsed += max(0.0, step)

    def _numbered(self) -> Iterator[tuple[int, int, dict[str, str] | bytes]]:
        """Rows with their number and their line's; ReplayError where the file cannot be read on."""
        line = 0
        try:
            with self._opened() as file:
                for row, (line, fields) in enumerate(self._lines(file), 1):
                    yield row, line, fields
        except (OSError, EOFError, zlib.error, csv.Error) as error:
            raise ReplayError(f"{self._path} cannot be read after line {line}: {error}") from error

    def events(self) -> Iterator[tuple[float, Event]]:
        """Each row's seconds from the first one, and its event; what was acknowledged before is read and not given."""
        for row, line, fields in self._numbered():
            try:
                moment, event = self._map(fields, self._first_id + row - 1)
                self._pass(moment)
            except SkipError as skip:
                self.skipped[str(skip)] += 1
            except (ValueError, TypeError, OverflowError, OSError) as error:
                self.unmapped += 1
                if len(self.named) < NAMED:
                    self.named.append(f"{self._path}:{line}: {error}")
            else:
                if row > self._resumed:
                    if not self._dry_run:
                        self._open[id(event)] = (row, event)
                    self._row = row
                    yield self._elapsed, event
            self._row = max(self._row, row)

    def arrivals(self, at: Callable[[float], float]) -> Iterator[float]:
        """Seconds from the start at which the rows are due; `current` is the one that is.

        A row that gets a new time is due at that time: after a stall, or resumed, the run catches up.
        """
        first = None
        for elapsed, event in self.events():
            if self._start is None:
                self._start = at(0.0)
                self.save()  # before the first record can be sent
            first = elapsed if first is None else first
            due = (elapsed - first) / self._speed if self._speed else 0.0
            if not self._keep_timestamps:
                if self._speed:
                    moment = self._start + elapsed / self._speed
                    due = moment - at(0.0)
                else:
                    moment = self._start if self._state else time.time()
                event["timestamp"] = iso_millis(moment)
            self.current = event
            yield due
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()

    def settled(self, event: Event) -> None:
        self._open.pop(id(event), None)

    def save(self) -> None:
        """Moves the position past the rows of which all before are settled, whole or not at all."""
        self._saved = time.monotonic()
        if self._state is None or self._dry_run:
            return
        rows = next((row - 1 for row, _ in list(self._open.values())[:1]), self._row)
        new = self._state.with_name(self._state.name + ".new")
        state = self._identity | {"rows": rows, "start": self._start}
        try:
            with new.open("wb") as file:
                file.write(orjson.dumps(state, option=orjson.OPT_APPEND_NEWLINE))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._state)
        except OSError as error:
            raise ReplayError(f"--resume: {self._state} cannot be written: {error.strerror or error}") from error

    def report(self) -> list[str]:
        lines = [f"cannot be mapped: {text}" for text in self.named]
        if self.unmapped > len(self.named):
            lines.append(f"cannot be mapped: {self.unmapped} rows in all")
        return lines + [f"skipped: {count} rows of type {name}" for name, count in sorted(self.skipped.items())]
