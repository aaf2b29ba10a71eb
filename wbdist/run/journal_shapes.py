"""The shapes of rows that a writer has met: what it needs to pack the next row of one without looking it over.

`log` spends half of its time in `Shape.fill`, so that is compiled (`_packing.c`) where the package was built with a compiler.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from typing import Any, Final, Protocol
from zlib import crc32

from wbdist.run.journal_format import FRAME_HEAD, PACKED_HEAD, Kind, Schema

try:
    from wbdist.run._packing import Packer
except ImportError:  # built without a compiler
    COMPILED = False
else:
    COMPILED = True

MAX_SCHEMAS: Final = 1024
"""Shapes of rows that are packed; further ones (a script with ever new keys) are written in full, so memory stays bounded."""

_HEAD: Final = FRAME_HEAD.size
_head_into: Final = FRAME_HEAD.pack_into
_PACKED: Final = (int(Kind.ROW_PACKED), int(Kind.ROW_PACKED_COMMIT))


class Fill(Protocol):
    """Makes a row's frame in that of its shape. False, with the frame left as it was or emptied, when `data` is no row of the
    shape, or a number is too large for its place. Never raises."""

    def __call__(self, data: Any, seq: int, kind: int, step: int, time: float, /) -> bool: ...


class Shape:
    """A schema and, when its rows can be packed in place, the frame they are packed into: one, over and over."""

    __slots__ = ("fill", "frame", "in_place", "keys", "length", "number", "schema", "types")

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.keys = schema.keys
        self.types = schema.types
        self.number = schema.number
        self.in_place = schema.plain
        self.length = _HEAD + schema.packed.size
        self.frame = bytearray(self.length)
        self.fill: Fill = _fill_nothing
        if schema.plain:
            self.fill = compiled_filler(schema, self.frame) if COMPILED else python_filler(schema, self.frame)

    def holds(self, frame: bytes | bytearray, seq: int) -> bool:
        """Whether `frame`, of this shape's length, is the packed row `seq` of this shape: another shape may be as long."""
        found, kind, number, _step, _time = PACKED_HEAD.unpack_from(frame, _HEAD)
        return found == seq and kind in _PACKED and number == self.number

    def row_in(self, frame: bytes | bytearray) -> dict[str, Any]:
        return self.schema.decode(memoryview(frame), _HEAD + PACKED_HEAD.size)


def compiled_filler(schema: Schema, frame: bytearray) -> Fill:
    """Takes exact dicts of exact floats, ints and bools only."""
    return Packer(schema.keys, schema.codes, schema.number, frame).fill


def python_filler(schema: Schema, frame: bytearray) -> Fill:
    """Takes any mapping with such values."""
    keys, types, number, pack_into = schema.keys, schema.types, schema.number, schema.packed.pack_into
    body = memoryview(frame)[_HEAD:]
    size = len(body)

    def fill(data: Mapping[str, Any], seq: int, kind: int, step: int, time: float, /) -> bool:
        try:
            values = data.values()
            if keys != tuple(data) or types != tuple(map(type, values)):
                return False
            pack_into(frame, _HEAD, seq, kind, number, step, time, *values)
            _head_into(frame, 0, size, crc32(body, size))
        except (AttributeError, TypeError):  # no mapping
            return False
        except struct.error:  # a number too large for its place: those before it lie in the frame now
            frame[:] = bytes(len(frame))
            return False
        return True

    return fill


def _fill_nothing(_data: object, _seq: int, _kind: int, _step: int, _time: float, /) -> bool:
    return False


NO_SHAPE: Final = Shape(Schema(0, (), ""))
"""No row has it."""
NO_SHAPE.fill = _fill_nothing


class Shapes:
    """Of one journal."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], Shape] = {}
        """keys -> the shape used last for them."""
        self._all: dict[tuple[tuple[str, ...], str], Shape] = {}
        self._numbers = itertools.count()

    def find(self, data: object) -> Shape | None:
        """The known shape whose rows are packed in place that `data` has as it is. None also for what is no mapping."""
        if type(data) is not dict and not isinstance(data, Mapping):
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
