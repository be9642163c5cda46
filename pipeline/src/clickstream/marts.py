"""Writing to the Postgres marts: whole windows replaced in one transaction, retried while Postgres restarts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

log = logging.getLogger("clickstream")

T = TypeVar("T")

RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class Mart:
    """A mart table that is replaced window by window; `ddl` creates schema-less objects idempotently."""

    schema: str
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    ddl: tuple[str, ...]

    @property
    def table(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)


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

    def _transact(self, work: Callable[[psycopg.Connection[Any]], T]) -> T:
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

        def work(connection: psycopg.Connection[Any]) -> None:
            # Applications may start together, and CREATE IF NOT EXISTS is not safe against that.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext('clickstream.ddl'))")
            row = connection.execute("SELECT to_regnamespace(%s)", (mart.schema,)).fetchone()
            if row is None or row[0] is None:
                connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(mart.schema)))
            for statement in mart.ddl:
                connection.execute(sql.SQL(statement).format(table=mart.table))

        self._transact(work)

    def windows(self, mart: Mart, *, final: bool, since: datetime | None = None) -> set[datetime]:
        def work(connection: psycopg.Connection[Any]) -> set[datetime]:
            query = sql.SQL(
                "SELECT DISTINCT window_start FROM {} WHERE is_final = %s AND window_start >= "
                "coalesce(%s::timestamptz, '-infinity')"
            ).format(mart.table)
            return {row[0] for row in connection.execute(query, (final, since))}

        return self._transact(work)

    def replace_windows(self, mart: Mart, windows: Sequence[datetime], rows: Iterable[Sequence[Any]]) -> None:
        """Makes the mart hold exactly `rows` for `windows`; rows that are the same already are not touched."""
        rows = list(rows)
        names = {
            "table": mart.table,
            "columns": sql.SQL(", ").join(map(sql.Identifier, mart.columns)),
            "key": sql.SQL(", ").join(map(sql.Identifier, mart.key)),
            "set": sql.SQL(", ").join(
                sql.SQL("{0} = excluded.{0}").format(sql.Identifier(c)) for c in mart.columns if c not in mart.key
            ),
            "old": sql.SQL(", ").join(sql.SQL("old.{}").format(sql.Identifier(c)) for c in mart.columns),
            "new": sql.SQL(", ").join(sql.SQL("excluded.{}").format(sql.Identifier(c)) for c in mart.columns),
            "same": sql.SQL(" AND ").join(sql.SQL("new.{0} = old.{0}").format(sql.Identifier(c)) for c in mart.key),
        }

        def work(connection: psycopg.Connection[Any]) -> None:
            connection.execute(
                sql.SQL("CREATE TEMP TABLE incoming ON COMMIT DROP AS SELECT {columns} FROM {table} LIMIT 0").format(
                    **names
                )
            )
            with (
                connection.cursor() as cursor,
                cursor.copy(sql.SQL("COPY incoming ({columns}) FROM STDIN").format(**names)) as copy,
            ):
                for row in rows:
                    copy.write_row(row)
            connection.execute(
                sql.SQL(
                    "DELETE FROM {table} old WHERE window_start = ANY(%s) "
                    "AND NOT EXISTS (SELECT FROM incoming new WHERE {same})"
                ).format(**names),
                (list(windows),),
            )
            connection.execute(
                sql.SQL(
                    "INSERT INTO {table} AS old ({columns}) SELECT {columns} FROM incoming "
                    "ON CONFLICT ({key}) DO UPDATE SET {set}, updated_at = clock_timestamp() "
                    "WHERE ({old}) IS DISTINCT FROM ({new})"
                ).format(**names)
            )

        self._transact(work)
