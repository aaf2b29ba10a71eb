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
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import time as now
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from wbdist.core.rows import StepRule
from wbdist.core.summary import SummaryTracker
from wbdist.disk import sync_directory
from wbdist.errors import DiskFullError, JournalError, ShutdownError, UsageError
from wbdist.run.journal_format import (
    BODY_HEAD,
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
from wbdist.run.journal_shapes import NO_SHAPE, Shape, Shapes
from wbdist.run.journal_storage import NO_SPACE, NoWindow, Window, refuse, storage_for
from wbdist.run.values import as_step, flat_row, plain

__all__ = [
    "SUFFIX",
    "FrameDecoder",
    "JournalHeader",
    "JournalReader",
    "JournalWriter",
    "Kind",
    "Record",
    "Schema",
    "find_journals",
    "journal_name",
    "lock_path",
    "writer_alive",
]

_OPEN: Final = int(Kind.ROW_PACKED)
_COMMIT: Final = int(Kind.ROW_PACKED_COMMIT)
_live: weakref.WeakSet[JournalWriter] = weakref.WeakSet()


def journal_name(writer: str, attempt: int) -> str:
    """The file name of a writer's journal inside its run directory: `<writer>.a<attempt>.wbdj`."""
    return f"{writer}.a{attempt}{SUFFIX}"


class JournalWriter:
    """The one writer of one journal. Thread-safe. Belongs to the process that made it: a forked child must make its own.

    It knows where its run stands: `rule` and `summary`. None of its calls waits for a network, a server, another process or
    (but for `sync` and `close`) for the disk.

    A signal's handler may raise at any moment (Ctrl-C), or log a row itself. CPython runs handlers behind calls; so what must
    happen together (the rule, the next seq, the frame) is plain stores and then one call into C, after a look whether a handler
    has logged meanwhile. No frame is then doubled or skipped, which would end the journal for its readers.
    """

    def __init__(self, path: Path, header: JournalHeader, fd: int, lock_fd: int, storage: str | None) -> None:
        """Use `create`."""
        self.path = path
        self.header = header
        self.lock = threading.RLock()
        """Held by every call; for callers who must see several things at one moment."""
        self.rule = StepRule(header.starting_step)
        """Where `log` stands: step and rows."""
        self._fd = fd
        self._lock_fd = lock_fd
        self._sync_lock = threading.Lock()
        self._directory_synced = False
        self._gone: UsageError | None = None
        """Why nothing more can be written."""
        self._seq = 0
        self._shapes = Shapes()
        self._shape = NO_SHAPE
        """Of the last row packed in place."""
        self._summary = SummaryTracker(header.summary)
        self._frames: dict[Shape, bytes] = {}
        """The last row of each shape that `_summary` does not know yet, by age: it says all that those before it said."""
        self._folded = 0
        """Seq up to which `_summary` and `_frames` know the rows, but for `_row`. Then come rows of `_shape`."""
        self._row: Mapping[str, Any] | None = None
        """The row that was written last the long way, when the summary does not know it yet."""
        self._storage = storage_for(fd, storage)
        self._window: Window = NoWindow(0)
        self._write: Callable[[bytes | bytearray], int] = refuse
        """`_window.write`"""

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
            writer._write_header(encode_header(header))
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
    def size(self) -> int:
        """Bytes written."""
        return self._window.tell()

    def summary(self) -> dict[str, Any]:
        """The run's summary so far, as a copy: the header's, rows, and SUMMARY records."""
        with self.lock:
            self._fold()
            self._tell_summary()
            return dict(self._summary.values)

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> bool:
        """Journals one `log` call under W&B's step rule (`core/rows.py`), stamped now; False when its step has passed.

        Durable against SIGKILL at return; about 1 us for ten numbers of the same keys and types as before, 2 where rows are
        packed in Python (`journal_shapes`). Raises DiskFullError (this row is not in the journal, all earlier ones are; later
        calls work again when there is space), TypeError for what cannot be journalled (nothing is changed then), ShutdownError
        after `close`, UsageError in a forked child.
        """
        with self.lock:
            shape = self._shape
            seq, rule = self._seq, self.rule
            # StepRule.accept, in line: a call costs a tenth of the budget.
            at, was_open, rows, last = rule.step, rule.open, rule.rows, rule.last_step
            to, closes = at, commit
            if step is None:
                closes = commit is None or commit
            elif type(step) is int and step >= at:
                to = step
            else:
                return self._log_other(data, step, commit)
            if shape.fill(data, seq, _COMMIT if closes else _OPEN, to, now()) and self._seq == seq:
                # No call, so no handler, between here and the write.
                self._seq = seq + 1
                if was_open and to > at:
                    rule.rows = rows + 1
                    rule.last_step = at
                if closes:
                    rule.step = to + 1
                    rule.rows += 1
                    rule.last_step = to
                    rule.open = False
                else:
                    rule.step = to
                    rule.open = True
                try:
                    if (written := self._write(shape.frame)) == shape.length:
                        return True
                    self._window.take_back(written)
                except (ValueError, OSError):
                    pass  # no room in the window, or none on the disk: the long way makes it, or says so
                self._seq = seq
                rule.step, rule.open, rule.rows, rule.last_step = at, was_open, rows, last
            return self._log_other(data, step, commit)

    def commit_row(self) -> None:
        """Closes the open row, if there is one. Durable and failing as `log`."""
        with self.lock:
            while self.rule.open:
                seq, rule = self._seq, self.rule.copy()
                rule.close()
                if self._store(encode_record(seq, Kind.COMMIT, (now(), {})), seq, rule):
                    return

    def append_row(self, data: Mapping[str, Any], *, step: int | None = None, commit: bool | None = None, time: float) -> None:
        """Journals a row as it is, past the step rule: for who assembles rows of others. Durable and failing as `log`.

        `time`: Unix seconds, becomes `_timestamp`.
        """
        with self.lock:
            if (
                step is not None
                and commit is not None
                and self._append_in_place(data, step, time, _COMMIT if commit else _OPEN)
            ):
                return
            shape = self._shapes.find(data)
            row = data if shape else flat_row(data)
            while True:
                seq = self._seq
                if shape and step is not None and commit is not None:
                    with suppress(struct.error):  # a number too large for its place
                        body = shape.schema.encode(seq, _COMMIT if commit else _OPEN, step, time, tuple(row.values()))
                        if self._store(encode_frame(body), seq, self.rule, row):
                            return
                        continue
                if self._store(self._row_frame(row, seq, step, commit, time), seq, self.rule, row):
                    return

    def _append_in_place(self, row: Mapping[str, Any], step: int, time: float, kind: int) -> bool:
        """As the shape of the last row that was packed in place, if it has that; else a known one of its own becomes that.

        A third of the time of the long way. Past the rule, so for writers whose process has no handlers that log.
        """
        shape = self._shape
        if shape.fill(row, self._seq, kind, step, time):
            try:
                if (written := self._write(shape.frame)) == shape.length:
                    self._seq += 1
                    return True
                self._window.take_back(written)
            except (ValueError, OSError):
                pass  # no room: the long way
        elif (known := self._shapes.find(row)) is not None and known is not shape:
            self._fold()
            self._shape = known
        return False

    def append(self, kind: Kind, payload: Mapping[str, Any], time: float | None = None) -> int:
        """Journals a record of any other kind; returns its seq. Durable and failing as `log`. `time`: default now."""
        if kind in (Kind.ROW, Kind.SCHEMA, Kind.ROW_PACKED, Kind.ROW_PACKED_COMMIT):
            raise UsageError(f"append() does not take {kind!r}; rows go through log or append_row")
        kept = plain(payload)
        with self.lock:
            seq = self._put(kind, (now() if time is None else time, kept))
            if kind is Kind.SUMMARY:
                self._tell_summary()
                self._summary.change(kept.get("set", {}), kept.get("delete", ()))
            return seq

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
                    sync_directory(self.path.parent)
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
        with self._sync_lock, self.lock:
            try:
                self._put(Kind.END, (now(), {"exit_code": exit_code, "cause": cause}))
            except JournalError as error:
                fault = error
            at_close = self._shut()
        if (fault := fault or at_close) is not None:
            raise fault

    def abandon(self) -> None:
        """As `close` without END: readers take the writer for lost. For who writes in a dead one's place; raises as `close`."""
        if self._gone:
            return
        with self._sync_lock, self.lock:
            if (fault := self._shut()) is not None:
                raise fault

    def _shut(self) -> JournalError | None:
        """Under both locks. What the disk said against it."""
        fault: JournalError | None = None
        self._gone = ShutdownError(f"the journal {self.path} is closed: its run has ended")
        self._fold()
        self._write = refuse
        old, self._window = self._window, NoWindow(self.size)
        old.close()
        try:
            self._storage.finish(self.size)
            os.fsync(self._fd)
            if not self._directory_synced:
                sync_directory(self.path.parent)
        except OSError as error:
            fault = _fault(error, self.path, "what was logged may not survive a power loss")
        self._release()
        return fault

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(0 if error is None else 1, "exit")

    # Under the lock ------------------------------------------------------------------------------------

    def _log_other(self, data: Mapping[str, Any], step: int | None, commit: bool | None) -> bool:
        """`log` for rows of another shape than the last, and for all that is special."""
        if self._gone:
            self._refuse()
        asked = None if step is None else as_step(step)
        known = self._shapes.find(data)
        exact = type(data) is dict
        if known is not None and not (known is self._shape and asked is step and exact):
            if known is not self._shape:
                self._fold()
                while self._folded != self._seq:  # a handler has logged meanwhile, in the shape that is left here
                    self._fold()
                self._shape = known
            return self.log(data if exact else dict(data), asked, commit)
        if asked is not None and asked < self.rule.step:
            return False  # before its values are looked at: reading one may wait for an accelerator
        row = flat_row(data)
        time = now()
        while True:
            seq, rule = self._seq, self.rule.copy()
            accepted = rule.accept(asked, commit)
            if accepted is None:
                return False
            if self._store(self._row_frame(row, seq, *accepted, time), seq, rule, row):
                return True

    def _row_frame(self, row: Mapping[str, Any], seq: int, step: int | None, commit: bool | None, time: float) -> bytes:
        """A plain row's frame; packed when it can be. A new shape is declared first, and `seq` is then no longer the next."""
        if step is not None and commit is not None and (shape := self._shape_for(row)):
            with suppress(struct.error):  # a number too large for its place
                return encode_frame(shape.schema.encode(seq, _COMMIT if commit else _OPEN, step, time, tuple(row.values())))
        return _encode(seq, Kind.ROW, (time, step, commit, row))

    def _shape_for(self, row: Mapping[str, Any]) -> Shape | None:
        """The shape of a plain row, declared in the journal; None when it is to be written in full."""
        while True:
            shape, is_new = self._shapes.of(row)
            if shape is None or not is_new:
                return shape
            seq = self._seq
            frame = encode_frame(BODY_HEAD.pack(seq, Kind.SCHEMA) + shape.schema.describe())
            if self._store(frame, seq, self.rule):
                self._shapes.add(shape)
                return shape

    def _put(self, kind: Kind, fields: tuple[Any, ...]) -> int:
        while True:
            seq = self._seq
            if self._store(_encode(seq, kind, fields), seq, self.rule):
                return seq

    def _store(self, frame: bytes, seq: int, rule: StepRule, row: Mapping[str, Any] | None = None) -> bool:
        """Appends the frame of `seq` (holding `row`), after which the rule is `rule`. False when there is another by now.

        Nothing is changed when it raises.
        """
        self._fold()
        while True:
            # Not the loop's own condition: CPython runs signals' handlers where a loop jumps back.
            if self._seq != seq:
                return False
            before, folded = self.rule, self._folded
            self.rule, self._row = rule, row
            self._seq = self._folded = seq + 1
            try:
                if (written := self._write(frame)) == len(frame):
                    return True
                self._window.take_back(written)
            except ValueError:
                pass  # the window is full
            except OSError as error:
                self.rule, self._row, self._seq, self._folded = before, None, seq, folded
                raise _fault(error, self.path, "this record is not journalled") from error
            self.rule, self._row, self._seq, self._folded = before, None, seq, folded
            self._make_room(len(frame))

    def _make_room(self, need: int) -> None:
        if self._gone:
            self._refuse()
        seq, old = self._seq, self._window
        try:
            fresh = self._storage.window(old.tell(), need)
        except OSError as error:
            raise _fault(error, self.path, "this record is not journalled") from error
        if self._seq == seq:
            self._window = fresh
            self._write = fresh.write  # the old one goes with its last user, who may be what this call interrupts
        else:
            fresh.close()  # a signal's handler has moved the end meanwhile

    def _write_header(self, head: bytes) -> None:
        self._make_room(len(head))
        self._write(head)

    def _fold(self) -> None:
        """Keeps what the summary has to know of the rows that were packed in place: the last one is still in its shape's frame.

        It is not read here: a script that logs rows of two shapes in each step comes here twice in each step.
        """
        if (row := self._row) is not None:
            self._tell_summary()
            self._summary.add_row(row)
            if self._row is row:
                self._row = None
        last = self._seq - 1
        if self._folded > last:
            return
        shape = self._shape
        frame: bytes | bytearray = shape.frame
        if not shape.holds(frame, last):  # but a row that did not make it to the journal
            frame = os.pread(self._fd, shape.length, self._window.tell() - shape.length)
        if shape.holds(frame, last):
            self._frames.pop(shape, None)
            self._frames[shape] = bytes(frame)
        self._folded = last + 1

    def _tell_summary(self) -> None:
        frames, self._frames = self._frames, {}
        for shape, frame in frames.items():
            self._summary.add_row(shape.row_in(frame))

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
        self._write = refuse
        # A thread of the parent may have held these; it does not exist here.
        self.lock = threading.RLock()
        self._sync_lock = threading.Lock()


def _encode(seq: int, kind: Kind, fields: tuple[Any, ...]) -> bytes:
    try:
        return encode_record(seq, kind, fields)
    except OverflowError as error:
        raise TypeError(f"cannot journal {kind.name}: a number does not fit in 64 bits ({error})") from error


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


def _after_fork() -> None:
    own_writers.clear()
    for writer in list(_live):
        writer.disown()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
