"""Connections: one writer, many readers.

SQLite has one writing connection behind a lock (two writers only trade SQLITE_BUSY, and versions before 3.51.3 can corrupt a
WAL database when two connections checkpoint at once, which is why the newer library of `pysqlite3` is used); readers have
their own connections and never wait for it. PostgreSQL locks the run's row instead.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import QueuePool, StaticPool

try:
    from pysqlite3 import dbapi2 as sqlite_module
except ImportError:  # no wheel for this platform
    sqlite_module = sqlite3

from wbdist.errors import EnvironmentFault


class StoreError(EnvironmentFault):
    """The database refused; nothing of the request was stored."""


class Connections:
    """Opens `url` (sqlite:///path or postgresql+psycopg://...)."""

    def __init__(self, url: str, *, durable: bool = False) -> None:
        """`durable`: also survive a power cut right after an answer (synchronous=FULL; about 2.4 times slower appends)."""
        parsed = sa.make_url(url)
        self.sqlite = parsed.get_backend_name() == "sqlite"
        self._lock = threading.RLock()
        if self.sqlite:
            if not parsed.database:
                raise StoreError(f"{url!r} names no file; give sqlite:///path/to/wbdist.db")
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            arguments: dict[str, Any] = {"module": sqlite_module, "connect_args": {"check_same_thread": False, "timeout": 30}}
            self.writer = sa.create_engine(parsed, poolclass=StaticPool, **arguments)
            self.reader = sa.create_engine(parsed, poolclass=QueuePool, pool_size=4, max_overflow=12, **arguments)
            level = "FULL" if durable else "NORMAL"
            _configure(self.writer, f"PRAGMA synchronous={level}", "BEGIN IMMEDIATE")
            _configure(self.reader, "PRAGMA query_only=ON", "BEGIN")
        else:
            if parsed.get_dialect().driver != "psycopg":
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.writer = self.reader = sa.create_engine(parsed, pool_size=8, max_overflow=8, pool_pre_ping=True)

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: all of it, or none and StoreError."""
        try:
            if self.sqlite:
                with self._lock, self.writer.begin() as connection:
                    yield connection
            else:
                with self.writer.begin() as connection:
                    yield connection
        except sa.exc.DBAPIError as error:
            raise StoreError(f"the database could not store this, and nothing of it was stored: {error.orig}") from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view."""
        with self.reader.connect() as connection:
            yield connection

    def close(self) -> None:
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
