"""Tensors from the data files of a directory (`image.py` says what these are): mapped, not read, and never unpickled.

Whoever asks gets any box of a tensor, whatever boxes it was written in: that is all there is to restoring with another
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from wbdist.checkpoint.image import PAGE, SUFFIX, Box, Stored, parse
from wbdist.checkpoint.mapped import mapped, populate
from wbdist.checkpoint.tree import Spec, Tensors
from wbdist.errors import CheckpointCorruptError


class TensorFiles:
    """The data files of one part of a checkpoint, mapped for reading; of each only what is asked for is read."""

    def __init__(self, directory: Path) -> None:
        """Opens all of them. Raises OSError as the system does, CheckpointCorruptError for what is no data file."""
        self._directory = directory
        self._boxes: dict[str, list[tuple[Stored, _File]]] = {}
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            try:
                file = _File(path)
            except ValueError as error:  # empty
                raise CheckpointCorruptError(f"{path} is not a data file of a checkpoint: {error}") from error
            for stored in parse(file.bytes, str(path)):
                self._boxes.setdefault(stored.name, []).append((stored, file))

    def read(
        self,
        name: str,
        spec: Spec,
        wanted: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The tensor `name`, or its part at `wanted` = (offset, shape): in `into`, of that type and shape, which is returned.

        Without `into`, what lies in a file as one box comes as a view of the file, private to this process: its owner must
        copy it. Raises CheckpointCorruptError when elements are absent, OSError as the system does.
        """
        offset, shape = wanted or ((0,) * len(spec.shape), spec.shape)
        boxes = [(stored.within(file.bytes, spec.dtype), stored, file) for stored, file in self._boxes.get(name, ())]
        for box, stored, file in boxes:
            if (box.offset, tuple(box.tensor.shape)) == (offset, shape):
                populate(file.region, stored.start, stored.end)
                return box.tensor if into is None else into.copy_(box.tensor)
        whole = torch.empty(shape, dtype=spec.dtype) if into is None else into
        found = 0
        for box, stored, file in boxes:
            overlap = _overlap(box, offset, shape)
            if overlap is not None:
                populate(file.region, stored.start, stored.end)
                place, part = overlap
                whole[place].copy_(box.tensor[part])
                found += box.tensor[part].numel()
        if found != prod(shape):
            raise CheckpointCorruptError(
                f"{self._directory} holds {found} of the {prod(shape)} elements of {name!r} at {offset}: a file is missing"
            )
        return whole


class _File:
    def __init__(self, path: Path) -> None:
        self.region = mapped(path)
        populate(self.region, 0, PAGE)
        populate(self.region, 0, 8 + int.from_bytes(self.region[:8], "little"))  # the header
        # torch has no read-only tensors; a write to one of these must never reach the file.
        self.bytes = torch.frombuffer(self.region, dtype=torch.uint8)


def _overlap(box: Box, offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The common part of a stored box and a wanted one: as places in the wanted, and as places in the stored."""
    if len(box.offset) != len(offset):
        raise CheckpointCorruptError(f"{box.name!r} is stored with {len(box.offset)} dimensions, but should have {len(offset)}")
    into, part = [], []
    for has, length, want, size in zip(box.offset, box.tensor.shape, offset, shape, strict=True):
        low, high = max(has, want), min(has + length, want + size)
        if low >= high:
            return None
        into.append(slice(low - want, high - want))
        part.append(slice(low - has, high - has))
    return tuple(into), tuple(part)


def read_tensors(directory: Path, wanted: Mapping[str, Spec]) -> Tensors:
    """The whole tensors `wanted` from `directory`; see `TensorFiles.read`."""
    return dict(_read_each(TensorFiles(directory), wanted))


def _read_each(files: TensorFiles, wanted: Mapping[str, Spec]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, spec in wanted.items():
        yield name, files.read(name, spec)
