"""Reading a view: rows, charts, the last line, the console."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import sqlalchemy as sa

from wbdist.core.attempts import Segment
from wbdist.core.position import CONSOLE, HISTORY
from wbdist.server.store import columns as cols
from wbdist.server.store.chunks import MANY, Chunk, ColumnCache, Key, load_many, points
from wbdist.server.store.columns import Column, Floats, Ints, steps_of
from wbdist.server.store.interface import Bucket
from wbdist.server.store.rollups import WIDTH, Blocks, bucketed
from wbdist.server.store.schema import chunks, columns, console_lines
from wbdist.server.store.views import View, chunks_of

_PAGE = 512
"""Rows made at a time: a caller that wants one row of a chunk of 32,768 does not wait for all."""
_TOGETHER = 1000
_HELD = 2**22
"""Metrics whose charts are made together, and about how many numbers of theirs are held at a time."""
_RAW = 2 * WIDTH
"""Values a bucket above which rollups are fine enough for a chart."""


def live_rows(
    db: sa.Connection,
    view: View,
    stream: str,
    cache: ColumnCache,
    *,
    keys: Sequence[str] | None = None,
    min_step: int = 0,
    max_step: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Visible rows in order: by attempt, then as written; several writers of one attempt are merged by step.

    With `keys`, those keys of the rows that have all of them. Rows without a step belong to the unbounded read only.
    """
    out: list[dict[str, Any]] = []
    for segment in view.segments:
        found = chunks_of(db, view, segment, stream, min_step=min_step, max_step=max_step, keys=keys is None)
        writers = [_rows(db, part, cache, keys, (min_step, max_step)) for part in found.values()]
        merged = writers[0] if len(writers) == 1 else heapq.merge(*writers, key=itemgetter(0))
        for _, row in merged:
            if limit is not None and len(out) >= limit:
                return out
            out.append(row)
    return out


def _rows(
    db: sa.Connection, found: Sequence[Chunk], cache: ColumnCache, keys: Sequence[str] | None, between: tuple[int, int | None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, row) of one writer's chunks."""
    wanted = None if keys is None else list(dict.fromkeys(keys))
    min_step, max_step = between
    bounded = min_step > 0 or max_step is not None
    for chunk in found:
        names = list(chunk.numeric) if wanted is None else list(dict.fromkeys([*wanted, "_step"]))
        loaded = cache.load(db, chunk, names)
        if wanted is not None and not all(key in loaded for key in wanted):
            continue
        steps = steps_of(loaded, chunk.rows)[: chunk.visible]
        keep = np.ones(len(steps), dtype=bool)
        if bounded:
            keep &= steps >= max(0, min_step)
            if max_step is not None:
                keep &= steps < max_step
        for key in wanted or ():
            where = loaded[key].index
            if where is not None:
                having = np.zeros(chunk.rows, dtype=bool)
                having[where] = True
                keep &= having[: chunk.visible]
        chosen = np.flatnonzero(keep)
        shown = loaded if wanted is None else {key: loaded[key] for key in wanted}
        while len(chosen):
            low, high = int(chosen[0]), int(chosen[0]) + _PAGE
            count = int(np.searchsorted(chosen, high))
            page, chosen = chosen[:count], chosen[count:]
            rows = cols.join(shown, low, int(page[-1]) + 1)
            for at, step in zip((page - low).tolist(), steps[page].tolist(), strict=True):
                yield step, rows[at]


def series(db: sa.Connection, view: View, keys: Sequence[str], buckets: int) -> dict[str, list[Bucket]]:
    """Metrics, downsampled: from rollups when they are fine enough, else from their values. Without those that have none.

    Many are read together: to look a chunk over for each would take a time in the square of their number.
    """
    found: list[Chunk] = []
    for segment in view.segments:
        for part in chunks_of(db, view, segment, HISTORY).values():
            found += part
    out: dict[str, list[Bucket]] = {}
    rows = sum(chunk.visible for chunk in found)
    each = min(rows, _RAW * buckets) + rows * len(Blocks._fields) // WIDTH
    together = max(1, min(_TOGETHER, _HELD // max(each, 1)))
    for at in range(0, len(keys), together):
        made = _series(db, found, keys[at : at + together], buckets)
        out |= {key: shown for key, shown in made.items() if shown}
    return out


def _series(db: sa.Connection, found: Sequence[Chunk], keys: Sequence[str], buckets: int) -> dict[str, list[Bucket]]:
    out: dict[str, list[Bucket]] = {}
    whole = {chunk.pk for chunk in found if not chunk.whole and chunk.visible == chunk.rows}
    ready, odd = _rollups(db, list(whole), keys)
    fine = [key for key in keys if sum(part.total for part in ready[key].values()) > _RAW * buckets]
    rest = _values(db, [chunk for chunk in found if chunk.pk not in whole], fine) if fine else {}
    for key in fine:
        values = rest[key]
        if odd[key]:
            values |= _values(db, [chunk for chunk in found if chunk.pk in odd[key]], [key])[key]
        blocks = ready[key] | {pk: Blocks.of_values(*part) for pk, part in values.items()}
        ordered, apart = Blocks.join([blocks[chunk.pk] for chunk in found if chunk.pk in blocks]).in_order()
        # Where steps run back within or across blocks, buckets of blocks would overlap: its values are read, alone.
        out[key] = bucketed(ordered, buckets) if apart else _bucketed_values(_values(db, found, [key])[key], buckets)
    coarse = [key for key in keys if key not in out]
    for key, held in (_values(db, found, coarse) if coarse else {}).items():
        out[key] = _bucketed_values(held, buckets)
    return out


def _bucketed_values(held: dict[int, tuple[Ints, Floats]], buckets: int) -> list[Bucket]:
    if not held:
        return []
    steps, numbers = (np.concatenate(part) for part in zip(*held.values(), strict=True))
    return bucketed(Blocks.of_values(steps, numbers).in_order()[0], buckets)


def _rollups(
    db: sa.Connection, pks: Sequence[int], keys: Sequence[str]
) -> tuple[dict[str, dict[int, Blocks]], dict[str, set[int]]]:
    """key -> chunk pk -> its rollup, and key -> chunks where it has none: not all of its values are numbers."""
    ready: dict[str, dict[int, Blocks]] = {key: {} for key in keys}
    odd: dict[str, set[int]] = {key: set() for key in keys}
    select = sa.select(columns.c.chunk_pk, columns.c.key, columns.c.rollup).where(columns.c.key.in_(keys))
    for at in range(0, len(pks), MANY):
        for pk, key, blob in db.execute(select.where(columns.c.chunk_pk.in_(pks[at : at + MANY]))):
            if blob is None:
                odd[key].add(pk)
            else:
                ready[key][pk] = Blocks.unpack(blob)
    return ready, odd


def _values(db: sa.Connection, found: Sequence[Chunk], keys: Sequence[str]) -> dict[str, dict[int, tuple[Ints, Floats]]]:
    """key -> chunk pk -> steps and values of what is visible, in order; without the chunks that lack the key."""
    loaded = load_many(db, [chunk.pk for chunk in found], [*keys, "_step"])
    out: dict[str, dict[int, tuple[Ints, Floats]]] = {key: {} for key in keys}
    for chunk in found:
        held = loaded.pop(chunk.pk)
        steps = steps_of(held, chunk.rows)
        for key in keys:
            if key in held:
                out[key][chunk.pk] = points(held[key], steps, chunk.visible)
    return out


def first_value(db: sa.Connection, view: View, key: str) -> Any:
    """A metric's first visible number by step, None when there is none."""
    first: tuple[int, Any] | None = None
    for segment in view.segments:
        for found in chunks_of(db, view, segment, HISTORY).values():
            for chunk in found:
                values = _values(db, [chunk], [key])[key]
                if chunk.pk in values and len(values[chunk.pk][0]):
                    steps, numbers = values[chunk.pk]
                    first = min((int(steps[0]), float(numbers[0])), first or (int(steps[0]), float(numbers[0])))
                    break
        if first is not None:
            break
    return None if first is None else first[1]


def tail(db: sa.Connection, view: View, stream: str) -> dict[str, Any] | None:
    """The last visible line of a stream of objects; of several writers', the one with the greatest step."""
    for segment in reversed(view.segments):
        last = last_lines(db, view, segment, stream)
        if last:
            return max(last, key=itemgetter(0))[1]
    return None


def last_lines(db: sa.Connection, view: View, segment: Segment, stream: str) -> list[tuple[int, dict[str, Any]]]:
    """(step, line) of each writer's last visible line."""
    last: list[tuple[int, dict[str, Any]]] = []
    for writer, count in view.visible(segment, stream).items():
        key = Key(segment.run, segment.attempt, view.lane, stream, writer)
        where = key.where() & (chunks.c.seq_lo < count)
        newest = sa.select(chunks.c.pk, chunks.c.seq_lo, chunks.c.seq_hi).where(where).order_by(chunks.c.seq_lo.desc())
        pk, low, high = db.execute(newest.limit(1)).one()
        loaded: dict[str, Column] = load_many(db, [pk], None)[pk]
        at = count - 1 - low
        last.append((int(steps_of(loaded, high - low)[at]), cols.join(loaded, at, at + 1)[0]))
    return last


def console(db: sa.Connection, view: View, first: int, limit: int) -> list[str]:
    """Visible console lines [first, first + limit): by attempt, then by writer."""
    out: list[str] = []
    for segment in view.segments:
        for writer, count in view.visible(segment, CONSOLE).items():
            low, high = min(first, count), min(first + limit - len(out), count)
            first -= low
            if high <= low:
                continue
            where = {"run_pk": segment.run, "attempt": segment.attempt, "lane": view.lane, "writer": writer}
            statement = sa.select(console_lines.c.line).filter_by(**where).order_by(console_lines.c.seq)
            out += db.execute(statement.where((console_lines.c.seq >= low) & (console_lines.c.seq < high))).scalars()
    return out
