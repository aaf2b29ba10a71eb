"""Where an attempt's wall-clock time went, from its marks and its last signs of life; see `core/goodput.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from wbdist.core.attempts import Segment
from wbdist.core.goodput import OWN, Life, Mark, kept_steps, phases_of, read_mark
from wbdist.core.position import EVENTS, HISTORY, PHASES
from wbdist.server.store.chunks import ColumnCache
from wbdist.server.store.interface import AttemptRow
from wbdist.server.store.lost import last_value
from wbdist.server.store.reading import last_lines, live_rows
from wbdist.server.store.views import View

FEW = 32
"""Marks that are looked at where one is searched: at one step there are up to five."""
_KEYS = ("n", "phase", "_step", "_timestamp", *OWN)


def timed(
    db: sa.Connection, view: View, rows: Sequence[AttemptRow], forks: frozenset[int], cache: ColumnCache
) -> list[AttemptRow]:
    """`rows`, all attempts of one run, with their phases; as they are when none has a mark. `forks`: attempts that are built on
    another run."""
    if not any(view.written(PHASES, row.attempt) for row in rows):
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
                seen=max((sign for sign in signs if sign is not None), default=0.0),
                base=(row.base_attempt, row.base_step) if on_own and row.base_attempt is not None else None,
                lost=row.lost_seconds,
            )
        )
    kept = kept_steps(lives)
    lives = [msgspec.structs.replace(one, marks=_marks(db, view, one.attempt, kept.get(one.attempt), cache)) for one in lives]
    found = phases_of(lives)
    if not found:
        return list(rows)
    return [msgspec.structs.replace(row, phases=found[row.attempt], lost_seconds=found[row.attempt]["lost"]) for row in rows]


def _marks(db: sa.Connection, view: View, attempt: int, kept: float | None, cache: ColumnCache) -> list[Mark]:
    """Those that count, in order, each once: the first ones, the last, those about a queue, and where what is kept ends. An
    attempt has two for each save, and pages ask again and again."""
    whole = msgspec.structs.replace(view, segments=(Segment(attempt, None, view.run_pk),))
    rows = live_rows(db, whole, PHASES, cache, limit=FEW)
    rows += live_rows(db, whole, PHASES, cache, keys=[*_KEYS, "submitted"])
    if kept is not None and math.isfinite(kept):
        rows += live_rows(db, whole, PHASES, cache, min_step=int(kept) + 1, limit=FEW)
    rows += [row for _, row in last_lines(db, whole, whole.segments[0], PHASES)]
    found: dict[int, Mark] = {}
    for row in rows:
        at = row.get("_timestamp")
        mark = read_mark(row, float(at)) if isinstance(at, int | float) else None
        if mark is not None:
            found[mark.number] = mark
    return [found[number] for number in sorted(found)]
