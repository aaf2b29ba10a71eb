"""Which process of W&B's own client sent lines: its requests do not say, its clock does.

Time of a line less the run's time at it is when the process began, within milliseconds: one number for all of its lines. So a
process that a newer one has taken the run over from, and which goes on, is known by its old rows, and does not write among
the new ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from wbdist.core.attempts import Segment
from wbdist.core.position import EVENTS, HISTORY
from wbdist.core.states import TERMINAL, RunState
from wbdist.server.store import reading
from wbdist.server.store.replays import STARTED
from wbdist.server.store.schema import attempts
from wbdist.server.store.views import View, view_of

_SAME = 1.0
"""Seconds that two lines of one process may differ: clocks are corrected. Two processes of one run seldom begin so close."""
_EXIT = "exit"
_BEFORE = (
    sa.select(attempts.c.attempt, attempts.c.end_cause, attempts.c.frozen)
    .where((attempts.c.run_pk == sa.bindparam("key")) & (attempts.c.attempt < sa.bindparam("number")))
    .order_by(attempts.c.attempt.desc())
    .limit(1)
)


def sender(db: sa.Connection, pk: int, current: int, lines: Mapping[str, Sequence[Any]]) -> int:
    """The attempt that lines without a stamp belong to: the one before `current` when that did not end by its own word and the
    lines are its process's rather than the current one's; else `current`, as for lines from before it was begun, which are
    synced from disk."""
    before = db.execute(_BEFORE, {"key": pk, "number": current}).first()
    if before is None or before.end_cause == _EXIT or _ended(before.frozen):
        return current
    view = view_of(db, pk, current)
    for stream in (HISTORY, EVENTS):
        began = _began(lines[stream][-1]) if lines.get(stream) else None
        if began is None:
            continue
        if lines[stream][-1]["_timestamp"] < db.execute(STARTED, {"key": pk, "number": current}).scalar_one():
            return current
        own, other = (_began(_last(db, view, number, stream)) for number in (current, before.attempt))
        if other is not None and abs(began - other) <= _SAME and (own is None or abs(began - own) > _SAME):
            return int(before.attempt)
        return current
    return current


def _ended(frozen: str | None) -> bool:
    """Whether the run had ended by its own word when the newer attempt took over."""
    state = RunState(json.loads(frozen)["state"]) if frozen is not None else RunState.RUNNING
    return state in TERMINAL - {RunState.CRASHED, RunState.PREEMPTED}


def _last(db: sa.Connection, view: View, attempt: int, stream: str) -> Any:
    alone = View(view.run_pk, (Segment(attempt, None, view.run_pk),), view.cursors)
    return reading.tail(db, alone, stream)


def _began(line: Any) -> float | None:
    if not isinstance(line, dict):
        return None
    at, runtime = _number(line.get("_timestamp")), _number(line.get("_runtime"))
    return None if at is None or runtime is None else at - runtime


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
