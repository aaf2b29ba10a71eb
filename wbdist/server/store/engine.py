"""Connections: one writer, many readers.

SQLite has one writing connection behind a lock (two writers only trade SQLITE_BUSY, and versions before 3.51.3 can corrupt a
WAL database when two connections checkpoint at once, which is why the newer library of `pysqlite3` is used); readers have
their own connections and never wait for it. PostgreSQL locks the run's row instead.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.pool import QueuePool, StaticPool

try:
    from pysqlite3 import dbapi2 as sqlite_module
except ImportError:  # no wheel for this platform
    sqlite_module = sqlite3

from wbdist.errors import EnvironmentFault

BUSY_TIMEOUT = 30.0
"""Seconds a write waits for the writes before it, and a read for a free connection."""
_SAFE = (3, 51, 3)
_log = logging.getLogger(__name__)


class StoreError(EnvironmentFault):
    """The database refused; nothing of the request was stored."""


class Connections:
    """Opens `url` (sqlite:///path or postgresql+psycopg://...)."""

    def __init__(self, url: str, *, durable: bool = False) -> None:
        """`durable`: also survive a power cut right after an answer (SQLite's synchronous=FULL; PostgreSQL always does)."""
        try:
            parsed = sa.make_url(url)
        except sa.exc.ArgumentError as error:
            raise StoreError(f"{url!r} is no database URL; give sqlite:///path/to/file or postgresql://...") from error
        backend = parsed.get_backend_name()
        if backend not in {"sqlite", "postgresql"}:
            raise StoreError(f"{backend!r} is no database this server knows; give sqlite:///path/to/file or postgresql://...")
        self.sqlite = backend == "sqlite"
        self._lock = threading.Lock()
        if self.sqlite:
            self._open_sqlite(parsed, durable=durable)
        else:
            if parsed.get_dialect().driver != "psycopg":
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.reader: sa.Engine
            self.writer = sa.create_engine(
                parsed, pool_size=8, max_overflow=8, pool_pre_ping=True, pool_timeout=BUSY_TIMEOUT, hide_parameters=True
            )
            # Several statements make one answer: they must see one moment, also while chunks are merged.
            self.reader = self.writer.execution_options(isolation_level="REPEATABLE READ")

    def _open_sqlite(self, parsed: sa.URL, *, durable: bool) -> None:
        if not parsed.database or parsed.database == ":memory:":
            raise StoreError(f"{str(parsed)!r} names no file; give sqlite:///path/to/wbdist.db")
        if sqlite_module.sqlite_version_info < _SAFE:
            _log.warning("SQLite %s can corrupt a database in rare cases; install pysqlite3", sqlite_module.sqlite_version)
        try:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"no directory for the database {parsed.database}: {error}") from error
        arguments: dict[str, Any] = {
            "module": sqlite_module,
            "connect_args": {"check_same_thread": False, "timeout": BUSY_TIMEOUT},
            "hide_parameters": True,
        }
        self.writer = sa.create_engine(parsed, poolclass=StaticPool, **arguments)
        self.reader = sa.create_engine(
            parsed, poolclass=QueuePool, pool_size=4, max_overflow=28, pool_timeout=BUSY_TIMEOUT, **arguments
        )
        level = "FULL" if durable else "NORMAL"
        _configure(self.writer, f"PRAGMA synchronous={level}", "BEGIN IMMEDIATE")
        _configure(self.reader, "PRAGMA query_only=ON", "BEGIN")

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: all of it, or none and StoreError. Waits at most BUSY_TIMEOUT seconds for its turn."""
        if self.sqlite and not self._lock.acquire(timeout=BUSY_TIMEOUT):
            raise StoreError(f"the database was busy with other writes for {BUSY_TIMEOUT:g} s; nothing of this was stored")
        try:
            with self.writer.begin() as connection:
                yield connection
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise StoreError(f"the database could not store this, and nothing of it was stored: {cause}") from error
        finally:
            if self.sqlite:
                self._lock.release()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One moment of the database, however many statements. Raises StoreError when it cannot be read."""
        try:
            with self.reader.connect() as connection:
                yield connection
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise StoreError(f"the database could not be read: {cause}") from error

    def insert(self, table: sa.Table) -> Any:
        """INSERT with the dialect's ON CONFLICT."""
        return sqlite_dialect.insert(table) if self.sqlite else postgresql.insert(table)

    def locked(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        """Its rows stay as they are until the transaction ends. SQLite's writer is alone anyway."""
        return statement if self.sqlite else statement.with_for_update()

    def close(self) -> None:
        """Closes every connection. Idempotent; waits for a running write."""
        with self._lock:
            self.writer.dispose()
            self.reader.dispose()


def _configure(engine: sa.Engine, pragma: str, begin: str) -> None:
    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves; the driver's own comes too late, or never
        cursor = connection.cursor()
        for statement in ("PRAGMA journal_mode=WAL", "PRAGMA foreign_keys=ON", pragma):
            cursor.execute(statement)
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)
