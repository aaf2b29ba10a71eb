"""Who writes what: of tensors that all ranks hold alike, each rank writes an equal share of the bytes.

The shares follow from names, types and shapes, so no rank asks another. Only what is alike by the way data-parallel
training works is shared out: parameters and what an optimizer keeps for them. Anything else that ranks "hold alike" is
written by rank 0 whole: the buffers of a batch norm, for one, differ between ranks until DDP's next forward.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
import xxhash

from wbdist.checkpoint.image import Box
from wbdist.checkpoint.sharded import is_sharded, own_box
from wbdist.checkpoint.tree import Tensors

_SAMPLED = 16
"""Tensors, the largest ones, of which samples are compared."""
_SAMPLE = 64
"""Elements of each."""
_WHOLE = (0, -1)
"""All rows."""


def share_out(tensors: Tensors, alike: frozenset[str], rank: int, world_size: int) -> list[Box]:
    """What rank `rank` writes of `tensors`, of which those named in `alike` are shared out and rank 0 has the rest.

    Together the boxes of all ranks hold every element once. A tensor is cut between rows of its first dimension; of a DTensor
    each rank writes its shard.
    """
    shared_out = ((name, tensor) for name, tensor in tensors.items() if name in alike and not is_sharded(tensor))
    cuts = _cuts(tuple((name, tensor.dtype, tensor.shape) for name, tensor in shared_out), rank, world_size)
    boxes = []
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            box = own_box(name, tensor)
            if box is not None:
                boxes.append(box)
        elif name in alike:
            rows = cuts.get(name)
            if rows == _WHOLE:
                boxes.append(Box(name, tensor, (0,) * tensor.dim()))
            elif rows is not None:
                boxes.append(Box(name, tensor[rows[0] : rows[1]], (rows[0], *(0,) * (tensor.dim() - 1))))
        elif rank == 0:
            boxes.append(Box(name, tensor, (0,) * tensor.dim()))
    return boxes


@lru_cache(maxsize=8)  # from save to save it is the same
def _cuts(tensors: tuple[tuple[str, torch.dtype, torch.Size], ...], rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """Which rows of which tensors `rank` writes. A row is written by the rank within whose bytes it begins."""
    sizes = [dtype.itemsize * prod(shape) for _, dtype, shape in tensors]
    total = sum(sizes)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    cuts = {}
    start = 0
    for (name, _, shape), size in zip(tensors, sizes, strict=True):
        rows = shape[0] if shape else 1
        row = size // rows if rows else 0
        if row:
            low, high = (min(max(-(-(bound - start) // row), 0), rows) for bound in (first, last))
            if (low, high) == (0, rows):
                cuts[name] = _WHOLE
            elif low < high:
                cuts[name] = (low, high)
        start += size
    return cuts


def samples(tensors: Tensors, alike: frozenset[str]) -> Tensors:
    """A few elements of the largest shared-out tensors: that the ranks do hold them alike is worth a look at each save."""
    largest = heapq.nsmallest(_SAMPLED, ((-tensors[name].nbytes, name) for name in alike & tensors.keys()))
    return {name: _spread(tensors[name]) for _, name in largest if tensors[name].is_contiguous()}


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.view(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE]


def digests(names: Sequence[str], values: Sequence[torch.Tensor]) -> dict[str, str]:
    """A short digest for each sample, to be compared between ranks. The values are on the host."""
    return {
        name: xxhash.xxh3_64_hexdigest(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, value in zip(names, values, strict=True)
    }
