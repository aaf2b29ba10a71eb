"""Who writes what: of tensors that all ranks hold alike, each rank writes an equal share of the bytes.

The shares follow from names, types and shapes, so no rank asks another. Only what is alike by the way data-parallel
training works is shared out: parameters and what an optimizer keeps for them. Anything else that ranks "hold alike" is
written by rank 0 whole: the buffers of a batch norm, for one, differ between ranks until DDP's next forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from wbdist.checkpoint.image import Box
from wbdist.checkpoint.sharded import is_sharded, own_box
from wbdist.checkpoint.tree import Tensors

_SAMPLED = 16
"""Tensors, the largest ones, of which samples are compared."""
_SAMPLE = 64
"""Elements of each."""


def share_out(tensors: Tensors, alike: frozenset[str], rank: int, world_size: int) -> list[Box]:
    """What rank `rank` writes of `tensors`, of which those named in `alike` are shared out and rank 0 has the rest.

    Together the boxes of all ranks hold every element once. A tensor is cut between rows of its first dimension; of a DTensor
    each rank writes its shard.
    """
    boxes = []
    total = sum(tensor.nbytes for name, tensor in tensors.items() if name in alike)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    start = 0
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            box = own_box(name, tensor)
            if box is not None:
                boxes.append(box)
            continue
        if name not in alike:
            if rank == 0:
                boxes.append(Box(name, tensor, (0,) * tensor.dim()))
            continue
        # A row is written by the rank within whose bytes it begins.
        rows = tensor.shape[0] if tensor.dim() else 1
        row = tensor.nbytes // rows if rows else 0
        if row:
            low, high = (min(max(-(-(bound - start) // row), 0), rows) for bound in (first, last))
            if (low, high) == (0, rows):
                boxes.append(Box(name, tensor, (0,) * tensor.dim()))
            elif low < high:
                boxes.append(Box(name, tensor[low:high], (low, *(0,) * (tensor.dim() - 1))))
        start += tensor.nbytes
    return boxes


def samples(tensors: Tensors, alike: frozenset[str]) -> Tensors:
    """A few elements of the largest shared-out tensors: that the ranks do hold them alike is worth a look at each save."""
    largest = sorted(alike & tensors.keys(), key=lambda name: (-tensors[name].nbytes, name))[:_SAMPLED]
    return {name: _spread(tensors[name]) for name in largest if tensors[name].is_contiguous()}


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.view(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE]


def digests(names: Sequence[str], values: Sequence[torch.Tensor]) -> dict[str, str]:
    """A short digest for each sample, to be compared between ranks. The values are on the host."""
    return {
        name: xxhash.xxh3_64_hexdigest(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, value in zip(names, values, strict=True)
    }
