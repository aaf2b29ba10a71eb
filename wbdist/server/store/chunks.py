"""Chunks: immutable runs of consecutive lines of one sequence, and how small ones become large ones.

An append is one chunk whose blob holds all its columns: one small insert. When FAN of them lie side by side they are made
one of the next level, those one of the next, until a chunk is *sealed* at SEAL_ROWS rows or SEAL_CELLS values and stays as
it is. So a run of any length, appended in any portions, is a few sealed chunks and at most FAN of each level below;
every value is rewritten as often as there are levels (twice to four times). Large chunks keep each column by itself, with
the rollup of it, so that a chart reads what it draws and nothing else.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.position import HISTORY
from wbdist.server.store import columns as cols
from wbdist.server.store import rollups
from wbdist.server.store.columns import Column, Floats, Ints, steps_of
from wbdist.server.store.lines import Batch
from wbdist.server.store.schema import chunks, columns

FAN = 32
SEAL_ROWS = 32_768
SEAL_CELLS = 2**20
"""Values; a run of a thousand metrics is sealed by these, so that one merge stays a matter of milliseconds."""
COLUMNAR_CELLS = 2**16
"""From here on each column has its own blob."""
SEALED = 99
"""The level of chunks that are never merged again."""
LOOSE = 1024
"""`cursors.loose` counts in 1/1024 of what triggers a merge of level 0."""
_INSERT = sa.insert(chunks)


class Key(msgspec.Struct, frozen=True):
    """Names one sequence of lines."""

    run_pk: int
    attempt: int
    lane: str
    """'' for lines of the attempt's own nonce; a rival's nonce for what that sent."""
    stream: str
    writer: str

    def where(self) -> sa.ColumnElement[bool]:
        return sa.and_(*(chunks.c[name] == value for name, value in msgspec.structs.asdict(self).items()))


class Chunk(msgspec.Struct, frozen=True):
    """Index entry of a chunk, and how much of it is visible in the view that was asked for."""

    pk: int
    key: Key
    seq_lo: int
    seq_hi: int
    step_hi: int
    whole: bool
    """One blob with all columns; else a row per column."""
    visible: int
    """Its first rows that are visible, at least 1."""
    numeric: dict[str, bool]
    """key -> holds a number; empty when it was not asked for."""

    @property
    def rows(self) -> int:
        return self.seq_hi - self.seq_lo


def store(db: sa.Connection, key: Key, first: int, batch: Batch) -> int:
    """Inserts `batch` as the lines from seq `first`. Returns its share of a merge (see LOOSE)."""
    rows = len(batch.rows)
    values = {
        **msgspec.structs.asdict(key),
        "seq_lo": first,
        "seq_hi": first + rows,
        "step_lo": batch.step_lo,
        "step_hi": batch.step_hi,
        "level": 0,
        "keys": batch.keys,
        "blob": batch.blob,
    }
    db.execute(_INSERT, [values])
    return LOOSE * max(SEAL_CELLS // FAN, rows * SEAL_CELLS // SEAL_ROWS, rows * batch.width) // SEAL_CELLS


def compact(db: sa.Connection, key: Key) -> None:
    """Merges the level 0 chunks of a sequence, higher levels where that filled one, and all that is open when it is enough
    for a sealed chunk: so the chunks of one level always follow each other, and those of higher levels lie before them."""
    entry = [chunks.c.pk, chunks.c.seq_lo, chunks.c.seq_hi, chunks.c.step_lo, chunks.c.step_hi, chunks.c.level]
    statement = sa.select(*entry, chunks.c["keys"]).where(key.where() & (chunks.c.level < SEALED)).order_by(chunks.c.seq_lo)
    open_ones = db.execute(statement).all()
    names = _names(open_ones)
    rows = sum(chunk.seq_hi - chunk.seq_lo for chunk in open_ones)
    if rows >= SEAL_ROWS or rows * len(names) >= SEAL_CELLS:
        _merge(db, key, open_ones, names, SEALED)
        return
    by_level: dict[int, list[Any]] = {}
    for chunk in open_ones:
        by_level.setdefault(chunk.level, []).append(chunk)
    # What a merge adds to a level is counted without being read again; the loop stops at the first level that it does not fill.
    level, group = 0, by_level.get(0, [])
    while len(group) > 1:
        _merge(db, key, group, _names(group), level + 1)
        level += 1
        if len(by_level.get(level, [])) + 1 < FAN:
            return
        group = list(db.execute(statement.where(chunks.c.level == level)))


def _names(found: Sequence[Any]) -> dict[str, bool]:
    """key -> holds a number, over these chunks."""
    out: dict[str, bool] = {}
    for chunk in found:
        for name, numeric in json.loads(chunk.keys).items():
            out[name] = out.get(name, False) or numeric
    return out


def _merge(db: sa.Connection, key: Key, found: Sequence[Any], names: dict[str, bool], level: int) -> None:
    """Puts one chunk of `level` in the place of `found`, which follow each other."""
    pks = [chunk.pk for chunk in found]
    loaded = load_many(db, pks, None)
    rows = found[-1].seq_hi - found[0].seq_lo
    merged = {
        name: cols.concat([(chunk.seq_hi - chunk.seq_lo, loaded[chunk.pk].get(name)) for chunk in found]) for name in names
    }
    db.execute(sa.delete(columns).where(columns.c.chunk_pk.in_(pks)))
    db.execute(sa.delete(chunks).where(chunks.c.pk.in_(pks)))
    whole = level < SEALED and rows * len(names) < COLUMNAR_CELLS
    steps = [chunk.step_lo for chunk in found if chunk.step_lo >= 0]
    values = {
        **msgspec.structs.asdict(key),
        "seq_lo": found[0].seq_lo,
        "seq_hi": found[-1].seq_hi,
        "step_lo": min(steps, default=-1),
        "step_hi": max(chunk.step_hi for chunk in found),
        "level": level,
        "keys": json.dumps(names),
        "blob": cols.pack_all(merged) if whole else None,
    }
    pk = db.execute(sa.insert(chunks).returning(chunks.c.pk), [values]).scalar_one()
    if whole or not merged:
        return
    per_row = steps_of(merged, rows)
    parts = []
    for name, column in merged.items():
        summary = None
        if key.stream == HISTORY and column.numeric():
            summary = rollups.rollup(*points(column, per_row, rows)).pack()
        parts.append({"chunk_pk": pk, "key": name, "blob": cols.pack(column), "rollup": summary})
    db.execute(sa.insert(columns), parts)


def points(column: Column, steps: Ints, visible: int) -> tuple[Ints, Floats]:
    """(steps, numbers) of a column's values in the first `visible` rows that have a step."""
    where, numbers = column.numbers()
    keep = (where < visible) & (steps[where] >= 0)
    return steps[where[keep]], numbers[keep]


# Reading ----------------------------------------------------------------------------------------------

MANY = 500
"""Chunks a statement: every database takes as many parameters."""


def load_many(db: sa.Connection, pks: Sequence[int], keys: Sequence[str] | None) -> dict[int, dict[str, Column]]:
    """chunk pk -> its columns, all or those in `keys` that it has; in few statements."""
    out: dict[int, dict[str, Column]] = {pk: {} for pk in pks}
    for at in range(0, len(pks), MANY):
        part = pks[at : at + MANY]
        wholes = sa.select(chunks.c.pk, chunks.c.blob).where(chunks.c.pk.in_(part) & chunks.c.blob.is_not(None))
        for pk, blob in db.execute(wholes):
            out[pk] = cols.unpack_all(blob, keys)
        singles = sa.select(columns.c.chunk_pk, columns.c.key, columns.c.blob).where(columns.c.chunk_pk.in_(part))
        if keys is not None:
            singles = singles.where(columns.c.key.in_(keys))
        for pk, name, blob in db.execute(singles):
            out[pk][name] = cols.unpack(blob)
    return out


class ColumnCache:
    """Columns of large chunks as last read, up to a number of bytes: pages of one chunk are asked for one after the other.

    A chunk is immutable and named by its lines for ever, its pk is not (a database may give it out again).
    """

    def __init__(self, most: int = 64 * 2**20) -> None:
        self._most = most
        self._held = 0
        self._entries: OrderedDict[tuple[Key, int, int, str], Column] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, db: sa.Connection, chunk: Chunk, keys: Sequence[str]) -> dict[str, Column]:
        """The columns of `chunk` among `keys`, through the cache unless it is small."""
        if chunk.whole:
            return load_many(db, [chunk.pk], keys)[chunk.pk]
        name = (chunk.key, chunk.seq_lo, chunk.seq_hi)
        out: dict[str, Column] = {}
        with self._lock:
            for key in keys:
                if (held := self._entries.get((*name, key))) is not None:
                    self._entries.move_to_end((*name, key))
                    out[key] = held
        missing = [key for key in keys if key not in out]
        if missing:
            fresh = load_many(db, [chunk.pk], missing)[chunk.pk]
            out |= fresh
            with self._lock:
                for key, column in fresh.items():
                    if self._entries.setdefault((*name, key), column) is column:
                        self._held += column.weight()
                while self._held > self._most:
                    self._held -= self._entries.popitem(last=False)[1].weight()
        return {key: out[key] for key in keys if key in out}
