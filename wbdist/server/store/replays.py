"""Lines of W&B's own client that the run has already: it sends them again when a run is synced twice.

Its offsets do not tell: it counts on from what the server has. Its steps do, which only grow, and the times in its lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.position import CONSOLE, EVENTS, HISTORY
from wbdist.server.store import reading
from wbdist.server.store.schema import attempts
from wbdist.server.store.views import View


class Known(msgspec.Struct, frozen=True):
    """What a run shows when lines come for its current attempt."""

    view: View
    last_step: int

    def repeated(self, db: sa.Connection, stream: str, lines: Sequence[Any]) -> int:
        """How many of the first `lines` the run has: rows of its history by their step, others by their time where they are
        older than the attempt they come to. A living process repeats nothing."""
        if stream == HISTORY:
            return _count([_number(row.get("_step")) for row in lines], self.last_step)
        first = _time(stream, lines[0]) if lines and len(self.view.segments) > 1 else None
        own = self.view.segments[-1]
        begun_at = None if first is None else db.execute(_STARTED, {"key": own.run, "number": own.attempt}).scalar()
        if first is None or begun_at is None or first >= begun_at:
            return 0
        last = _last_time(db, msgspec.structs.replace(self.view, segments=self.view.segments[:-1]), stream)
        return 0 if last is None else _count([_time(stream, line) for line in lines], last)


_STARTED = sa.select(attempts.c.started_at).where(
    (attempts.c.run_pk == sa.bindparam("key")) & (attempts.c.attempt == sa.bindparam("number"))
)


def _count(marks: Sequence[float | None], last: float) -> int:
    return next((at for at, mark in enumerate(marks) if mark is None or mark > last), len(marks))


def _last_time(db: sa.Connection, view: View, stream: str) -> float | None:
    if stream == EVENTS:
        tail = reading.tail(db, view, EVENTS)
        return None if tail is None else _time(EVENTS, tail)
    total = view.total(CONSOLE)
    found = reading.console(db, view, total - 1, 1) if total else []
    return _time(CONSOLE, found[0]) if found else None


def _time(stream: str, line: Any) -> float | None:
    """Unix seconds; of a console line the time it begins with, after `ERROR `."""
    if stream == EVENTS:
        return _number(line.get("_timestamp"))
    text = line.removeprefix("ERROR ").partition(" ")[0]
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() if "T" in text else None
    except ValueError:
        return None


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
