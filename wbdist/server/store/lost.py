"""How much training an attempt did in vain: what it logged beyond the point from which the run went on."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from wbdist.core.attempts import Segment
from wbdist.core.position import HISTORY
from wbdist.server.store.chunks import Key, load_many, points
from wbdist.server.store.columns import steps_of
from wbdist.server.store.schema import chunks
from wbdist.server.store.views import View, view_of


def lost_seconds(db: sa.Connection, view: View, attempt: int) -> float:
    """Seconds of run time between an attempt's last visible row, or what it was built on, and its last row; by the rows' own
    `_runtime`, so that what a job spent in a queue, or after its last row, does not count."""
    end = _runtime(db, view, [Segment(attempt, None, view.run_pk)])
    if end is None or view.written(HISTORY, attempt) == view.live(HISTORY, attempt):
        return 0.0
    own = view.own(attempt)
    kept = None if own is None else _runtime(db, view, [own])
    if kept is None:
        before = view_of(db, view.run_pk, attempt)
        kept = _runtime(db, before, [segment for segment in before.segments if segment != before.own(attempt)])
    return max(0.0, end - (kept or 0.0))


def _runtime(db: sa.Connection, view: View, segments: Sequence[Segment]) -> float | None:
    """`_runtime` of the last row that the newest of `segments` with rows shows; None without one."""
    for segment in reversed(segments):
        found = []
        for writer, count in view.visible(segment, HISTORY).items():
            where = Key(segment.run, segment.attempt, view.lane, HISTORY, writer).where() & (chunks.c.seq_lo < count)
            newest = sa.select(chunks.c.pk, chunks.c.seq_lo, chunks.c.seq_hi).where(where).order_by(chunks.c.seq_lo.desc())
            pk, low, high = db.execute(newest.limit(1)).one()
            held = load_many(db, [pk], ["_runtime", "_step"])[pk]
            if "_runtime" in held:
                _, values = points(held["_runtime"], steps_of(held, high - low), count - low)
                found += values[-1:].tolist()
        if found:
            return float(max(found))
    return None
