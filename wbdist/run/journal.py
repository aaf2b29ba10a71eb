"""The journal: one append-only file of one writer in one attempt; the only thing a training process writes for its run.

A row is durable against SIGKILL when `append_row` returns: it then lies in the kernel's page cache, which outlives the
process. `sync()` makes all of it durable against power loss. Format: `journal_format`; reading: `journal_reader`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time as clock
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self
from zlib import crc32

from wbdist.errors import DiskFullError, JournalError, ShutdownError, UsageError
from wbdist.run.journal_format import (
    FRAME_HEAD,
    FrameDecoder,
    JournalHeader,
    Kind,
    Record,
    Schema,
    encode_frame,
    encode_header,
    encode_record,
)
from wbdist.run.journal_reader import SUFFIX, JournalReader, find_journals, lock_path, own_writers, writer_alive
from wbdist.run.journal_storage import NO_SPACE, storage_for
from wbdist.run.journal_values import plain, plain_row

__all__ = [
    "SUFFIX",
    "FrameDecoder",
    "JournalHeader",
    "JournalReader",
    "JournalWriter",
    "Kind",
    "Record",
    "find_journals",
    "journal_name",
    "lock_path",
    "writer_alive",
]

MAX_SCHEMAS: Final = 1024
"""Shapes of rows that are packed; further ones (a script with ever new keys) are written in full, so memory stays bounded."""

_FRAME_HEAD = FRAME_HEAD.pack
_PACKED: Final = {True: int(Kind.ROW_PACKED_COMMIT), False: int(Kind.ROW_PACKED)}
_live: weakref.WeakSet[JournalWriter] = weakref.WeakSet()


def journal_name(writer: str, attempt: int) -> str:
    """The file name of a writer's journal inside its run directory: `<writer>.a<attempt>.wbdj`."""
    return f"{writer}.a{attempt}{SUFFIX}"


class JournalWriter:
    """The one writer of one journal. Thread-safe. Belongs to the process that made it: a forked child must make its own.

    None of its calls waits for a network, a server, another process or (but for `sync` and `close`) for the disk.
    """

    def __init__(self, path: Path, header: JournalHeader, fd: int, lock_fd: int, storage: str | None) -> None:
        """Use `create`."""
        self.path = path
        self.header = header
        self._fd = fd
        self._lock_fd = lock_fd
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._directory_synced = False
        self._gone: UsageError | None = None
        """Why nothing more can be written."""
        self._seq = 0
        self._rows = 0
        self._shapes: dict[tuple[str, ...], Schema] = {}
        """keys -> the schema used last for them."""
        self._schemas: dict[tuple[tuple[str, ...], str], Schema] = {}
        self._at = 0
        self._storage = storage_for(fd, storage)
        self._window = self._storage.window
        self._base = 0
        self._limit = -1
        """Offset behind the window; -1 sends every call through `_advance`, which says why nothing can be written."""

    @classmethod
    def create(cls, path: Path | str, header: JournalHeader, *, storage: str | None = None) -> Self:
        """Creates `path` (which must not exist) and its lock, in an existing directory. Takes about 1 ms.

        When it returns, other processes see a journal with a verified header and a living writer. Raises UsageError when
        the journal exists, DiskFullError or JournalError when it cannot be made (nothing is left behind then).
        `storage`: "mapped" or "written" instead of what suits the file system.
        """
        path = Path(path)
        if path.suffix != SUFFIX:
            raise UsageError(f"a journal's name ends in {SUFFIX}; got {path}")
        if path.exists():
            # Looked at before the lock: closing a lock file of this very process's writer would drop that writer's lock.
            raise UsageError(_exists(path))
        lock = lock_path(path)
        lock_fd = fd = -1
        made = locked = False
        try:
            # The lock comes first: whoever sees the journal must find its writer alive.
            lock_fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            made = True
            writer = cls(path, header, fd, lock_fd, storage)
            facts = os.fstat(lock_fd)
            head = encode_header(header)
            writer._store(head)
        except BaseException as error:
            for open_fd in (fd, lock_fd):
                if open_fd >= 0:
                    os.close(open_fd)
            if made:
                path.unlink(missing_ok=True)
            if locked and not isinstance(error, FileExistsError):
                lock.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise UsageError(_exists(path)) from None
            if isinstance(error, BlockingIOError):
                raise UsageError(f"the journal {path} is being written by another process") from None
            if isinstance(error, JournalError) or not isinstance(error, OSError):
                raise
            raise _fault(error, path, "the journal cannot be created") from error
        own_writers[facts.st_dev, facts.st_ino] = os.getpid()
        writer._lock_key = (facts.st_dev, facts.st_ino)
        _live.add(writer)
        return writer

    _lock_key: tuple[int, int] = (-1, -1)

    @property
    def seq(self) -> int:
        """Seq of the last record written; -1 when there is none."""
        return self._seq - 1

    @property
    def rows(self) -> int:
        """`append_row` calls that are in the journal."""
        return self._rows

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._at

    def append_row(self, data: Mapping[str, Any], *, step: int | None = None, commit: bool | None = None, time: float) -> None:
        """Journals one `log` call; durable against SIGKILL at return. `time`: Unix seconds, becomes `_timestamp`.

        About 2 us for ten numbers when `step` (0 <= step < 2**32) and `commit` are given; other rows about 5. Raises
        DiskFullError (this row is not in the journal, all earlier ones are; later calls work again when there is space),
        TypeError for what cannot be journalled (nothing is written), ShutdownError after `close`.
        """
        try:
            values = data.values()
            schema = self._shapes[tuple(data)]
            if schema.plain and schema.types == tuple(map(type, values)):
                with self._lock:
                    # `pack` refuses a step of None, beyond 32 bits, and ints beyond 64: struct.error, the full form below.
                    body = schema.pack(self._seq, _PACKED[commit], schema.number, step, time, *values)  # type: ignore[index]
                    size = len(body)
                    at = self._at
                    end = at + size + 8
                    if end > self._limit:
                        self._advance(at, size + 8)
                    self._window[at - self._base : end - self._base] = _FRAME_HEAD(size, crc32(body, size)) + body
                    self._at = end
                    self._seq += 1
                    self._rows += 1
                return
        except (KeyError, struct.error):
            pass
        except OSError as error:
            raise _fault(error, self.path, "this row is not journalled") from error
        self._append_other(data, step, commit, time)

    def append(self, kind: Kind, payload: Mapping[str, Any], time: float | None = None) -> int:
        """Journals a record of any other kind; returns its seq. Durable and failing as `append_row`. `time`: default now."""
        if kind in (Kind.ROW, Kind.SCHEMA, Kind.ROW_PACKED, Kind.ROW_PACKED_COMMIT):
            raise UsageError(f"append() does not take {kind!r}; rows go through append_row")
        fields = (clock.time() if time is None else time, plain(payload))
        with self._lock:
            return self._put(kind, fields)

    def sync(self) -> int:
        """Waits for the disk (fsync): all records up to the returned seq are then durable against power loss. Other threads
        may append meanwhile. Raises JournalError when the disk reports a fault: earlier rows may then not be durable."""
        with self._sync_lock:
            seq = self._seq - 1
            if self._gone:
                self._refuse()
            try:
                os.fsync(self._fd)
                if not self._directory_synced:
                    _sync_directory(self.path.parent)
                    self._directory_synced = True
            except OSError as error:
                raise _fault(error, self.path, "what was logged may not survive a power loss") from error
        return seq

    def close(self, exit_code: int | None, cause: str = "exit") -> None:
        """Writes the END record, gives reserved space back, fsyncs, releases the lock. Idempotent.

        `exit_code` None: this writer ends, the run does not (it is handed over). When END finds no space the rest is done
        all the same and DiskFullError raised: readers then take the writer for lost.
        """
        if self._gone:
            return
        fault: JournalError | None = None
        with self._sync_lock, self._lock:
            try:
                self._put(Kind.END, (clock.time(), {"exit_code": exit_code, "cause": cause}))
            except JournalError as error:
                fault = error
            self._gone = ShutdownError(f"the journal {self.path} is closed: its run has ended")
            self._limit = -1
            try:
                self._storage.finish(self._at)
                os.fsync(self._fd)
                if not self._directory_synced:
                    _sync_directory(self.path.parent)
            except OSError as error:
                fault = fault or _fault(error, self.path, "what was logged may not survive a power loss")
            self._release()
        if fault is not None:
            raise fault

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(0 if error is None else 1, "exit")

    def _append_other(self, data: Mapping[str, Any], step: int | None, commit: bool | None, time: float) -> None:
        """Rows of a new shape, and rows that cannot be packed."""
        row = plain_row(data)
        keys = tuple(row)
        codes = "".join(Schema.CODES.get(type(value), "x") for value in row.values())
        packable = "x" not in codes and commit is not None and step is not None
        with self._lock:
            schema = self._schemas.get((keys, codes)) if packable else None
            if packable and schema is None and len(self._schemas) < MAX_SCHEMAS:
                schema = Schema(len(self._schemas), keys, codes)
                self._store(encode_frame(struct.pack("<IB", self._seq, Kind.SCHEMA) + schema.describe()))
                self._seq += 1
                self._schemas[keys, codes] = schema
            if schema is not None and step is not None and commit is not None:
                self._shapes[keys] = schema
                try:
                    body = schema.encode(self._seq, _PACKED[commit], step, time, tuple(row.values()))
                except struct.error:
                    pass
                else:
                    self._store(encode_frame(body))
                    self._seq += 1
                    self._rows += 1
                    return
            self._put(Kind.ROW, (time, step, commit, row))
            self._rows += 1

    def _put(self, kind: Kind, fields: tuple[Any, ...]) -> int:
        """Under the lock."""
        try:
            frame = encode_record(self._seq, kind, fields)
        except OverflowError as error:
            raise TypeError(f"cannot journal {kind.name}: a number does not fit in 64 bits ({error})") from error
        self._store(frame)
        self._seq += 1
        return self._seq - 1

    def _store(self, frame: bytes) -> None:
        """Puts `frame` at the end. Under the lock; nothing changes when it raises."""
        at = self._at
        end = at + len(frame)
        try:
            if end > self._limit:
                self._advance(at, len(frame))
            self._window[at - self._base : end - self._base] = frame
        except OSError as error:
            raise _fault(error, self.path, "this record is not journalled") from error
        self._at = end

    def _advance(self, at: int, need: int) -> None:
        if self._gone:
            self._refuse()
        storage = self._storage
        storage.advance(at, need)
        self._window, self._base, self._limit = storage.window, storage.base, storage.limit

    def _refuse(self) -> NoReturn:
        kind = ShutdownError if self._gone is None else type(self._gone)
        raise kind(str(self._gone))

    def _release(self) -> None:
        """Gives up the files. The lock file goes while it is still locked: no other process can take it for a dead writer's."""
        own_writers.pop(self._lock_key, None)
        _live.discard(self)
        lock_path(self.path).unlink(missing_ok=True)
        os.close(self._fd)
        os.close(self._lock_fd)

    def disown(self) -> None:
        """Called in a forked child, for which the file is its parent's: from now on every call says so."""
        self._gone = UsageError(
            f"the journal {self.path} belongs to process {self.header.pid or 'that forked this one'}; "
            "a forked child cannot log to its parent's run: start a run of its own in the child, or log in the parent"
        )
        self._limit = -1
        # A thread of the parent may have held these; it does not exist here.
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()


def _exists(path: Path) -> str:
    return f"the journal {path} exists; a journal is never opened again for writing: use another attempt number or directory"


def _fault(error: OSError, path: Path, consequence: str) -> JournalError:
    if error.errno in NO_SPACE:
        reason = "the file size limit is reached" if error.errno == errno.EFBIG else "no space is left on the disk"
        safe = "everything logged before it is safe, and logging works again when there is space"
        return DiskFullError(f"{reason} for the journal {path}: {consequence}; {safe}")
    return JournalError(
        f"the journal {path} failed ({error.strerror or error}): {consequence}; everything logged before it is in the journal"
    )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _after_fork() -> None:
    own_writers.clear()
    for writer in list(_live):
        writer.disown()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
