"""Where an attempt's wall-clock time went, from its marks and its last signs of life; see `core/goodput.py`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from wbdist.core.attempts import Segment
from wbdist.core.goodput import Life, Mark, phases_of, read_mark
from wbdist.core.position import EVENTS, HISTORY, PHASES
from wbdist.server.store.chunks import ColumnCache
from wbdist.server.store.interface import AttemptRow
from wbdist.server.store.lost import last_value
from wbdist.server.store.reading import live_rows
from wbdist.server.store.views import View


def timed(
    db: sa.Connection, view: View, rows: Sequence[AttemptRow], forks: frozenset[int], cache: ColumnCache
) -> list[AttemptRow]:
    """`rows`, all attempts of one run, with their phases; as they are when none has a mark. `forks`: attempts that are built on
    another run."""
    marks = {row.attempt: _marks(db, view, row.attempt, cache) for row in rows if view.written(PHASES, row.attempt)}
    if not any(marks.values()):
        return list(rows)
    lives = []
    for row in rows:
        on_own = row.base_attempt is not None and row.attempt not in forks
        segments = [Segment(row.attempt, None, view.run_pk)]
        signs = (last_value(db, view, segments, stream, "_timestamp") for stream in (HISTORY, EVENTS))
        lives.append(
            Life(
                attempt=row.attempt,
                started=row.started_at,
                marks=marks.get(row.attempt, []),
                seen=max((sign for sign in signs if sign is not None), default=0.0),
                base=(row.base_attempt, row.base_step) if on_own and row.base_attempt is not None else None,
                lost=row.lost_seconds,
            )
        )
    found = phases_of(lives)
    return [msgspec.structs.replace(row, phases=found[row.attempt], lost_seconds=found[row.attempt]["lost"]) for row in rows]


def _marks(db: sa.Connection, view: View, attempt: int, cache: ColumnCache) -> list[Mark]:
    """In order; of several writers (an aggregator that was lost, and the next) each mark once."""
    whole = msgspec.structs.replace(view, segments=(Segment(attempt, None, view.run_pk),))
    found: dict[int, Mark] = {}
    for row in live_rows(db, whole, PHASES, cache):
        at = row.get("_timestamp")
        mark = read_mark(row, float(at)) if isinstance(at, int | float) else None
        if mark is not None:
            found.setdefault(mark.number, mark)
    return [found[number] for number in sorted(found)]
