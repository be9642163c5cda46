"""Live windows, kept up in the driver: what the events of an open window add up to, batch by batch.

A window's figures are sums, greatest values and sets over its events, so those of a batch can be added to what is known
of the window without reading the window again. What must not happen is to add an event twice: the table may show a
window's events before the stream brings them. So for each window and partition an offset is kept beyond which nothing
was added. An event beyond it is new, whatever order events come in; one that is not beyond it may have been added, and
the window is then taken up anew, whole, from the table. Nothing here is needed after a stop: it is a cache.

Sets are of hashes, 64 bits wide, so that a visitor takes 8 bytes. That two of a group's million have the same one, and
its live figure is one too low, has a probability of 3e-8; final figures are counted from the visitors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.sql import functions as F  # noqa: N812

from clickstream.lake import utc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime, timedelta

    from pyspark.sql import Column, DataFrame, Row

Partition = tuple[str, int]
# Values by the group's key.
Groups = Mapping[tuple[Any, ...], Mapping[str, Any]]
EMPTY = np.array([], dtype=np.int64)
# What a group takes beside its sets, in entries of 8 bytes.
GROUP_ENTRIES = 120


@dataclass(frozen=True)
class Shares:
    """How the figures of a window are made of those of parts of its events.

    `of` is given events and their window; each of its rows has `window_start`, the columns of `key`, which name a group
    (one group may have several rows), and those of `sums`, `greatest` and `sets`, which add up as their names say; sets
    are arrays of BIGINT. `figures` is given the groups of a window, with those sets as sorted arrays, and has its rows
    of the mart, without the window's bounds.
    """

    of: Callable[[DataFrame, Column], DataFrame]
    key: tuple[str, ...]
    sums: tuple[str, ...]
    greatest: tuple[str, ...]
    sets: tuple[str, ...]
    figures: Callable[[Groups], Iterator[dict[str, Any]]]

    def rows(self, events: DataFrame, window: Column) -> list[Row]:
        """The shares of these events."""
        return self.of(events, window.alias("window_start")).collect()


@dataclass(frozen=True)
class Touched:
    """What a batch has of a window; the least and the greatest offset by partition."""

    events: int
    newest: datetime
    first: dict[Partition, int]
    last: dict[Partition, int]


def touched(events: DataFrame, window: Column) -> dict[datetime, Touched]:
    """The windows of these events."""
    rows = (
        events.groupBy(window.alias("window_start"), "topic", "partition")
        .agg(
            F.count("*").alias("events"),
            F.max("event_time").alias("newest"),
            F.min("offset").alias("first"),
            F.max("offset").alias("last"),
        )
        .collect()
    )
    found: dict[datetime, Touched] = {}
    for row in rows:
        start, newest = utc(row["window_start"]), utc(row["newest"])
        other = found.get(start) or Touched(0, newest, {}, {})
        partition = row["topic"], row["partition"]
        found[start] = Touched(
            other.events + row["events"],
            max(other.newest, newest),
            other.first | {partition: row["first"]},
            other.last | {partition: row["last"]},
        )
    return found


def up_to(events: DataFrame, last: Mapping[Partition, int]) -> DataFrame:
    """These events up to the greatest offset of each partition, without those of other partitions."""
    known = F.lit(False)
    for (topic, partition), offset in last.items():
        known |= (F.col("topic") == topic) & (F.col("partition") == partition) & (F.col("offset") <= offset)
    return events.where(known)


@dataclass
class _Window:
    """Values by group, and by partition the offset beyond which no event is in them."""

    groups: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    last: dict[Partition, int] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        sets = (v for values in self.groups.values() for v in values.values() if isinstance(v, np.ndarray))
        return len(self.groups) * GROUP_ENTRIES + sum(map(len, sets))


class LiveWindows:
    """The windows of a table that are followed, in at most so many entries of 8 bytes: those of their sets, and
    GROUP_ENTRIES for each group.

    `until` is the last window of which the table may have events that no batch of this process brought.
    """

    def __init__(self, shares: Shares, length: timedelta, limit: int, until: datetime | None) -> None:
        self._shares, self._length, self._limit, self._until = shares, length, limit, until
        self._windows: dict[datetime, _Window] = {}

    def follows(self, start: datetime, batch: Touched) -> bool:
        """Whether what the batch has of a window is all new, and what came before it is known here."""
        window = self._windows.get(start)
        if window is None:
            return self._until is None or start > self._until
        return all(offset > window.last.get(partition, -1) for partition, offset in batch.first.items())

    def add(self, last: Mapping[datetime, Mapping[Partition, int]], rows: Iterable[Row]) -> None:
        """Adds shares to their windows; by window, the offsets beyond which no event is in these shares."""
        shares = self._shares
        for start, offsets in last.items():
            window = self._windows.setdefault(start, _Window())
            for partition, offset in offsets.items():
                window.last[partition] = max(offset, window.last.get(partition, -1))
        for row in rows:
            window = self._windows[utc(row["window_start"])]
            values = window.groups.setdefault(tuple(row[name] for name in shares.key), {})
            for name in shares.sums:
                values[name] = values[name] + row[name] if name in values else row[name]
            for name in shares.greatest:
                values[name] = max(values[name], row[name]) if name in values else row[name]
            for name in shares.sets:
                values[name] = np.union1d(values.get(name, EMPTY), np.array(row[name], dtype=np.int64))

    def rows(self, start: datetime) -> list[dict[str, Any]]:
        """A followed window's figures, by column of the mart; none of a window without events."""
        bounds = {"window_start": start, "window_end": start + self._length}
        window = self._windows.get(start, _Window())
        return [bounds | row for row in self._shares.figures(window.groups)]

    def forget(self, start: datetime) -> None:
        """Follows a window no longer: should it be touched again, it is not new."""
        self._windows.pop(start, None)
        self._until = max(self._until or start, start)

    def trim(self) -> set[datetime]:
        """Forgets the oldest windows until the others fit; which of the forgotten do not fit by themselves either."""
        entries = {start: window.entries for start, window in self._windows.items()}
        large = {start for start, count in entries.items() if count > self._limit}
        for start in sorted(entries):
            if sum(entries.values()) <= self._limit:
                break
            del entries[start]
            self.forget(start)
        return large
