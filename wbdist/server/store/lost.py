"""How much training an attempt did in vain: what it logged beyond the point from which the run went on."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from wbdist.core.attempts import Segment
from wbdist.core.position import HISTORY
from wbdist.server.store.chunks import Key, load_many
from wbdist.server.store.schema import chunks
from wbdist.server.store.views import View, view_of


def lost_seconds(db: sa.Connection, view: View, attempt: int) -> float:
    """Seconds of run time between an attempt's last visible row, or what it was built on, and its last row; by the rows' own
    `_runtime`, so that what a job spent in a queue, or after its last row, does not count."""
    end = last_value(db, view, [Segment(attempt, None, view.run_pk)])
    if end is None or view.written(HISTORY, attempt) == view.live(HISTORY, attempt):
        return 0.0
    own = view.own(attempt)
    kept = None if own is None else last_value(db, view, [own])
    if kept is None:
        before = view_of(db, view.run_pk, attempt)
        kept = last_value(db, before, [segment for segment in before.segments if segment != before.own(attempt)])
    return max(0.0, end - (kept or 0.0))


def last_value(
    db: sa.Connection, view: View, segments: Sequence[Segment], stream: str = HISTORY, key: str = "_runtime"
) -> float | None:
    """`key` of the last line that the newest of `segments` with lines shows; None without one."""
    for segment in reversed(segments):
        found = []
        for writer, count in view.visible(segment, stream).items():
            where = Key(segment.run, segment.attempt, view.lane, stream, writer).where() & (chunks.c.seq_lo < count)
            newest = sa.select(chunks.c.pk, chunks.c.seq_lo).where(where).order_by(chunks.c.seq_lo.desc())
            pk, low = db.execute(newest.limit(1)).one()
            held = load_many(db, [pk], [key])[pk]
            if key in held:
                places, values = held[key].numbers()
                found += values[places < count - low][-1:].tolist()
        if found:
            return float(max(found))
    return None
