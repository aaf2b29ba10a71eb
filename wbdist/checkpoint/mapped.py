"""Files as memory: read at the disk's speed, without a copy, and with errors where a plain mapping would end the process.

No torch here: verifying checkpoints must work on a machine without it.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

_POPULATE_READ = 22
"""MADV_POPULATE_READ: reads the file now and tells of a bad disk as an error, where a later access would be a SIGBUS."""
_WINDOW = 16 << 20


def mapped(path: Path) -> mmap.mmap:
    """The file, private to this process: what is written into the memory never reaches it. Raises OSError, also for a bad disk;
    ValueError for an empty file, which cannot be mapped."""
    with path.open("rb") as file:
        region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for _ in _windows(file.fileno(), region):
            pass
    return region


def windows(path: Path) -> Iterator[memoryview]:
    """The content of the file in pieces, each valid until the next is asked for. Raises OSError as the system does."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as region:
            for start, length in _windows(file.fileno(), region):
                with memoryview(region)[start : start + length] as window:
                    yield window


def _windows(fd: int, region: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Parts of the file, one after the other, each once it has been read."""
    # Makes the kernel read far ahead, in large pages; asking for a window ahead by name (WILLNEED) took twice as long.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    for start in range(0, len(region), _WINDOW):
        length = min(_WINDOW, len(region) - start)
        try:
            region.madvise(_POPULATE_READ, start, length)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel before 5.14 does not know it; pages come as they are touched
                raise
        yield start, length
