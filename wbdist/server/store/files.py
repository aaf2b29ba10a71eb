"""Versions of a run's files: lines of the stream FILES, visible as the attempts' live view has it."""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from wbdist.core.position import FILES
from wbdist.errors import UsageError
from wbdist.protocol.attempts import FileStamp
from wbdist.server.store.appending import NO_NONCE
from wbdist.server.store.artifact_schema import artifacts
from wbdist.server.store.artifact_schema import contents as artifact_contents
from wbdist.server.store.attempts import attempt_of
from wbdist.server.store.chunks import Key
from wbdist.server.store.engine import Connections
from wbdist.server.store.filecuts import SERVER
from wbdist.server.store.interface import RunRow
from wbdist.server.store.schema import cursors, file_versions, runs
from wbdist.server.store.views import View, view_of

_RUN = sa.select(runs.c.pk, runs.c.attempt, runs.c.last_step).where(runs.c.pk == sa.bindparam("key"))
_VERSION = sa.select(file_versions.c.pk).where(
    *(file_versions.c[name] == sa.bindparam(name) for name in ("run_pk", "attempt", "lane", "writer", "seq"))
)
_NEXT = sa.select(cursors.c.next).where(*(cursors.c[name] == sa.bindparam(name) for name in Key.__struct_fields__))
_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class FileVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a file. Its bytes lie under `sha256`; without one the file was deleted."""

    name: str
    sha256: str
    md5: str
    """Base64, as W&B gives it."""
    size: int
    mimetype: str
    updated_at: float


class Filed(msgspec.Struct, frozen=True):
    """What became of a version. `code` is '' (stored, or known already), 'unknown' (no such attempt was begun: nothing stored)
    or 'fenced' (in the archive, seen by nobody)."""

    code: str = ""
    attempt: int = 0
    """The run's current one."""


class FileTable:
    """Thread-safe. Every call raises StoreError when the database fails; it then changed nothing."""

    def __init__(self, connections: Connections) -> None:
        self._db = connections

    def add(self, pk: int, version: FileVersion, stamp: FileStamp | None = None) -> Filed:
        """Stores a version under its stamp; without one as the newest of the current attempt, unless the live file is the same.

        The same stamp again changes nothing, whatever comes with it.
        """
        with self._db.write() as db:
            run = db.execute(self._db.locked(_RUN), {"key": pk}).one_or_none()
            if run is None:
                raise UsageError(f"there is no run with the key {pk}")
            return _unstamped(db, run, version) if stamp is None else _stamped(db, run, version, stamp)

    def live(self, run: RunRow) -> list[FileVersion]:
        """The files of a run (or of one of its incarnations) by name, each in its newest visible version."""
        with self._db.read() as db:
            view = view_of(db, run.pk, run.attempt if run.view is None else run.view)
            found = _newest(db, view)
        return sorted((version for version in found.values() if version.sha256), key=lambda version: version.name)

    def contents(self) -> set[str]:
        """SHA-256 of everything that a version of a file or an artifact refers to, seen or not."""
        columns = (file_versions.c.sha256, artifacts.c.manifest, artifact_contents.c.sha256)
        with self._db.read() as db:
            return {sha256 for column in columns for sha256 in db.execute(sa.select(column).distinct()).scalars() if sha256}

    def get(self, run: RunRow, name: str) -> FileVersion | None:
        """The newest visible version of one file; None when there is none, or it was deleted."""
        found = self.newest(run, name)
        return found if found is not None and found.sha256 else None

    def newest(self, run: RunRow, name: str) -> FileVersion | None:
        """The same, with a deletion as a version without contents."""
        with self._db.read() as db:
            view = view_of(db, run.pk, run.attempt if run.view is None else run.view)
            return _newest(db, view, name).get(name)


def _stamped(db: sa.Connection, run: Any, version: FileVersion, stamp: FileStamp) -> Filed:
    known = attempt_of(db, run.pk, stamp.attempt)
    if known is None or known["nonce"] == "":
        return Filed("unknown", run.attempt)
    lane = "" if known["nonce"] == stamp.nonce else stamp.nonce or NO_NONCE
    key = Key(run.pk, stamp.attempt, lane, FILES, stamp.writer)
    if not _exists(db, key, stamp.seq):
        _write(db, key, stamp.seq, version, run.last_step if stamp.step is None else stamp.step)
    own = None if lane else view_of(db, run.pk, run.attempt).own(stamp.attempt)
    live = own is not None and own.admits(FILES, stamp.writer, stamp.seq)
    return Filed("" if live else "fenced", run.attempt)


def _unstamped(db: sa.Connection, run: Any, version: FileVersion) -> Filed:
    shown = _newest(db, view_of(db, run.pk, run.attempt), version.name).get(version.name)
    if version.sha256 != ("" if shown is None else shown.sha256):
        key = Key(run.pk, run.attempt, "", FILES, SERVER)
        _write(db, key, _next(db, key), version, run.last_step)
    return Filed("", run.attempt)


def _exists(db: sa.Connection, key: Key, seq: int) -> bool:
    return db.execute(_VERSION, {**msgspec.structs.asdict(key), "seq": seq}).first() is not None


def _next(db: sa.Connection, key: Key) -> int:
    return int(db.execute(_NEXT, msgspec.structs.asdict(key)).scalar() or 0)


def _write(db: sa.Connection, key: Key, seq: int, version: FileVersion, step: int) -> None:
    """Versions may arrive in any order: a file whose upload failed for good must not hold back those after it."""
    where = msgspec.structs.asdict(key)
    line = {name: where[name] for name in ("run_pk", "attempt", "lane", "writer")}
    db.execute(sa.insert(file_versions).values(**line, seq=seq, step=step, **msgspec.structs.asdict(version)))
    insert = _INSERT[db.dialect.name](cursors)
    later = sa.case((cursors.c.next > insert.excluded.next, cursors.c.next), else_=insert.excluded.next)
    db.execute(insert.values(**where, next=seq + 1).on_conflict_do_update(index_elements=list(where), set_={"next": later}))
    db.execute(sa.update(runs).where(runs.c.pk == key.run_pk).values(version=runs.c.version + 1))


def _newest(db: sa.Connection, view: View, name: str | None = None) -> dict[str, FileVersion]:
    """name -> its newest visible version: of the newest attempt; there of one writer the highest seq, of several the last
    that arrived."""
    out: dict[str, FileVersion] = {}
    for segment in view.segments:
        where = (
            (file_versions.c.run_pk == segment.run)
            & (file_versions.c.attempt == segment.attempt)
            & (file_versions.c.lane == view.lane)
        )
        if name is not None:
            where &= file_versions.c.name == name
        shown: dict[str, tuple[str, int]] = {}
        for row in db.execute(sa.select(file_versions).where(where).order_by(file_versions.c.pk)).mappings():
            if not segment.admits(FILES, row["writer"], row["seq"]):
                continue
            writer, seq = shown.get(row["name"], (row["writer"], -1))
            if writer != row["writer"] or row["seq"] > seq:
                shown[row["name"]] = (row["writer"], row["seq"])
                out[row["name"]] = FileVersion(**{field: row[field] for field in FileVersion.__struct_fields__})
    return out
