"""The state at a step boundary, as what each rank will write of it. Training thread; looks at no values, copies none."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import torch
import xxhash

from wbdist.checkpoint import rng, shares, tracked, tree
from wbdist.checkpoint.commit import SHARED, Part, rank_directory
from wbdist.checkpoint.image import Box, Layout, lay_out
from wbdist.checkpoint.sharded import adapted, is_sharded
from wbdist.checkpoint.tracked import RNG, TrackedObjects
from wbdist.checkpoint.tree import Tensors
from wbdist.errors import UsageError


class Captured(msgspec.Struct, frozen=True):
    """One rank's part of a save, before the copy: the boxes in `layouts` and the `samples` are live."""

    parts: Mapping[str, Part] = {}
    layouts: tuple[Layout, ...] = ()
    samples: tuple[torch.Tensor, ...] = ()
    sampled: tuple[str, ...] = ()
    """Names of the tensors that the samples are of."""


def capture(objects: TrackedObjects, rank: int, world_size: int) -> Captured:
    """Asks every tracked object and generator for its state. Raises UsageError for what cannot be stored."""
    shared = adapted(objects.shared)
    structures, tensors = _taken_apart({name: target.state_dict() for name, target in shared.items()})
    alike = frozenset[str]().union(*(tracked.alike(name, target, tensors) for name, target in shared.items()))
    samples = shares.samples(tensors, alike) if world_size > 1 else {}
    own: dict[str, Any] = {name: target.state_dict() for name, target in objects.per_rank.items()}
    own[RNG] = rng.capture()
    own_structures, own_tensors = _taken_apart(own)
    for name, tensor in own_tensors.items():
        if is_sharded(tensor):
            raise UsageError(f"state {name!r} is a DTensor, which belongs to all ranks: track it without per_rank=True")
    boxes = {
        SHARED: shares.share_out(tensors, alike, rank, world_size),
        rank_directory(rank): [Box(name, tensor, (0,) * tensor.dim()) for name, tensor in own_tensors.items()],
    }
    layouts: list[Layout] = []
    files: dict[str, int | None] = {}
    for sub, held in boxes.items():
        files[sub] = len(layouts) if held else None
        if held:
            layouts.append(lay_out(held))
    parts = {
        SHARED: Part(structures if rank == 0 else None, files[SHARED], _listing(tensors)),
        rank_directory(rank): Part(own_structures, files[rank_directory(rank)], ""),
    }
    return Captured(parts, tuple(layouts), tuple(samples.values()), tuple(samples))


def _taken_apart(states: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    structures: dict[str, Any] = {}
    tensors: Tensors = {}
    for name, state in states.items():
        structures[name], found = tree.split(name, state)
        tensors.update(found)
    return structures, tensors


def _listing(tensors: Tensors) -> str:
    return _digest(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))


@lru_cache(maxsize=8)  # from save to save it is the same
def _digest(tensors: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> str:
    lines = (f"{name} {dtype} {tuple(shape)}\n" for name, dtype, shape in tensors)
    return xxhash.xxh3_64_hexdigest("".join(lines).encode())
