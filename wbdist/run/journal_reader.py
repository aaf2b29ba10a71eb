"""Reading journals: any process, any time, also while the writer appends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from wbdist.run.journal_format import (
    BODY_HEAD,
    FRAME_HEAD,
    FRAME_OVERHEAD,
    FrameDecoder,
    JournalHeader,
    Kind,
    Record,
    decode_header,
    header_size,
    verified_end,
)

SUFFIX: Final = ".wbdj"
LOCK_SUFFIX: Final = ".lock"
READ_SIZE: Final = 1 << 18

own_writers: dict[tuple[int, int], int] = {}
"""(device, inode) of the lock file -> pid, for the writers of this process. POSIX drops a process's lock when it closes *any*
descriptor of that file, so a process must never open the lock file of its own writer: `writer_alive` looks here first."""


def lock_path(journal: Path) -> Path:
    return journal.with_name(journal.name + LOCK_SUFFIX)


def writer_alive(journal: Path) -> bool:
    """Whether a live process holds `journal`'s writer lock. Does not block."""
    path = lock_path(journal)
    try:
        facts = path.stat()
        if own_writers.get((facts.st_dev, facts.st_ino)) == os.getpid():
            return True
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # A shared lock needs read access only, and two askers do not disturb each other.
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    finally:
        os.close(fd)
    return False


def find_journals(root: Path | str) -> list[Path]:
    """The journals at `root`, sorted: the file itself, or those of a run directory, or of all in a `wandb` one."""
    root = Path(root)
    if root.is_file():
        return [root] if root.suffix == SUFFIX else []
    found: Iterable[Path] = [*root.glob(f"*{SUFFIX}"), *root.glob(f"*/*{SUFFIX}")]
    return sorted(found)


class JournalReader:
    """A cursor over one journal. Never locks, never writes; not thread-safe."""

    def __init__(self, path: Path, fd: int, header: JournalHeader, first: int) -> None:
        self.path = path
        self.header = header
        self.first = first
        """Offset of the first frame."""
        self.offset = first
        """Everything before this offset has been read and verified."""
        self.ended: dict[str, Any] | None = None
        """The END record's data once it has been read: {"exit_code", "cause"}."""
        self._fd = fd
        self._decoder = FrameDecoder()

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Raises JournalCorruptError when the header does not verify (or is just being written), or OSError."""
        path = Path(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.pread(fd, READ_SIZE, 0)
            if (size := header_size(head)) > len(head):
                head = os.pread(fd, size, 0)
            header, first = decode_header(head, str(path))
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, header, first)

    def read(self, max_bytes: int = READ_SIZE) -> list[Record]:
        """The next records, about `max_bytes` of journal (at least one if there is one); [] when no more verify yet."""
        data = self._verifiable(self.offset, max_bytes)
        while True:
            records, used = self._decoder.decode(data)
            self.offset += used
            if records or used == 0:
                break
            data = self._verifiable(self.offset, max_bytes)  # only SCHEMA frames: look on
        if records and records[-1].kind is Kind.END:
            self.ended = records[-1].data
        return records

    def frames(self, from_offset: int | None = None, max_bytes: int = READ_SIZE) -> tuple[bytes, int]:
        """Verified raw frames from `from_offset` (default: the first) and the offset behind them; to forward without decoding.

        `from_offset` must be a frame boundary: `first`, or an offset returned here before. Independent of `read`'s cursor.
        """
        at = self.first if from_offset is None else from_offset
        data = self._verifiable(at, max_bytes)
        seq = 0 if at == self.first or len(data) < FRAME_OVERHEAD else BODY_HEAD.unpack_from(data, FRAME_HEAD.size)[0]
        end = 0
        for _, end in verified_end(data, 0, seq):  # noqa: B007  (its last value is what we want)
            pass
        return data[:end], at + end

    def raw(self, from_offset: int, to_offset: int) -> bytes:
        """The bytes between two frame boundaries, not verified: for the writer's process, which knows where its frames end."""
        return os.pread(self._fd, max(0, to_offset - from_offset), from_offset)

    def rewind(self) -> None:
        """Back to the first record."""
        self.offset = self.first
        self.ended = None
        self._decoder = FrameDecoder()

    def torn(self) -> bool:
        """Whether bytes that do not verify follow what was read. While the writer lives this may be a frame in the making."""
        rest = os.pread(self._fd, READ_SIZE, self.offset)
        return any(rest)

    def writer_alive(self) -> bool:
        """Whether the writer's process lives; False also after END."""
        return self.ended is None and writer_alive(self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _verifiable(self, at: int, max_bytes: int) -> bytes:
        """Bytes from `at`: `max_bytes`, or more when the first frame is longer than that."""
        data = os.pread(self._fd, max_bytes, at)
        if len(data) >= FRAME_HEAD.size:
            length = FRAME_HEAD.size + FRAME_HEAD.unpack_from(data)[0]
            if max_bytes < length and os.fstat(self._fd).st_size >= at + length:
                data = os.pread(self._fd, length, at)
        return data
