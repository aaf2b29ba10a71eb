"""Which versions of files lie below a cut through a run's history."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from wbdist.core.position import FILES, Watermark
from wbdist.server.store.schema import file_versions
from wbdist.server.store.views import View

SERVER = "sdk"
"""Writer of the versions that came without a stamp, which the server numbers; the name that their lines have, too."""


def cut(db: sa.Connection, view: View, run: int, attempt: int, step: int) -> dict[str, int]:
    """writer -> how many of its visible versions arrived before the run went beyond `step`."""
    segment = next(segment for segment in view.segments if (segment.run, segment.attempt) == (run, attempt))
    visible = view.visible(segment, FILES)
    statement = sa.select(file_versions.c.writer, sa.func.min(file_versions.c.seq)).where(
        (file_versions.c.run_pk == run)
        & (file_versions.c.attempt == attempt)
        & (file_versions.c.lane == view.lane)
        & (file_versions.c.step > step)
    )
    beyond = {writer: int(seq) for writer, seq in db.execute(statement.group_by(file_versions.c.writer))}
    counts = {writer: min(count, beyond.get(writer, count)) for writer, count in visible.items()}
    return {writer: count for writer, count in counts.items() if count}


def with_unstamped(db: sa.Connection, run: int, base: Watermark) -> Watermark:
    """A client's watermark counts its own uploads only; those that others made until its step belong below it too."""
    if SERVER in base.counts.get(FILES, {}):
        return base
    statement = sa.select(sa.func.count(file_versions.c.pk)).where(
        (file_versions.c.run_pk == run)
        & (file_versions.c.attempt == base.attempt)
        & (file_versions.c.lane == "")
        & (file_versions.c.writer == SERVER)
        & (file_versions.c.step <= base.step)
    )
    found = int(db.execute(statement).scalar_one())
    if not found:
        return base
    counts = base.counts | {FILES: {**base.counts.get(FILES, {}), SERVER: found}}
    return msgspec.structs.replace(base, counts=counts)
