"""Rows as compressed columns, exactly: what goes in comes out with the same types and bits.

In memory a column is numbers in numpy arrays, or a list of anything else, and the rows that have the key. On disk:

| code | values                              | data                                                              |
|------|-------------------------------------|-------------------------------------------------------------------|
| f, F | float                               | float64; F: bytes shuffled (all first bytes, all second, ...)     |
| i, I | int of 64 bits                      | int64; I: differences, shuffled                                   |
| M    | float and int (up to 2**53) mixed   | float64, shuffled, then one bit a value: it was an int            |
| j    | anything else                       | JSON with bare NaN and Infinity                                   |

Shuffling and differences halve what zstd leaves of a smooth curve, and turn steps into nearly nothing; below SHORT values
they cost more time than they save bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from wbdist.core.floats import nearest_float
from wbdist.server.store.anytext import escape, unescape

SHORT = 64
_EXACT = 2**53

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Stored(msgspec.Struct, array_like=True):
    """A column on disk."""

    kind: str
    rows: int
    present: bytes
    """Packed bits of the rows that have the key; empty when all do."""
    data: bytes


class Column:
    """One key's values over the `rows` rows of a chunk. Immutable."""

    __slots__ = ("data", "index", "ints", "kind", "rows")

    def __init__(self, kind: str, rows: int, index: Ints | None, data: Any, ints: npt.NDArray[np.bool_] | None = None) -> None:
        """kind: `f` or `i` (numpy data), `m` (float64 data; `ints` says which were int), `j` (list). `index`: the rows that
        have the key, None when all do."""
        self.kind = kind
        self.rows = rows
        self.index = index
        self.data = data
        self.ints = ints

    @classmethod
    def of(cls, values: Sequence[Any], index: Sequence[int] | Ints | None, rows: int) -> Column:
        """The column of `values`, held by the rows `index` (None: all)."""
        where = None if index is None or len(index) == rows else np.asarray(index, dtype=np.int64)
        kinds = set(map(type, values))
        if kinds == {float}:
            return cls("f", rows, where, np.array(values, dtype=np.float64))
        if kinds == {int}:
            try:
                return cls("i", rows, where, np.array(values, dtype=np.int64))
            except OverflowError:
                return cls("j", rows, where, list(values))
        if kinds == {int, float}:
            ints = np.fromiter((type(value) is int for value in values), dtype=bool, count=len(values))
            if all(-_EXACT <= value <= _EXACT for value in values if type(value) is int):
                return cls("m", rows, where, np.array(values, dtype=np.float64), ints)
        return cls("j", rows, where, list(values))

    def __len__(self) -> int:
        return len(self.data)

    def indices(self) -> Ints:
        """Which rows have the key."""
        return np.arange(self.rows) if self.index is None else self.index

    def span(self, low: int, high: int) -> tuple[int, int]:
        """Positions of the values of rows [low, high)."""
        if self.index is None:
            return low, min(high, self.rows)
        start, stop = np.searchsorted(self.index, (low, high))
        return int(start), int(stop)

    def values(self, start: int = 0, stop: int | None = None) -> list[Any]:
        """The values at positions [start, stop), as they were given."""
        out: list[Any] = self.data[start:stop] if self.kind == "j" else self.data[start:stop].tolist()
        if self.kind == "m":
            assert self.ints is not None
            return [int(v) if is_int else v for v, is_int in zip(out, self.ints[start:stop].tolist(), strict=True)]
        return out

    def numbers(self) -> tuple[Ints, Floats]:
        """(rows, values as float64) of the values that are numbers."""
        if self.kind != "j":
            return self.indices(), self.data if self.data.dtype == np.float64 else self.data.astype(np.float64)
        keep = [i for i, value in enumerate(self.data) if is_number(value)]
        return self.indices()[keep], np.array([nearest_float(self.data[i]) for i in keep], dtype=np.float64)

    def numeric(self, stop: int | None = None) -> bool:
        """Whether a number is among the first `stop` values."""
        if self.kind != "j":
            return len(self.data[:stop]) > 0
        return any(map(is_number, self.data[:stop]))

    def last(self, stop: int) -> int:
        """Position of the last of the first `stop` values that is not None; -1 when there is none."""
        if self.kind != "j":
            return stop - 1
        return next((at for at in reversed(range(stop)) if self.data[at] is not None), -1)

    def weight(self) -> int:
        """Bytes in memory, roughly."""
        return 64 * len(self.data) + sum(map(len, filter(_sized, self.data))) if self.kind == "j" else int(self.data.nbytes)

    def stored(self) -> Stored:
        present = b""
        if self.index is not None:
            mask = np.zeros(self.rows, dtype=bool)
            mask[self.index] = True
            present = np.packbits(mask).tobytes()
        if self.kind == "j":
            # The standard library's: it writes every int, NaN, infinities and lone surrogates so that it reads them back.
            return Stored("j", self.rows, present, json.dumps(self.data, separators=(",", ":")).encode())
        if self.kind == "m":
            assert self.ints is not None
            return Stored("M", self.rows, present, _shuffled(self.data) + np.packbits(self.ints).tobytes())
        if len(self.data) < SHORT:
            return Stored(self.kind, self.rows, present, self.data.tobytes())
        data = np.diff(self.data, prepend=np.int64(0)) if self.kind == "i" else self.data  # differences wrap, and so come back
        return Stored(self.kind.upper(), self.rows, present, _shuffled(data))

    @classmethod
    def restored(cls, stored: Stored) -> Column:
        index = None
        if stored.present:
            index = np.flatnonzero(np.unpackbits(np.frombuffer(stored.present, dtype=np.uint8), count=stored.rows))
        count = stored.rows if index is None else len(index)
        kind, rows = stored.kind, stored.rows
        if kind == "j":
            return cls("j", rows, index, json.loads(stored.data))
        if kind == "f":
            return cls("f", rows, index, np.frombuffer(stored.data, dtype=np.float64))
        if kind == "i":
            return cls("i", rows, index, np.frombuffer(stored.data, dtype=np.int64))
        raw = _unshuffled(stored.data[: 8 * count])
        if kind == "F":
            return cls("f", rows, index, raw.view(np.float64))
        if kind == "I":
            return cls("i", rows, index, np.cumsum(raw.view(np.int64)))
        if kind == "M":
            bits = np.unpackbits(np.frombuffer(stored.data[8 * count :], dtype=np.uint8), count=count)
            return cls("m", rows, index, raw.view(np.float64), bits.astype(bool))
        raise ValueError(f"column of unknown kind {kind!r}: written by a newer version?")


def _sized(value: object) -> bool:
    return isinstance(value, str | list | dict)


def _shuffled(data: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1, 8).T.tobytes()


def _unshuffled(data: bytes) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(np.frombuffer(data, dtype=np.uint8).reshape(8, -1).T).reshape(-1)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def split(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Rows to columns; keys in order of first appearance."""
    names = tuple(rows[0]) if rows else ()
    if names and all(tuple(row) == names for row in rows):  # the usual case: every row comes from the same line of a script
        transposed = zip(*map(dict.values, rows), strict=True)  # type: ignore[arg-type]
        return {name: Column.of(values, None, len(rows)) for name, values in zip(names, transposed, strict=True)}
    values: dict[str, list[Any]] = {}
    indices: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for key, value in row.items():
            if key not in values:
                values[key], indices[key] = [], []
            values[key].append(value)
            indices[key].append(index)
    return {key: Column.of(values[key], indices[key], len(rows)) for key in values}


def join(columns: Mapping[str, Column], low: int, high: int) -> list[dict[str, Any]]:
    """Rows [low, high) of these columns."""
    out: list[dict[str, Any]] = [{} for _ in range(high - low)]
    for key, column in columns.items():
        start, stop = column.span(low, high)
        values = column.values(start, stop)
        if column.index is None:
            for row, value in zip(out, values, strict=True):
                row[key] = value
        else:
            for at, value in zip((column.index[start:stop] - low).tolist(), values, strict=True):
                out[at][key] = value
    return out


def concat(parts: Sequence[tuple[int, Column | None]]) -> Column:
    """One key's column over consecutive chunks: (rows of the chunk, its column or None where no row has the key)."""
    total = sum(rows for rows, _ in parts)
    have: list[Column] = []
    indices: list[Ints] = []
    offset = 0
    for rows, column in parts:
        if column is not None:
            have.append(column)
            indices.append(column.indices() + offset)
        offset += rows
    index = np.concatenate(indices)
    where = None if len(index) == total else index
    kinds = {column.kind for column in have}
    if kinds in ({"f"}, {"i"}):
        return Column(kinds.pop(), total, where, np.concatenate([column.data for column in have]))
    if "j" not in kinds and all(_fits_float(column) for column in have if column.kind == "i"):
        data = np.concatenate([column.data.astype(np.float64) for column in have])
        return Column("m", total, where, data, np.concatenate([_which_int(column) for column in have]))
    return Column.of([value for column in have for value in column.values()], where, total)


def _fits_float(column: Column) -> bool:
    return bool(np.all((column.data >= -_EXACT) & (column.data <= _EXACT)))


def _which_int(column: Column) -> npt.NDArray[np.bool_]:
    return np.full(len(column), column.kind == "i") if column.ints is None else column.ints


def steps_of(loaded: Mapping[str, Column], rows: int) -> Ints:
    """The step of each row; -1 for a row that has none, or nothing that a step can be."""
    out = np.full(rows, -1, dtype=np.int64)
    column = loaded.get("_step")
    if column is not None:
        where, steps = column.numbers()
        # An int column skips the detour through floats, which lose above 2**53.
        exact = column.data if column.kind == "i" else np.where((steps >= 0) & (steps < 2**62), steps, -1).astype(np.int64)
        out[where] = np.where((exact >= 0) & (exact < 2**62), exact, -1)
    return out


def pack(column: Column) -> bytes:
    return zstandard.compress(msgspec.msgpack.encode(column.stored()), 1)


def unpack(blob: bytes) -> Column:
    return Column.restored(msgspec.msgpack.decode(zstandard.decompress(blob), type=Stored))


def pack_all(columns: Mapping[str, Column]) -> bytes:
    """All columns of a chunk in one blob."""
    return zstandard.compress(msgspec.msgpack.encode({escape(key): column.stored() for key, column in columns.items()}), 1)


def unpack_all(blob: bytes, keys: Sequence[str] | None = None) -> dict[str, Column]:
    """The columns of such a blob, or those in `keys` that it has."""
    stored = msgspec.msgpack.decode(zstandard.decompress(blob), type=dict[str, Stored])
    if keys is None:
        return {unescape(key): Column.restored(column) for key, column in stored.items()}
    return {key: Column.restored(stored[escape(key)]) for key in keys if escape(key) in stored}
