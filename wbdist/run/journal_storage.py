"""Where a journal's bytes go: a window of reserved, mapped file where that is safe, `pwrite` elsewhere (ADR 0001)."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final, Protocol

WINDOW: Final = 1 << 18
"""Bytes mapped at a time; prefaulting one costs 0.1-0.6 ms, once in about 2400 rows of ten numbers."""
RESERVE: Final = 1 << 20
"""Bytes of disk reserved at a time, given back at close."""
_PAGE: Final = mmap.ALLOCATIONGRANULARITY
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14; the number is the kernel's ABI, Python has no name for it before 3.13."""

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MAPPABLE: Final = frozenset({"ext4", "xfs", "tmpfs", "overlay"})
"""File systems on which reserved space is really there, so that writing through a map cannot raise SIGBUS on a full disk.
Copy-on-write ones (btrfs, zfs) and network ones need not keep that promise."""


class Storage(Protocol):
    """Space for frames. `window[a - base : b - base] = frame` stores, for base <= a, b <= limit; OSError when it cannot."""

    window: Window
    base: int
    limit: int

    def advance(self, at: int, need: int) -> None:
        """Moves the window so that [at, at + need) lies in it. Raises OSError; the old window then still stands."""
        ...

    def finish(self, at: int) -> None:
        """Releases the window and what was reserved behind `at`."""
        ...


class Window(Protocol):
    def __setitem__(self, place: slice, frame: bytes, /) -> None: ...


class MappedStorage:
    """Frames are copied into a shared mapping: no system call a row, and the page cache keeps them when the process dies."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reserved = os.fstat(fd).st_size
        self._map: mmap.mmap | None = None
        self.window: Window = _Nowhere()
        self.base = 0
        self.limit = -1

    def advance(self, at: int, need: int) -> None:
        base = at - at % _PAGE
        wanted = at + need
        self._reserve(base, wanted)
        length = min(self._reserved, max(base + WINDOW, -(-wanted // _PAGE) * _PAGE)) - base
        fresh = mmap.mmap(self._fd, length, mmap.MAP_SHARED, offset=base)
        try:
            # Takes the page faults here, once a window, and not in 64 calls of the training loop.
            fresh.madvise(_MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):  # older kernels: the faults come one by one
                fresh.close()
                # EFAULT is what would have been SIGBUS: the file system broke its word about the reserved space.
                raise OSError(
                    errno.ENOSPC if error.errno == errno.EFAULT else error.errno, os.strerror(errno.ENOSPC)
                ) from error
        old, self._map = self._map, fresh
        self.window, self.base, self.limit = fresh, base, base + length
        if old is not None:
            old.close()

    def finish(self, at: int) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        self.window, self.limit = _Nowhere(), -1
        os.ftruncate(self._fd, at)

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
                self._reserved = goal
                return


class WrittenStorage:
    """Frames are written by one `pwrite` each: for file systems on which a mapping is not safe. 1.3 to 2 times the cost."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.window: Window = self
        self.base = 0
        self.limit = 1 << 62

    def __setitem__(self, place: slice, frame: bytes) -> None:
        written = os.pwrite(self._fd, frame, place.start)
        while written < len(frame):  # a full disk takes a part first, and says ENOSPC to the rest
            written += os.pwrite(self._fd, frame[written:], place.start + written)

    def advance(self, at: int, need: int) -> None:
        if at + need > self.limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def finish(self, at: int) -> None:
        self.window, self.limit = _Nowhere(), -1
        os.ftruncate(self._fd, at)


class _Nowhere:
    """The window of a storage that has none: the limit of -1 keeps everybody out of it."""

    def __setitem__(self, place: slice, frame: bytes) -> None:
        raise ValueError("this journal has no window")


def storage_for(fd: int, kind: str | None = None) -> Storage:
    """The storage that suits the file's file system. `kind` "mapped" or "written" decides instead (benchmarks, tests)."""
    if kind is None:
        kind = "mapped" if hasattr(os, "posix_fallocate") and filesystem_of(fd) in MAPPABLE else "written"
    return MappedStorage(fd) if kind == "mapped" else WrittenStorage(fd)


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
