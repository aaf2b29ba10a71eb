"""Lines of a stream, from JSON text to chunks and back to charts.

Two levels: an append makes one chunk whose blob holds all its columns (one small insert), and when PACK_AT of them lie side by
side they are packed into one chunk with a row per column in `columns`, so that a chart reads only what it draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import orjson
import sqlalchemy as sa

from wbdist.core.position import CONSOLE
from wbdist.server.store import columns as cols
from wbdist.server.store.interface import Bucket
from wbdist.server.store.schema import chunks, columns, console_lines

PACK_AT = 64
"""Chunks packed into one."""
LOOK_EVERY = 16
"""Appends of all runs between looks whether there is something to pack: a look costs more than a small append."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Key(msgspec.Struct, frozen=True):
    """Names one sequence of lines."""

    run_pk: int
    attempt: int
    lane: str
    stream: str
    writer: str

    def where(self) -> sa.ColumnElement[bool]:
        return (
            (chunks.c.run_pk == self.run_pk)
            & (chunks.c.attempt == self.attempt)
            & (chunks.c.lane == self.lane)
            & (chunks.c.stream == self.stream)
            & (chunks.c.writer == self.writer)
        )


def parse(stream: str, lines: Sequence[str]) -> list[Any]:
    """JSON objects of a history or events stream, texts of the console. Raises ValueError naming the line."""
    if stream == CONSOLE:
        return list(lines)
    out = []
    for number, line in enumerate(lines):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            # Bare NaN and Infinity, as W&B's SDK writes them, and integers beyond 64 bits.
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {stream} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {stream} is {type(row).__name__}, not a JSON object")
        out.append(row)
    return out


def step_of(row: dict[str, Any]) -> int:
    step = row.get("_step", -1)
    return int(step) if cols.is_number(step) and abs(step) < 2**62 else -1


def store(db: sa.Connection, insert: Callable[[sa.Table], Any], key: Key, first: int, batch: Sequence[Any]) -> None:
    """Writes `batch` as the lines from seq `first`; the caller has made sure that they are new (console lines may be not)."""
    if key.stream == CONSOLE:
        where = {"run_pk": key.run_pk, "attempt": key.attempt, "lane": key.lane, "writer": key.writer}
        rows = [{**where, "seq": first + i, "line": line} for i, line in enumerate(batch)]
        statement = insert(console_lines)
        replaced = {"line": statement.excluded.line}
        db.execute(statement.on_conflict_do_update(index_elements=[*where, "seq"], set_=replaced), rows)
        return
    split = cols.split(batch)
    steps = [step_of(row) for row in batch]
    values = {name: getattr(key, name) for name in Key.__struct_fields__}
    done = db.execute(
        sa.insert(chunks).values(
            **values,
            seq_lo=first,
            seq_hi=first + len(batch),
            step_lo=min(steps),
            step_hi=max(steps),
            level=0,
            keys=json.dumps(cols.numeric_keys(split)),
            blob=cols.pack(split),
        )
    )
    primary = done.inserted_primary_key
    if primary is not None and primary[0] % LOOK_EVERY == 0:
        _pack_small(db, key)


def _pack_small(db: sa.Connection, key: Key) -> None:
    small = sa.select(chunks.c.pk, chunks.c.seq_lo, chunks.c.seq_hi, chunks.c.step_lo, chunks.c.step_hi, chunks.c.blob)
    found = db.execute(small.where(key.where() & (chunks.c.level == 0)).order_by(chunks.c.seq_lo)).all()
    while len(found) >= PACK_AT:
        group, found = found[:PACK_AT], found[PACK_AT:]
        parts = [(chunk.seq_hi - chunk.seq_lo, cols.unpack_all(chunk.blob)) for chunk in group]
        merged = {
            name: column
            for name in dict.fromkeys(name for _, part in parts for name in part)
            if (column := cols.concat([(rows, part.get(name)) for rows, part in parts])) is not None
        }
        db.execute(sa.delete(chunks).where(chunks.c.pk.in_([chunk.pk for chunk in group])))
        values = {name: getattr(key, name) for name in Key.__struct_fields__}
        done = db.execute(
            sa.insert(chunks).values(
                **values,
                seq_lo=group[0].seq_lo,
                seq_hi=group[-1].seq_hi,
                step_lo=min(chunk.step_lo for chunk in group),
                step_hi=max(chunk.step_hi for chunk in group),
                level=1,
                keys=json.dumps(cols.numeric_keys(merged)),
                blob=None,
            )
        )
        primary = done.inserted_primary_key
        assert primary is not None
        rows = [{"chunk_pk": primary[0], "key": name, "blob": cols.pack(column)} for name, column in merged.items()]
        if rows:
            db.execute(sa.insert(columns), rows)


def load_columns(db: sa.Connection, chunk: sa.Row[Any], keys: Sequence[str] | None) -> dict[str, cols.Column]:
    """The columns of one chunk: those in `keys` that it has, or all."""
    if chunk.blob is not None:
        every = cols.unpack_all(chunk.blob)
        return every if keys is None else {key: every[key] for key in keys if key in every}
    statement = sa.select(columns.c.key, columns.c.blob).where(columns.c.chunk_pk == chunk.pk)
    if keys is not None:
        statement = statement.where(columns.c.key.in_(keys))
    return {row.key: cols.unpack(row.blob) for row in db.execute(statement)}


def bucketed(steps: Ints, values: Floats, buckets: int) -> list[Bucket]:
    """At most `buckets` buckets of equal width in steps; one a value when there are no more values than that.

    Minimum, maximum and mean are over the numbers; a bucket of NaN alone is NaN.
    """
    if len(steps) == 0:
        return []
    if len(steps) <= buckets:
        return [Bucket(int(s), int(s), 1, float(v), float(v), float(v), float(v)) for s, v in zip(steps, values, strict=True)]
    low, high = int(steps.min()), int(steps.max())
    which = ((steps - low).astype(np.float64) * (buckets / (high - low + 1))).astype(np.int64)
    order = np.argsort(which, kind="stable")
    which, steps, values = which[order], steps[order], values[order]
    starts = np.flatnonzero(np.r_[True, which[1:] != which[:-1]])
    ends = np.r_[starts[1:], len(which)] - 1
    with np.errstate(invalid="ignore", over="ignore"):
        real = ~np.isnan(values)
        counts = np.add.reduceat(real.astype(np.int64), starts)
        sums = np.add.reduceat(np.where(real, values, 0.0), starts)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        lows = np.fmin.reduceat(values, starts)
        highs = np.fmax.reduceat(values, starts)
    return [
        Bucket(int(steps[a]), int(steps[b]), int(b - a + 1), float(lo), float(hi), float(mean), float(values[b]))
        for a, b, lo, hi, mean in zip(starts, ends, lows, highs, means, strict=True)
    ]
