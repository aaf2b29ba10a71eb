"""Where a journal's bytes go: a window of reserved, mapped file where that is safe, `write` elsewhere (ADR 0001)."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Protocol

WINDOW: Final = 1 << 18
"""Bytes mapped at a time; prefaulting one costs 0.1-0.6 ms, once in about 2400 rows of ten numbers."""
RESERVE: Final = 1 << 20
"""Bytes of disk reserved at a time, given back at close."""
_PAGE: Final = mmap.ALLOCATIONGRANULARITY
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14; the number is the kernel's ABI, Python has no name for it before 3.13."""

NETWORKED: Final = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "lustre",
        "gpfs",
        "beegfs",
        "glusterfs",
        "ocfs2",
        "gfs2",
        "orangefs",
    }
)
"""File systems that several hosts may share, each perhaps with locks of its own; every `fuse` one counts as such."""
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MAPPABLE: Final = frozenset({"ext4", "xfs", "tmpfs", "overlay"})
"""File systems on which reserved space is really there, so that writing through a map cannot raise SIGBUS on a full disk.
Copy-on-write ones (btrfs, zfs) and network ones need not keep that promise."""


class Window(Protocol):
    """Room for frames, filled from its start."""

    write: Callable[[bytes | bytearray], int]
    """Appends a frame; returns how much of it was written (the rest: `take_back`). Raises ValueError when the window is full,
    OSError when the disk is. A function of C: no signal's handler runs inside."""

    def tell(self) -> int:
        """Where the next frame goes: the end of the journal."""
        ...

    def take_back(self, written: int) -> None:
        """Puts the end back by what was written of a frame."""
        ...

    def close(self) -> None: ...


class Storage(Protocol):
    def window(self, at: int, need: int) -> Window:
        """A window that begins at offset `at` with room for `need` bytes. Raises OSError; windows before it stay good."""
        ...

    def finish(self, end: int) -> None:
        """Releases what was reserved behind `end`."""
        ...


def refuse(_frame: bytes | bytearray) -> int:
    """`write` where there is no window."""
    raise ValueError("no window")


class NoWindow:
    """Before the first window, and after the last: it only knows where the journal ends."""

    write: Callable[[bytes | bytearray], int] = staticmethod(refuse)

    def __init__(self, at: int) -> None:
        self._at = at

    def tell(self) -> int:
        return self._at

    def take_back(self, written: int) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Nothing to close."""


class MappedWindow:
    def __init__(self, fd: int, base: int, length: int, at: int) -> None:
        self._map = mmap.mmap(fd, length, mmap.MAP_SHARED, offset=base)
        self._base = base
        try:
            # Takes the page faults here, once a window, and not in 64 calls of the training loop.
            self._map.madvise(_MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):  # older kernels: the faults come one by one
                self._map.close()
                # EFAULT is what would have been SIGBUS: the file system broke its word about the reserved space.
                raise OSError(
                    errno.ENOSPC if error.errno == errno.EFAULT else error.errno, os.strerror(errno.ENOSPC)
                ) from error
        self._map.seek(at - base)
        self.write: Callable[[bytes | bytearray], int] = self._map.write

    def tell(self) -> int:
        return self._base + self._map.tell()

    def take_back(self, written: int) -> None:
        self._map.seek(-written, os.SEEK_CUR)

    def close(self) -> None:
        self._map.close()


class MappedStorage:
    """Frames are copied into a shared mapping: no system call a row, and the page cache keeps them when the process dies."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reserved = os.fstat(fd).st_size

    def window(self, at: int, need: int) -> Window:
        base = at - at % _PAGE
        wanted = at + need
        self._reserve(base, wanted)
        length = min(self._reserved, max(base + WINDOW, -(-wanted // _PAGE) * _PAGE)) - base
        return MappedWindow(self._fd, base, length, at)

    def finish(self, end: int) -> None:
        os.ftruncate(self._fd, end)

    def _reserve(self, base: int, wanted: int) -> None:
        """Reserves up to `wanted`, generously when the disk allows it, to the page when it is nearly full."""
        if wanted <= self._reserved and base + WINDOW <= self._reserved:
            return
        page_end = -(-wanted // _PAGE) * _PAGE
        goals = sorted({max(base + RESERVE, page_end), max(base + WINDOW, page_end), page_end}, reverse=True)
        for goal in goals:
            if goal <= self._reserved:
                return
            try:
                os.posix_fallocate(self._fd, self._reserved, goal - self._reserved)
            except OSError as error:
                if error.errno not in NO_SPACE or goal == page_end:
                    raise
            else:
                self._reserved = max(self._reserved, goal)  # a signal's handler may have been faster
                return


class WrittenStorage:
    """Frames are written by one `write` each: for file systems on which a mapping is not safe. 1.3 to 2 times the cost."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.write: Callable[[bytes | bytearray], int] = partial(os.write, fd)

    def window(self, at: int, need: int) -> Window:
        # Asked for at the start, and after a write that was cut short: says why, or finds that there is space again.
        os.posix_fallocate(self._fd, at, need)
        return self

    def tell(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def take_back(self, written: int) -> None:
        os.lseek(self._fd, -written, os.SEEK_CUR)

    def close(self) -> None:
        """One window is all of the file."""

    def finish(self, end: int) -> None:
        os.ftruncate(self._fd, end)


def storage_for(fd: int, kind: str | None = None) -> Storage:
    """The storage that suits the file's file system. `kind` "mapped" or "written" decides instead (benchmarks, tests)."""
    if kind is None:
        kind = "mapped" if hasattr(os, "posix_fallocate") and filesystem_of(fd) in MAPPABLE else "written"
    return MappedStorage(fd) if kind == "mapped" else WrittenStorage(fd)


def is_local(directory: Path) -> bool:
    """Whether only this host uses the file system: its locks then tell the truth about every writer. False when in doubt."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kind = filesystem_of(fd)
    finally:
        os.close(fd)
    return bool(kind) and kind not in NETWORKED and not kind.startswith("fuse")


def filesystem_of(fd: int) -> str:
    """The name of the file system that holds `fd`; '' where the system does not say."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
            for line in table:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except OSError:
        return ""
    return ""
