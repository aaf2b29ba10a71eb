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
"""MADV_POPULATE_READ."""
_WINDOW = 16 << 20


def mapped(path: Path) -> mmap.mmap:
    """The file, private to this process: what is written into the memory never reaches it. `populate` what is to be read.

    Raises OSError as the system does, ValueError for an empty file, which cannot be mapped.
    """
    with path.open("rb") as file:
        # Makes the kernel read far ahead, in large pages; asking for what comes next by name (WILLNEED) took twice as long.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def populate(region: mmap.mmap, start: int, end: int) -> None:
    """Reads these bytes of a mapped file now. Raises OSError for a bad disk, where touching them would be a SIGBUS."""
    start -= start % mmap.PAGESIZE
    end = min(end, len(region))
    if start < end:
        try:
            region.madvise(_POPULATE_READ, start, end - start)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel before 5.14 does not know it; pages come as they are touched
                raise


def windows(path: Path) -> Iterator[memoryview]:
    """The content of the file in pieces, each valid until the next is asked for. Raises OSError as the system does."""
    if not path.stat().st_size:
        return
    with mapped(path) as region:
        for start in range(0, len(region), _WINDOW):
            populate(region, start, start + _WINDOW)
            with memoryview(region)[start : start + _WINDOW] as window:
                yield window
