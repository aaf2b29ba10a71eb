"""Files that runs of this machine have saved, found without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from wbdist.core.branch import split_immutable
from wbdist.core.position import FILES, Counts
from wbdist.run.files import STAGED, FileRecord
from wbdist.run.journal import JournalReader, Kind
from wbdist.run.local_history import LocalJournal, LocalRun
from wbdist.run.shipper.control import SHIPPED
from wbdist.run.snapshots import key_of


class LocalVersion(msgspec.Struct, frozen=True):
    path: Path
    saved_at: float
    """Unix seconds."""
    delivered: bool
    """The server has every version of the journal that names this one."""


def newest(run: LocalRun, name: str) -> LocalVersion | None:
    """The newest version of `name` that the run's newest attempt shows and whose contents are here, whole."""
    for journals, limits in _segments(run):
        found = [version for journal in journals for version in _versions(journal, name, limits)]
        if found:
            return max(found, key=lambda version: version.saved_at)
    return None


def _segments(run: LocalRun) -> Iterator[tuple[list[LocalJournal], Counts | None]]:
    """The journals of each attempt that is part of the history, newest first, and how much of them is."""
    number, limits = run.attempt, None
    while journals := [journal for journal in run.journals if journal.header.attempt == number]:
        yield journals, limits
        header = journals[0].header
        if header.base is None:
            return
        if header.base_run:
            run = LocalRun(run.root, run.project, run.entity, split_immutable(header.base_run)[0])
        number, limits = header.base.attempt, header.base.counts


def _versions(journal: LocalJournal, name: str, limits: Counts | None) -> Iterator[LocalVersion]:
    limit = None if limits is None else limits.get(FILES, {}).get(journal.header.writer, 0)
    delivered = journal.path.with_name(journal.path.name + SHIPPED).exists()
    seq = 0
    with JournalReader.open(journal.path) as reader:
        while records := reader.read():
            for record in records:
                if record.kind is not Kind.FILE:
                    continue
                if limit is not None and seq >= limit:
                    return
                seq += 1
                file = msgspec.convert(record.data, FileRecord)
                if file.name == name and (path := _contents(journal, file)) is not None:
                    yield LocalVersion(path, record.time, delivered)


def _contents(journal: LocalJournal, file: FileRecord) -> Path | None:
    """Where they lie; None when they do not, or another process may have written half of something else there."""
    path = Path(file.path)
    if path.parent.name == STAGED:
        path = journal.path.parent / STAGED / path.name  # also when the run's directory has been moved
    try:
        facts = path.stat()
    except OSError:
        return None
    in_place = file.path == file.source
    return None if in_place and file.key != key_of(facts) else path
