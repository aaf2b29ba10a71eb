"""The bytes of one data file: boxes of tensors, laid out as safetensors, planned before anything is copied.

    u64 length of the header | header: JSON, padded with spaces to a whole page | the boxes' bytes, without holes

A *box* is the part of a tensor that one rank writes: the whole of it, some of its first dimension's rows, or a shard. The
header says where in the whole tensor it lies, under the key that torch.distributed.checkpoint's safetensors storage uses
(`DCP_SHARDING_INFO`), so that a directory of such files is readable by it and, file by file, by anything that reads
safetensors. Chosen over DCP's own `.distcp`: no pickle, a layout known before the state is copied (so that the copy *is*
the file), pages that can be written past the page cache and mapped on reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import Any

import msgspec
import torch

from wbdist.errors import CheckpointCorruptError

SUFFIX = ".safetensors"
PAGE = 4096
_SHARDING = "DCP_SHARDING_INFO"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
"""What safetensors can name. Others are stored as bytes, with one dimension more; `state.json` knows their type."""


class Box(msgspec.Struct, frozen=True):
    """A part of the tensor `name`, as this rank holds it."""

    name: str
    tensor: torch.Tensor
    """Its values: live ones before staging, the staged ones after it."""
    offset: tuple[int, ...]
    """Where its first element lies in the whole tensor."""


class Place(msgspec.Struct, frozen=True):
    """Where the bytes of a box lie in the file."""

    box: Box
    start: int

    def within(self, file: torch.Tensor) -> torch.Tensor:
        """The box's part of `file`, which is the whole file as bytes, with the box's own type and shape."""
        source = self.box.tensor
        return file[self.start : self.start + source.nbytes].view(source.dtype).view(source.shape)


class Layout(msgspec.Struct, frozen=True):
    """One data file before it has its data."""

    header: bytes
    places: tuple[Place, ...]
    size: int
    """Bytes of the whole file."""


def lay_out(boxes: Iterable[Box]) -> Layout:
    """The file that holds `boxes`; names are unique. Does not look at any values."""
    # Larger elements first: every box is aligned for its own type then, without holes.
    ordered = sorted(boxes, key=lambda box: -box.tensor.itemsize)
    header, starts, size = _plan(tuple((box.name, box.tensor.dtype, box.tensor.shape, box.offset) for box in ordered))
    return Layout(header, tuple(map(Place, ordered, starts)), size)


@lru_cache(maxsize=8)  # from save to save it is the same
def _plan(boxes: tuple[tuple[str, torch.dtype, torch.Size, tuple[int, ...]], ...]) -> tuple[bytes, tuple[int, ...], int]:
    """Header, where each box starts, size of the file: of boxes by name, type, shape and offset."""
    entries: dict[str, Any] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    starts = []
    position = 0
    for name, dtype, whole, offset in boxes:
        known = _TYPES.get(dtype)
        shape = [*whole] if known else [*whole, dtype.itemsize]
        end = position + dtype.itemsize * prod(whole)
        entries[name] = {"dtype": known or "U8", "shape": shape, "data_offsets": [position, end]}
        offsets[name] = {"saved_offsets": [*offset] if known else [*offset, 0]}
        starts.append(position)
        position = end
    said = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: json.dumps(offsets)}, **entries}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    header = len(text).to_bytes(8, "little") + text
    return header, tuple(len(header) + start for start in starts), len(header) + position


class Stored(msgspec.Struct, frozen=True):
    """A box in a file, as the file's header tells of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    start: int
    end: int

    def within(self, file: torch.Tensor, dtype: torch.dtype) -> Box:
        """Its values, in `file`, which is the whole file as bytes; `dtype` is that of the whole tensor."""
        shape, offset = self.shape, self.offset
        if dtype not in _TYPES:
            shape, offset = shape[:-1], offset[:-1]
        elif _TYPES[dtype] != self.dtype:
            raise CheckpointCorruptError(f"tensor {self.name!r} is stored as {self.dtype}, but should be {_TYPES[dtype]}")
        return Box(self.name, file[self.start : self.end].view(dtype).view(shape), offset)


def parse(file: torch.Tensor, path: str) -> list[Stored]:
    """What the file at `path`, given as bytes, says it holds. Raises CheckpointCorruptError."""
    try:
        length = int.from_bytes(file[:8].numpy().tobytes(), "little")
        if not 0 < length <= len(file) - 8:
            raise ValueError(f"a header of {length} bytes in a file of {len(file)}")
        said = json.loads(file[8 : 8 + length].numpy().tobytes())
        offsets = json.loads(said.pop("__metadata__")[_SHARDING])
        found = []
        for name, entry in said.items():
            start, end = (8 + length + at for at in entry["data_offsets"])
            if not 8 + length <= start <= end <= len(file):
                raise ValueError(f"{name!r} lies at {start}..{end} in a file of {len(file)} bytes")
            place = tuple(offsets[name]["saved_offsets"])
            found.append(Stored(name, entry["dtype"], tuple(entry["shape"]), place, start, end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{path} is not a data file of a checkpoint: {error}") from error
    else:
        return found
