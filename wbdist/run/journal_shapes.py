"""The shapes of rows that a writer has met: what it needs to pack the next row of one without looking it over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

from wbdist.run.journal_format import FRAME_HEAD, PACKED_HEAD, Kind, Schema

MAX_SCHEMAS: Final = 1024
"""Shapes of rows that are packed; further ones (a script with ever new keys) are written in full, so memory stays bounded."""

_HEAD: Final = FRAME_HEAD.size
_PACKED: Final = (Kind.ROW_PACKED, Kind.ROW_PACKED_COMMIT)


class Shape:
    """A schema and, when its rows can be packed in place, the frame they are packed into: one, over and over."""

    __slots__ = ("body", "frame", "in_place", "keys", "length", "number", "pack_into", "schema", "size", "types")

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.keys = schema.keys
        self.types: tuple[type, ...] | None = schema.types
        self.number = schema.number
        self.in_place = schema.plain
        self.pack_into: Callable[..., None] = schema.packed.pack_into
        self.size = schema.packed.size
        """Of the body."""
        self.length = _HEAD + self.size
        self.frame = bytearray(self.length)
        self.body = memoryview(self.frame)[_HEAD:]

    def holds(self, frame: bytes | bytearray, seq: int) -> bool:
        """Whether `frame`, of this shape's length, is the packed row `seq` of this shape: another shape may be as long."""
        found, kind, number, _step, _time = PACKED_HEAD.unpack_from(frame, _HEAD)
        return found == seq and kind in _PACKED and number == self.number

    def row_in(self, frame: bytes | bytearray) -> dict[str, Any]:
        return self.schema.decode(memoryview(frame), _HEAD + PACKED_HEAD.size)


NO_SHAPE: Final = Shape(Schema(0, (), ""))
"""No row has it."""
NO_SHAPE.types = None


class Shapes:
    """Of one journal."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], Shape] = {}
        """keys -> the shape used last for them."""
        self._all: dict[tuple[tuple[str, ...], str], Shape] = {}
        self._numbers = itertools.count()

    def find(self, data: object) -> Shape | None:
        """The known shape whose rows are packed in place that `data` has as it is. None also for what is no mapping."""
        if not isinstance(data, Mapping):
            return None
        shape = self._last.get(tuple(data))
        return shape if shape is not None and shape.in_place and shape.types == tuple(map(type, data.values())) else None

    def of(self, row: Mapping[str, Any]) -> tuple[Shape | None, bool]:
        """The shape of a plain row, and whether it is new and to be declared and added; None: write the row in full."""
        keys = tuple(row)
        codes = "".join([Schema.CODES.get(type(value), "x") for value in row.values()])
        if "x" in codes:
            return None, False
        shape = self._all.get((keys, codes))
        if shape is None:
            if len(self._all) >= MAX_SCHEMAS:
                return None, False
            return Shape(Schema(next(self._numbers), keys, codes)), True
        self._last[keys] = shape
        return shape, False

    def add(self, shape: Shape) -> None:
        """`shape` has been declared in the journal."""
        self._all[shape.keys, shape.schema.codes] = self._last[shape.keys] = shape

    def __len__(self) -> int:
        return len(self._all)
