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
"""

from __future__ import annotations

import csv
import gzip
import hashlib
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
NAMED = 5  # rows that cannot be mapped are named up to here, then counted
SAVE_SECONDS = 1.0


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
    """The events of a file, in its order, and how far they are acknowledged."""

    def __init__(self, path: Path, form: str, *, first_id: int | None = None, state: Path | None = None) -> None:
        self._path = path
        self._format = form
        # A row's number is its place in the file, with the header or without.
        self._first_id = _digest(f"{form} {path.name}") % 10**8 * 10**11 if first_id is None else first_id
        self._state = state
        self._visits: dict[str, tuple[int, float]] = {}
        self._open: dict[int, tuple[int, Event]] = {}
        self._row = self._resumed = self._position()
        self._saved = time.monotonic()
        self.current: Event = {}
        self.skipped: Counter[str] = Counter()
        self.unmapped = 0
        self.named: list[str] = []

    def _position(self) -> int:
        """The rows that another run has had acknowledged."""
        if self._state is None or not self._state.exists():
            return 0
        try:
            state = orjson.loads(self._state.read_bytes())
            file, rows = state["file"], int(state["rows"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--resume: {self._state} is not a replay's state; remove it to begin anew") from None
        if file != self._path.name:
            raise ValueError(f"--resume: {self._state} is of {file}; name another one for {self._path.name}")
        return rows

    def _opened(self) -> IO[bytes]:
        return cast("IO[bytes]", gzip.open(self._path)) if self._path.suffix == ".gz" else self._path.open("rb")

    def check(self) -> None:
        """ValueError or OSError when the file cannot be of the format."""
        with self._opened() as file:
            next(self._lines(file), None)

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, str] | bytes]]:
        """Line numbers and rows."""
        if self._format == "events":
            yield from enumerate(file, 1)
            return
        reader = csv.DictReader((line.decode(errors="replace") for line in file), restval="")
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

    def events(self) -> Iterator[tuple[float, Event]]:
        """Each row's time in the file and its event; those that were acknowledged before are read and not given."""
        with self._opened() as file:
            for row, (line, fields) in enumerate(self._lines(file), 1):
                try:
                    moment, event = self._map(fields, self._first_id + row - 1)
                except SkipError as skip:
                    self.skipped[str(skip)] += 1
                except (ValueError, TypeError, OverflowError) as error:
                    self.unmapped += 1
                    if len(self.named) < NAMED:
                        self.named.append(f"{self._path}:{line}: {error}")
                else:
                    if row > self._resumed:
                        self._open[id(event)] = (row, event)
                        self._row = row
                        yield moment, event
                self._row = max(self._row, row)

    def arrivals(self, at: Callable[[float], float], speed: float, keep_timestamps: bool) -> Iterator[float]:
        """Seconds from the start at which the rows are due; `current` is the one that is."""
        first = None
        latest = 0.0
        for moment, event in self.events():
            first = moment if first is None else first
            due = (moment - first) / speed if speed else 0.0
            latest = max(latest, due)  # a time that goes back does not wait
            if not keep_timestamps:
                event["timestamp"] = iso_millis(at(due) if speed else time.time())
            self.current = event
            yield latest
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()

    def settled(self, event: Event) -> None:
        self._open.pop(id(event), None)

    def save(self) -> None:
        """Moves the position past the rows of which all before are acknowledged, whole or not at all."""
        self._saved = time.monotonic()
        if self._state is None:
            return
        rows = next((row - 1 for row, _ in list(self._open.values())[:1]), self._row)
        new = self._state.with_name(self._state.name + ".new")
        with new.open("wb") as file:
            file.write(orjson.dumps({"file": self._path.name, "rows": rows}, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._state)

    def report(self) -> list[str]:
        lines = [f"cannot be mapped: {text}" for text in self.named]
        if self.unmapped > len(self.named):
            lines.append(f"cannot be mapped: {self.unmapped} rows in all")
        return lines + [f"skipped: {count} rows of type {name}" for name, count in sorted(self.skipped.items())]
