"""The tail of the run's history inside a checkpoint: journal bytes that no server has yet, or that one could lose.

    history-<rank>/<journal>.<n>     bytes [n * SEGMENT, (n + 1) * SEGMENT) of the journal, up to the checkpoint's cut

A journal only grows, so a whole segment is the same in every later checkpoint and is linked, not copied: a save writes
at most SEGMENT bytes besides what is new, however long the server is away, and each checkpoint is complete by itself.
The files are in the manifest like all others: what does not match its digest makes the checkpoint a bad one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import FileEntry, Manifest
from wbdist.core.tails import JournalCopy, JournalPrefix
from wbdist.errors import CheckpointError

log = logging.getLogger("wbdist.checkpoint")

SEGMENT = 16 << 20
"""Bytes."""
_DIRECTORY = "history-"
_CHUNK = 1 << 20


class Kept(msgspec.Struct, frozen=True):
    """The history that one rank put into a committed checkpoint: whole segments of it are linked into the next one."""

    directory: Path = Path()
    files: dict[str, FileEntry] = {}


def is_history(name: str) -> bool:
    """Whether a manifest's file is part of the tail."""
    return name.startswith(_DIRECTORY)


def write_history(
    layer: FileLayer,
    temporary: Path,
    rank: int,
    prefixes: Sequence[JournalPrefix],
    earlier: Kept,
) -> dict[str, FileEntry]:
    """Puts `prefixes` into the checkpoint being made at `temporary`, durably; the manifest's entries for them.

    `earlier`: of the checkpoint this rank made before. Raises OSError, CheckpointError when a journal is shorter than it was
    said to be.
    """
    if not prefixes:
        return {}
    directory = temporary / f"{_DIRECTORY}{rank}"
    layer.make_directory(directory)
    written: dict[str, FileEntry] = {}
    for prefix in prefixes:
        for number, start in enumerate(range(0, prefix.size, SEGMENT)):
            name = f"{directory.name}/{prefix.name}.{number:03d}"
            size = min(SEGMENT, prefix.size - start)
            known = earlier.files.get(name)
            if known is not None and known.size == size == SEGMENT:
                try:
                    layer.link(earlier.directory / name, temporary / name)
                except OSError as error:  # no links here, or somebody removed that checkpoint
                    log.info("%s cannot be linked (%s): it is copied", earlier.directory / name, error)
                else:
                    written[name] = known
                    continue
            written[name] = _copy(layer, prefix, start, size, temporary / name)
    layer.sync_directory(directory)
    return written


def _copy(layer: FileLayer, prefix: JournalPrefix, start: int, size: int, target: Path) -> FileEntry:
    with open(prefix.path, "rb", buffering=0) as source, layer.writing(target) as stream:
        source.seek(start)
        left = size
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise CheckpointError(f"journal {prefix.path} ends {left} bytes before the cut: it was cut short by somebody")
            stream.write(data)
            left -= len(data)
    return stream.entry()


def copies(manifest: Manifest) -> dict[int, tuple[JournalCopy, ...]]:
    """The journals in a committed checkpoint, by the rank that put them there."""
    found: dict[tuple[int, str], list[str]] = {}
    for name in sorted(manifest.files):
        if is_history(name):
            place, _, file = name.partition("/")
            journal = file.rpartition(".")[0]
            found.setdefault((int(place.removeprefix(_DIRECTORY)), journal), []).append(str(Path(manifest.directory) / name))
    out: dict[int, tuple[JournalCopy, ...]] = {}
    for (rank, _), segments in found.items():
        out[rank] = (*out.get(rank, ()), JournalCopy(tuple(segments)))
    return out


def share(manifest: Manifest | None, rank: int, world_size: int, *, one_run: bool) -> tuple[JournalCopy, ...]:
    """What of a checkpoint's tail rank `rank` brings back: its own, and rank 0 those of ranks that are no more.

    `one_run`: all ranks have one run, which is rank 0's to bring back.
    """
    if manifest is None:
        return ()
    of_rank = copies(manifest)
    takes = [r for r in of_rank if (0 if one_run or r >= world_size else r) == rank]
    return tuple(copy for r in takes for copy in of_rank[r])
