"""Writing to the Postgres marts: whole windows replaced in one transaction, retried while Postgres restarts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

log = logging.getLogger("clickstream")

T = TypeVar("T")

RETRY_SECONDS = 60.0
# How many differing keys are named.
NAMED = 5


@dataclass(frozen=True)
class Mart:
    """A mart table that is replaced window by window or by a range of time; `ddl` creates schema-less objects
    idempotently."""

    schema: str
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    ddl: tuple[str, ...]
    # The column that says when; a part of the key.
    time: str = "window_start"

    @property
    def table(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


# Every time that PostgreSQL and Python can both tell.
EVER = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


@dataclass(frozen=True)
class Part:
    """A mart and what its rows shall be from `start` to before `end`; the rows are asked for at each try."""

    mart: Mart
    rows: Callable[[], Iterable[Sequence[Any]]]
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Difference:
    """What is served against what was computed: rows only computed, only served, in both with other figures; and the
    first keys of all of these."""

    missing: int
    surplus: int
    differing: int
    keys: list[tuple[Any, ...]]

    @property
    def any(self) -> bool:
        return bool(self.missing or self.surplus or self.differing)


class MartWriter:
    """One connection, opened when needed and reopened when it broke."""

    def __init__(self, dsn: str, *, application_name: str = "clickstream-gold") -> None:
        self._dsn = dsn
        self._application_name = application_name
        self._connection: psycopg.Connection[Any] | None = None

    def _connect(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self._dsn, application_name=self._application_name, connect_timeout=10)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def transact(self, work: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Runs idempotent work in a transaction, again while the server is away; other errors are raised."""
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                connection = self._connect()
                with connection.transaction():
                    return work(connection)
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                self.close()
                if time.monotonic() > deadline:
                    raise
                log.warning("PostgreSQL is away, trying again: %s", str(error).strip())
                time.sleep(1.0)

    def ensure(self, mart: Mart) -> None:
        """Creates the schema and the mart where they are missing; needs no privilege where they exist."""
        self.create(mart.schema, [sql.SQL(statement).format(table=mart.table) for statement in mart.ddl])

    def create(self, schema: str, statements: Sequence[sql.SQL | sql.Composed]) -> None:
        """Creates a schema where it is missing, then runs idempotent statements."""

        def work(connection: psycopg.Connection[Any]) -> None:
            # Applications may start together, and CREATE IF NOT EXISTS is not safe against that.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext('clickstream.ddl'))")
            row = connection.execute("SELECT to_regnamespace(%s)", (schema,)).fetchone()
            if row is None or row[0] is None:
                connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
            for statement in statements:
                connection.execute(statement)

        self.transact(work)

    def windows(self, mart: Mart, *, final: bool, since: datetime | None = None) -> set[datetime]:
        def work(connection: psycopg.Connection[Any]) -> set[datetime]:
            query = sql.SQL(
                "SELECT DISTINCT window_start FROM {} WHERE is_final = %s AND window_start >= "
                "coalesce(%s::timestamptz, '-infinity')"
            ).format(mart.table)
            return {row[0] for row in connection.execute(query, (final, since))}

        return self.transact(work)

    def replace_windows(self, mart: Mart, windows: Sequence[datetime], rows: Iterable[Sequence[Any]]) -> None:
        """Makes the mart hold exactly `rows` for `windows`; rows that are the same already are not touched."""
        rows = list(rows)

        def work(connection: psycopg.Connection[Any]) -> None:
            _load(connection, mart, rows)
            _swap(connection, mart, sql.SQL("{time} = ANY(%s)"), (list(windows),))

        self.transact(work)

    def kept_since(self, mart: Mart, days: int) -> datetime | None:
        """The start of the day that is so many days before the mart's newest row; None while it has no row.

        By its rows and not by the clock: events that are replayed from a file are not past their time on arrival.
        """
        query = sql.SQL(
            "SELECT date_trunc('day', max({time}), 'UTC') - make_interval(hours => 24 * %s) FROM {table}"
        ).format(time=sql.Identifier(mart.time), table=mart.table)

        def work(connection: psycopg.Connection[Any]) -> datetime | None:
            row = connection.execute(query, (days,)).fetchone()
            return row[0] if row else None

        return self.transact(work)

    def expire(self, mart: Mart, days: int) -> int:
        """Removes the rows before `kept_since`; how many there were."""
        since = self.kept_since(mart, days)
        if since is None:
            return 0
        query = sql.SQL("DELETE FROM {table} WHERE {time} < %s").format(
            time=sql.Identifier(mart.time), table=mart.table
        )
        return self.transact(lambda connection: connection.execute(query, (since,)).rowcount)

    def reconcile(self, parts: Sequence[Part], *, swap: bool) -> list[Difference]:
        """How each mart differs from its part's rows; with `swap` it then holds exactly them.

        All in one transaction. A row that only was not final is no difference.
        """

        def work(connection: psycopg.Connection[Any]) -> list[Difference]:
            found = []
            for part in parts:
                _load(connection, part.mart, part.rows())
                found.append(_differences(connection, part.mart, part.start, part.end))
                if swap:
                    _swap(connection, part.mart, sql.SQL("{time} >= %s AND {time} < %s"), (part.start, part.end))
                connection.execute("DROP TABLE incoming")
            return found

        return self.transact(work)


def _columns(names: Iterable[str], prefix: str = "") -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL(prefix + "{}").format(sql.Identifier(name)) for name in names)


def _load(connection: psycopg.Connection[Any], mart: Mart, rows: Iterable[Sequence[Any]]) -> None:
    """Puts rows into the temporary table `incoming`."""
    names = {"table": mart.table, "columns": _columns(mart.columns)}
    connection.execute(
        sql.SQL("CREATE TEMP TABLE incoming ON COMMIT DROP AS SELECT {columns} FROM {table} LIMIT 0").format(**names)
    )
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("COPY incoming ({columns}) FROM STDIN").format(**names)) as copy,
    ):
        for row in rows:
            copy.write_row(row)


def _swap(connection: psycopg.Connection[Any], mart: Mart, scope: sql.SQL, values: Sequence[Any]) -> None:
    """Makes the mart hold exactly the rows of `incoming` where `scope` is true."""
    names = {
        "table": mart.table,
        "columns": _columns(mart.columns),
        "key": _columns(mart.key),
        "scope": scope.format(time=sql.Identifier(mart.time)),
        "set": sql.SQL(", ").join(
            sql.SQL("{0} = excluded.{0}").format(sql.Identifier(c)) for c in mart.columns if c not in mart.key
        ),
        "old": _columns(mart.columns, "old."),
        "new": _columns(mart.columns, "excluded."),
        "same": sql.SQL(" AND ").join(sql.SQL("new.{0} = old.{0}").format(sql.Identifier(c)) for c in mart.key),
    }
    connection.execute(
        sql.SQL("DELETE FROM {table} old WHERE {scope} AND NOT EXISTS (SELECT FROM incoming new WHERE {same})").format(
            **names
        ),
        values,
    )
    connection.execute(
        sql.SQL(
            "INSERT INTO {table} AS old ({columns}) SELECT {columns} FROM incoming "
            "ON CONFLICT ({key}) DO UPDATE SET {set}, updated_at = clock_timestamp() "
            "WHERE ({old}) IS DISTINCT FROM ({new})"
        ).format(**names)
    )


def _differences(connection: psycopg.Connection[Any], mart: Mart, start: datetime, end: datetime) -> Difference:
    """How the mart, from `start` to before `end`, differs from the rows of `incoming`."""
    figures = [name for name in mart.columns if name not in (*mart.key, "is_final")]
    names = {
        "table": mart.table,
        "time": sql.Identifier(mart.time),
        "key": _columns(mart.key),
        "old": _columns(figures, "old."),
        "new": _columns(figures, "new."),
    }
    connection.execute(
        sql.SQL(
            "CREATE TEMP TABLE differing ON COMMIT DROP AS "
            "SELECT {key}, old.there IS NULL AS missing, new.there IS NULL AS surplus "
            "FROM (SELECT *, true AS there FROM {table} WHERE {time} >= %s AND {time} < %s) old "
            "FULL JOIN (SELECT *, true AS there FROM incoming) new USING ({key}) "
            "WHERE old.there IS NULL OR new.there IS NULL OR ({old}) IS DISTINCT FROM ({new})"
        ).format(**names),
        (start, end),
    )
    counted = connection.execute(
        "SELECT count(*) FILTER (WHERE missing), count(*) FILTER (WHERE surplus), "
        "count(*) FILTER (WHERE NOT missing AND NOT surplus) FROM differing"
    ).fetchone()
    assert counted is not None
    named = connection.execute(
        sql.SQL("SELECT {key} FROM differing ORDER BY {key} LIMIT {limit}").format(limit=NAMED, **names)
    ).fetchall()
    connection.execute("DROP TABLE differing")
    missing, surplus, differing = counted
    return Difference(missing, surplus, differing, named)
