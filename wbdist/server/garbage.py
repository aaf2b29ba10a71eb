"""Contents that no version of a file and no artifact refers to any more: of deleted runs, and of uploads that were cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from wbdist.server.files import FileStore

if TYPE_CHECKING:
    from wbdist.server.store.interface import Store


class Freed(msgspec.Struct, frozen=True):
    contents: int
    bytes: int
    kept: int
    """Contents that something refers to, or that are too young to tell."""


def collect(store: Store, files: FileStore, before: float, *, dry_run: bool = False) -> Freed:
    """Removes what nothing refers to and was last received before `before` (Unix seconds); `dry_run` only counts.

    Safe while servers work on both: a content is received (again) before a row names it, and what was received lately stays.
    So `before` must lie further back than a request lasts from its file's last byte to its row.
    """
    named = store.files.contents()
    contents = size = kept = 0
    for sha256 in files.contents():
        freed = None if sha256 in named else files.remove(sha256, before, dry_run=dry_run)
        if freed is None:
            kept += 1
        else:
            contents += 1
            size += freed
    return Freed(contents, size, kept)
