"""Copies of files as they are at one moment, as cheap as the file system allows."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

_FICLONE: Final = 0x40049409
"""ioctl: the target shares the source's blocks until one of them is written (btrfs, XFS, bcachefs)."""
_NO_CLONE: Final = frozenset(
    {errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)
_TRIES: Final = 3

Key = tuple[int, int, int, int]
"""What tells a file's contents from later ones without reading them: device, inode, size, time of change in ns."""


def key_of(facts: os.stat_result) -> Key:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def snapshot(source: Path, target: Path, limit: int | None) -> Key | None:
    """`target` holds what `source` holds now; returns what identifies that. The rename at its end makes it visible whole.

    Costs nothing where blocks can be shared; else it is a copy, and none is made of more than `limit` bytes (None is then
    returned). A source that is written meanwhile is copied again, up to three times. Raises OSError.
    """
    temporary = target.with_name(target.name + ".new")
    try:
        for _ in range(_TRIES):
            with source.open("rb") as reading, temporary.open("wb") as writing:
                before = os.fstat(reading.fileno())
                if not _cloned(reading.fileno(), writing.fileno()):
                    if limit is not None and before.st_size > limit:
                        return None
                    shutil.copyfileobj(reading, writing, 1 << 20)
                after = os.fstat(reading.fileno())
            if key_of(before) == key_of(after):
                break
        temporary.replace(target)
        return key_of(after)
    finally:
        temporary.unlink(missing_ok=True)


def _cloned(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


def place(source: Path, target: Path) -> bool:
    """Makes `target` show `source`: by symbolic link, else by hard link, else as a copy (False then). Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        if target.samefile(source):
            return True
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    linked = True
    for link in (os.symlink, os.link):
        try:
            link(source, temporary)
            break
        except OSError:
            continue
    else:
        shutil.copyfile(source, temporary)
        linked = False
    temporary.replace(target)
    return linked
