"""Which versions of files, and which words about artifacts, lie below a cut through a run's history."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from wbdist.core.position import ARTIFACTS, FILES, Counts, Watermark
from wbdist.server.store.artifact_schema import lines
from wbdist.server.store.schema import file_versions
from wbdist.server.store.views import View

SERVER = "sdk"
"""Writer of what came without a stamp, which the server numbers; the name that such lines have, too."""
TABLES = {FILES: file_versions, ARTIFACTS: lines}
"""Streams whose lines remember the run's last step at their arrival."""


def cut(db: sa.Connection, view: View, run: int, attempt: int, step: int) -> Counts:
    """stream -> writer -> how many of its visible lines arrived before the run went beyond `step`."""
    segment = next(segment for segment in view.segments if (segment.run, segment.attempt) == (run, attempt))
    out: Counts = {}
    for stream, table in TABLES.items():
        beyond = sa.select(table.c.writer, sa.func.min(table.c.seq)).where(
            (table.c.run_pk == run) & (table.c.attempt == attempt) & (table.c.lane == view.lane) & (table.c.step > step)
        )
        limits = {writer: int(seq) for writer, seq in db.execute(beyond.group_by(table.c.writer))}
        counts = {writer: min(count, limits.get(writer, count)) for writer, count in view.visible(segment, stream).items()}
        if kept := {writer: count for writer, count in counts.items() if count}:
            out[stream] = kept
    return out


def with_unstamped(db: sa.Connection, run: int, base: Watermark) -> Watermark:
    """A client's watermark counts its own lines only; those that others made until its step belong below it too."""
    counts = dict(base.counts)
    for stream, table in TABLES.items():
        if SERVER in counts.get(stream, {}):
            continue
        last = sa.select(sa.func.max(table.c.seq)).where(
            (table.c.run_pk == run)
            & (table.c.attempt == base.attempt)
            & (table.c.lane == "")
            & (table.c.writer == SERVER)
            & (table.c.step <= base.step)
        )
        found = db.execute(last).scalar()
        if found is not None:
            counts[stream] = {**counts.get(stream, {}), SERVER: int(found) + 1}
    return base if counts == base.counts else msgspec.structs.replace(base, counts=counts)
