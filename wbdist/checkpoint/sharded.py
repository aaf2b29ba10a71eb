"""State that no rank holds whole: FSDP2's parameters, DTensors, and what an optimizer keeps for them.

States are taken and given through torch.distributed.checkpoint.state_dict, under the parameters' names. Each rank writes its
own shard; on restore each reads the box that it now holds, whatever boxes were written, so the number of ranks may change.

Only for sharded state: torch's functions make an optimizer without a state take a step with zero gradients, which is not
nothing (Adam counts it, momentum with dampening keeps it).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from wbdist.checkpoint.image import Box
from wbdist.errors import StateMissingError, UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_UNSTEPPED = "unstepped"


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether `value` is a DTensor. Does not import what would make one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def own_box(name: str, tensor: DTensor) -> Box | None:
    """The shard that this rank writes; None when it has none, or another rank that holds the same one does."""
    shape, offset = _local(tensor)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    for index, placement in zip(coordinate, tensor.placements, strict=True):
        if placement.is_partial():
            raise UsageError(f"state {name!r} is a DTensor of partial sums, which cannot be stored; redistribute it first")
        if placement.is_replicate() and index:
            return None
    local = tensor.to_local()
    if tuple(local.shape) != shape:
        raise UsageError(f"state {name!r} is a DTensor whose shard is no plain box ({tensor.placements}); it cannot be stored")
    return Box(name, local.detach(), offset) if local.numel() else None


def wanted_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offset, shape) of what this rank holds of `tensor`."""
    shape, offset = _local(tensor)
    return offset, shape


def like(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """A DTensor placed as `tensor` is, with the values `local` here."""
    from torch.distributed.tensor import DTensor

    made: DTensor = DTensor.from_local(
        local.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return made


def _local(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


class ShardedModule:
    """A module with sharded parameters, as an object with a state."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(self._module)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self._module, state)

    def layout(self) -> dict[str, Any]:
        return self.state_dict()


class ShardedOptimizer:
    """An optimizer of sharded parameters, as an object with a state."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module, self._optimizer = module, optimizer

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        if not self._optimizer.state:
            return {_UNSTEPPED: self._optimizer.state_dict()["param_groups"]}
        return dict(get_optimizer_state_dict(self._module, self._optimizer))

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        if _UNSTEPPED in state:
            self._optimizer.load_state_dict({"state": {}, "param_groups": state[_UNSTEPPED]})
        else:
            set_optimizer_state_dict(self._module, self._optimizer, state)

    def layout(self) -> dict[str, Any]:
        """How a state is placed over the ranks. Gives an optimizer without one a first, which is to be overwritten."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(self._module, self._optimizer))


def adapted(objects: Mapping[str, Any]) -> dict[str, Any]:
    """`objects`, with those whose parameters are sharded as ones that can be saved in parts.

    Raises UsageError for an optimizer of sharded parameters whose module is not among them: its state has no names then.
    """
    modules = [value for value in objects.values() if isinstance(value, torch.nn.Module)]
    found = dict(objects)
    for name, value in objects.items():
        if isinstance(value, torch.nn.Module) and _any_sharded(value.parameters()):
            found[name] = ShardedModule(value)
        elif isinstance(value, torch.optim.Optimizer):
            parameters = [parameter for group in value.param_groups for parameter in group["params"]]
            if _any_sharded(parameters):
                ids = {id(parameter) for parameter in parameters}
                owner = next((m for m in modules if ids <= {id(parameter) for parameter in m.parameters()}), None)
                if owner is None:
                    raise UsageError(
                        f"{name!r} optimises sharded parameters of a module that is not tracked: track the module that "
                        "holds all of them, too; their names are what its state is saved under"
                    )
                found[name] = ShardedOptimizer(owner, value)
    return found


def _any_sharded(parameters: Iterable[torch.Tensor]) -> bool:
    return any(is_sharded(parameter) for parameter in parameters)


def check_shape(name: str, stored: tuple[int, ...], tensor: DTensor) -> None:
    """Raises StateMissingError when the stored tensor is not of the shape of the one it is for."""
    if stored != tuple(tensor.shape):
        raise StateMissingError(
            f"{name!r} has shape {list(stored)} in the checkpoint, but {list(tensor.shape)} in this job. "
            "Build the objects as the job that saved them did, or start anew in another checkpoint directory."
        )
