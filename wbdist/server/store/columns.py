"""Rows as compressed columns, exactly: what goes in comes out with the same types and bits.

A column is `f` (all float64), `i` (all int64) or `j` (anything else, as JSON text with bare NaN and Infinity), the values of
the rows that have the key, and a bitmap of which those are when not all do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

_INT64 = range(-(2**63), 2**63)


class Column(msgspec.Struct, array_like=True):
    """One key's values over the `rows` rows of a chunk."""

    kind: str
    rows: int
    present: bytes
    """Packed bits of the rows that have the key; empty when all do."""
    data: bytes

    @classmethod
    def of(cls, values: Sequence[Any], indices: Sequence[int], rows: int) -> Column:
        """The column of `values`, held by the rows `indices`."""
        present = b""
        if len(indices) != rows:
            mask = np.zeros(rows, dtype=bool)
            mask[list(indices)] = True
            present = np.packbits(mask).tobytes()
        kinds = {type(value) for value in values}
        if kinds == {float}:
            return cls("f", rows, present, np.array(values, dtype=np.float64).tobytes())
        if kinds == {int} and all(value in _INT64 for value in values):
            return cls("i", rows, present, np.array(values, dtype=np.int64).tobytes())
        return cls("j", rows, present, json.dumps(list(values), separators=(",", ":")).encode())

    def indices(self) -> npt.NDArray[np.int64]:
        """Which rows have the key."""
        if not self.present:
            return np.arange(self.rows)
        return np.flatnonzero(np.unpackbits(np.frombuffer(self.present, dtype=np.uint8), count=self.rows))

    def values(self) -> list[Any]:
        """The values, in row order, as they were given."""
        if self.kind == "f":
            floats: list[Any] = np.frombuffer(self.data, dtype=np.float64).tolist()
            return floats
        if self.kind == "i":
            ints: list[Any] = np.frombuffer(self.data, dtype=np.int64).tolist()
            return ints
        anything: list[Any] = json.loads(self.data)
        return anything

    def numbers(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """(row indices, values as float64) of the rows whose value is a number."""
        indices = self.indices()
        if self.kind == "f":
            return indices, np.frombuffer(self.data, dtype=np.float64)
        if self.kind == "i":
            return indices, np.frombuffer(self.data, dtype=np.int64).astype(np.float64)
        values = self.values()
        keep = [i for i, value in enumerate(values) if is_number(value)]
        return indices[keep], np.array([_as_float(values[i]) for i in keep], dtype=np.float64)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def split(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Rows to columns; keys in order of first appearance."""
    values: dict[str, list[Any]] = {}
    indices: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for key, value in row.items():
            if key not in values:
                values[key], indices[key] = [], []
            values[key].append(value)
            indices[key].append(index)
    return {key: Column.of(values[key], indices[key], len(rows)) for key in values}


def join(columns: Mapping[str, Column], rows: int) -> list[dict[str, Any]]:
    """Columns back to rows."""
    out: list[dict[str, Any]] = [{} for _ in range(rows)]
    for key, column in columns.items():
        for index, value in zip(column.indices().tolist(), column.values(), strict=True):
            out[index][key] = value
    return out


def concat(parts: Sequence[tuple[int, Column | None]]) -> Column | None:
    """One key's column over consecutive chunks: (rows of the chunk, its column or None where no row has the key)."""
    values: list[Any] = []
    indices: list[int] = []
    offset = 0
    for rows, column in parts:
        if column is not None:
            values.extend(column.values())
            indices.extend((column.indices() + offset).tolist())
        offset += rows
    return Column.of(values, indices, offset) if values else None


def pack(value: dict[str, Column] | Column) -> bytes:
    return zstandard.compress(msgspec.msgpack.encode(value), 1)


def unpack_all(blob: bytes) -> dict[str, Column]:
    return msgspec.msgpack.decode(zstandard.decompress(blob), type=dict[str, Column])


def unpack(blob: bytes) -> Column:
    return msgspec.msgpack.decode(zstandard.decompress(blob), type=Column)


def numeric_keys(columns: Mapping[str, Column]) -> dict[str, bool]:
    """key -> whether it holds a number."""
    return {key: column.kind in "fi" or any(map(is_number, column.values())) for key, column in columns.items()}
