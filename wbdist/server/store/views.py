"""What of a run is visible: the live view of its attempts, applied to cursors and chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa

from wbdist.core.attempts import Segment, live_view
from wbdist.core.position import HISTORY, Watermark
from wbdist.protocol.jsonvalues import dumps
from wbdist.server.store import columns as cols
from wbdist.server.store import lines as lining
from wbdist.server.store.schema import attempts, chunks, cursors, runs


class View(msgspec.Struct):
    """The live view of one attempt, and how far each of its writers has got."""

    run_pk: int
    segments: tuple[Segment, ...]
    cursors: dict[int, dict[str, dict[str, int]]]
    """attempt -> stream -> writer -> next seq, in the attempts' own lanes."""

    def written(self, stream: str, attempt: int) -> int:
        """Lines of an attempt, seen or not."""
        return sum(self.cursors.get(attempt, {}).get(stream, {}).values())

    def live(self, stream: str, attempt: int) -> int:
        """Lines of an attempt that are visible."""
        segment = next((s for s in self.segments if s.attempt == attempt), None)
        return 0 if segment is None else self._visible(segment, stream)

    def total(self, stream: str) -> int:
        """Visible lines."""
        return sum(self._visible(segment, stream) for segment in self.segments)

    def below(self, stream: str, attempt: int) -> int:
        """Lines that an attempt is built on: the W&B offset of its first. Counted by the watermarks, whether they have
        arrived or not, so that the number does not depend on the order of arrival."""
        total = 0
        for segment in self.segments:
            if segment.attempt < attempt:
                limits = segment.limits
                total += self._visible(segment, stream) if limits is None else sum(limits.get(stream, {}).values())
        return total

    def _visible(self, segment: Segment, stream: str) -> int:
        written = self.cursors.get(segment.attempt, {}).get(stream, {})
        if segment.limits is None:
            return sum(written.values())
        limits = segment.limits.get(stream, {})
        return sum(min(count, limits.get(writer, 0)) for writer, count in written.items())


def view_of(db: sa.Connection, pk: int, attempt: int) -> View:
    """The view of `attempt`; of attempt 0 (a plain SDK run) everything outside attempts."""
    bases: dict[int, Watermark | None] = {0: None}
    for row in db.execute(sa.select(attempts.c.attempt, attempts.c.base).where(attempts.c.run_pk == pk)):
        bases[row.attempt] = None if row.base is None else msgspec.json.decode(row.base, type=Watermark)
    where = (cursors.c.run_pk == pk) & (cursors.c.lane == "")
    found: dict[int, dict[str, dict[str, int]]] = {}
    statement = sa.select(cursors.c.attempt, cursors.c.stream, cursors.c.writer, cursors.c.next).where(where)
    for at, stream, writer, count in db.execute(statement):
        found.setdefault(at, {}).setdefault(stream, {})[writer] = count
    segments = live_view(bases, attempt) if attempt in bases else ()
    return View(pk, segments, found)


def live_chunks(
    db: sa.Connection,
    view: View,
    stream: str,
    *,
    min_step: int | None = None,
    max_step: int | None = None,
    newest_first: bool = False,
) -> Iterator[tuple[sa.Row[Any], int]]:
    """(chunk, how many of its first rows are visible), in order."""
    segments = reversed(view.segments) if newest_first else view.segments
    for segment in segments:
        where = (
            (chunks.c.run_pk == view.run_pk)
            & (chunks.c.attempt == segment.attempt)
            & (chunks.c.lane == "")
            & (chunks.c.stream == stream)
        )
        if min_step is not None and min_step > 0:
            where &= chunks.c.step_hi >= min_step
        if max_step is not None:
            where &= chunks.c.step_lo < max_step
        order = [chunks.c.step_lo, chunks.c.writer, chunks.c.seq_lo]
        statement = sa.select(chunks).where(where).order_by(*([c.desc() for c in order] if newest_first else order))
        for chunk in db.execute(statement):
            rows = chunk.seq_hi - chunk.seq_lo
            if segment.limits is not None:
                rows = min(rows, segment.limits.get(stream, {}).get(chunk.writer, 0) - chunk.seq_lo)
            if rows > 0:
                yield chunk, rows


def live_rows(
    db: sa.Connection,
    view: View,
    stream: str,
    *,
    keys: Sequence[str] | None = None,
    min_step: int = 0,
    max_step: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Visible rows in order. With `keys`, those keys of the rows that have all of them."""
    out: list[dict[str, Any]] = []
    wanted = None if keys is None else list(dict.fromkeys(keys))
    for chunk, visible in live_chunks(db, view, stream, min_step=min_step, max_step=max_step):
        having = json.loads(chunk.keys)
        if wanted is not None and not all(key in having for key in wanted):
            continue
        load = None if wanted is None else list(dict.fromkeys([*wanted, "_step"]))
        for row in cols.join(lining.load_columns(db, chunk, load), chunk.seq_hi - chunk.seq_lo)[:visible]:
            step = lining.step_of(row)
            if step >= 0 and (step < min_step or (max_step is not None and step >= max_step)):
                continue
            if wanted is None:
                out.append(row)
            elif all(key in row for key in wanted):
                out.append({key: row[key] for key in wanted})
            if limit is not None and len(out) >= limit:
                return out
    return out


def live_columns(db: sa.Connection, view: View, key: str) -> tuple[lining.Ints, lining.Floats]:
    """(steps, numbers) of one metric, in order."""
    steps: list[lining.Ints] = []
    values: list[lining.Floats] = []
    for chunk, visible in live_chunks(db, view, HISTORY):
        if not json.loads(chunk.keys).get(key):
            continue
        loaded = lining.load_columns(db, chunk, [key, "_step"])
        where, numbers = loaded[key].numbers()
        if "_step" not in loaded:
            continue
        step_rows, step_numbers = loaded["_step"].numbers()
        at = np.full(chunk.seq_hi - chunk.seq_lo, -1, dtype=np.int64)
        at[step_rows] = step_numbers.astype(np.int64)
        keep = (where < visible) & (at[where] >= 0)
        steps.append(at[where[keep]])
        values.append(numbers[keep])
    if not steps:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    return np.concatenate(steps), np.concatenate(values)


def tail(db: sa.Connection, view: View, stream: str) -> dict[str, Any] | None:
    """The last visible line of a stream of objects."""
    for chunk, visible in live_chunks(db, view, stream, newest_first=True):
        return cols.join(lining.load_columns(db, chunk, None), chunk.seq_hi - chunk.seq_lo)[visible - 1]
    return None


def recount(
    db: sa.Connection, pk: int, view: View, *, fresh: Mapping[str, Sequence[Any]] | None = None, summary: bool = False
) -> None:
    """Brings the run's derived columns up to date: from `fresh` lines alone, or, without them, from the whole view."""
    streams = {stream for by in view.cursors.values() for stream in by}
    change: dict[str, Any] = {"line_counts": json.dumps({stream: view.total(stream) for stream in sorted(streams)})}
    if fresh is None:
        change |= _from_all(db, view, summary=summary)
    elif fresh.get(HISTORY):
        known = db.execute(sa.select(runs.c.metrics, runs.c.last_step).where(runs.c.pk == pk)).one()
        # Only what is visible counts: late lines of an older attempt may lie above the newer one's base.
        last = tail(db, view, HISTORY)
        change["last_step"] = max(known.last_step, -1 if last is None else lining.step_of(last))
        metrics = set(json.loads(known.metrics))
        seen = {
            key for row in fresh[HISTORY] for key, value in row.items() if cols.is_number(value) and not key.startswith("_")
        }
        if not seen <= metrics:
            change["metrics"] = json.dumps(sorted(metrics | seen))
    db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change, version=runs.c.version + 1))


def _from_all(db: sa.Connection, view: View, *, summary: bool) -> dict[str, Any]:
    numeric: set[str] = set()
    latest: dict[str, Any] = {}
    last_step = -1
    for chunk, visible in live_chunks(db, view, HISTORY, newest_first=True):
        keys = json.loads(chunk.keys)
        last_step = max(last_step, chunk.step_hi if visible == chunk.seq_hi - chunk.seq_lo else -1)
        partial = visible < chunk.seq_hi - chunk.seq_lo
        unknown = [key for key in keys if key not in latest]
        if not partial and not unknown and all(key in numeric for key, is_numeric in keys.items() if is_numeric):
            continue
        for key, column in lining.load_columns(db, chunk, None if partial else [*unknown, *keys]).items():
            held = [(i, v) for i, v in zip(column.indices().tolist(), column.values(), strict=True) if i < visible]
            if not held:
                continue
            latest.setdefault(key, held[-1][1])
            if any(cols.is_number(value) for _, value in held):
                numeric.add(key)
            if key == "_step":
                last_step = max(last_step, *(int(value) for _, value in held if cols.is_number(value)))
    metrics = json.dumps(sorted(key for key in numeric if not key.startswith("_")))
    change: dict[str, Any] = {"metrics": metrics, "last_step": last_step}
    if summary:
        change["summary"] = dumps(latest)
    return change
