"""The objects of a job whose state goes into its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from wbdist.checkpoint.metrics import Metrics, is_metric
from wbdist.checkpoint.sharded import ShardedModule, ShardedOptimizer, check_shape, is_sharded, like, wanted_box
from wbdist.checkpoint.storage import TensorFiles
from wbdist.checkpoint.tree import Spec, Tensors, split
from wbdist.errors import Error, StateMissingError, UsageError

RNG = "rng"
"""Name under which each rank's random number generators are stored."""


class Stateful(Protocol):
    """What can be tracked: modules, optimizers, schedulers, scalers, loaders, anything of your own with these two."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class TrackedObjects:
    """Names -> objects, in two kinds: alike on all ranks (`shared`), and each rank's own (`per_rank`)."""

    def __init__(self) -> None:
        self.shared: dict[str, Stateful] = {}
        self.per_rank: dict[str, Stateful] = {}

    def add(self, name: str, value: Any, *, per_rank: bool) -> None:
        """Raises UsageError for a name or an object that is there already, or an object without a state."""
        if name == RNG:
            raise UsageError(f"the name {RNG!r} is taken by the random generators, which are always saved; use another")
        if name in self.shared or name in self.per_rank:
            raise UsageError(f"{name!r} is tracked already; each name stands for one object")
        value = unwrap(value)
        if not callable(getattr(value, "state_dict", None)) or not callable(getattr(value, "load_state_dict", None)):
            raise UsageError(
                f"{name}={type(value).__name__} cannot be tracked: it needs state_dict() and load_state_dict(state). "
                "Wrap plain values in an object that has them."
            )
        for other, known in {**self.shared, **self.per_rank}.items():
            if known is value or (isinstance(known, Metrics) and known.metric is value):
                raise UsageError(f"{name!r} and {other!r} are the same object; track it once")
        if is_metric(value):
            value, per_rank = Metrics(value), True
        (self.per_rank if per_rank else self.shared)[name] = value

    def kinds(self) -> dict[str, str]:
        """The name of each object's class."""
        return {name: type(value).__name__ for name, value in {**self.shared, **self.per_rank}.items()}

    def check_kinds(self, stored: Mapping[str, str], checkpoint: str) -> None:
        """Raises StateMissingError for an optimizer or scheduler that was another one: they load each other's state unseen.

        Other classes may be renamed; what they load, they check themselves.
        """
        for name, value in {**self.shared, **self.per_rank}.items():
            own = type(value).__name__
            if isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)) and stored.get(name) != own:
                raise StateMissingError(
                    f"{name!r} is a {stored.get(name, 'thing of unknown class')} in {checkpoint}, but this job tracks a {own}. "
                    "Build the objects as the job that saved them did, or start anew in another checkpoint directory."
                )


def unwrap(value: Any) -> Any:
    """The module inside DDP, DataParallel and torch.compile, so that names in its state do not depend on how it is run."""
    while True:
        if isinstance(value, (DistributedDataParallel, DataParallel)):
            value = value.module
        elif isinstance(value, torch.nn.Module) and isinstance(inner := getattr(value, "_orig_mod", None), torch.nn.Module):
            value = inner
        else:
            return value


def alike(name: str, target: Stateful, tensors: Iterable[str]) -> frozenset[str]:
    """Of `tensors`, the state of `target` by dotted names: those that data-parallel training keeps equal on all ranks."""
    if isinstance(target, torch.nn.Module):
        return frozenset(f"{name}.{key}" for key, _ in target.named_parameters(remove_duplicate=False)) & {*tensors}
    if isinstance(target, torch.optim.Optimizer):
        return frozenset(tensor for tensor in tensors if tensor.startswith(f"{name}.state."))
    return frozenset()


def tensors_for(name: str, target: Stateful | None, wanted: Mapping[str, Spec], files: TensorFiles) -> Tensors:
    """The tensors `wanted` of the state of `target`, placed over the ranks as the target's own are, to be loaded into it.

    Raises StateMissingError, CheckpointCorruptError.
    """
    copied, held = _copied_on_load(name, target), _held(name, target)
    layout = split(name, target.layout())[1] if isinstance(target, (ShardedModule, ShardedOptimizer)) else {}
    found: Tensors = {}
    for key, spec in wanted.items():
        here, own = layout.get(key), held.get(key)
        if is_sharded(here):
            check_shape(key, spec.shape, here)
            if isinstance(target, ShardedModule) and spec.dtype != here.dtype:
                raise _another_type(key, spec.dtype, here.dtype)
            offset, shape = wanted_box(here)
            found[key] = like(here, files.read(key, spec, (offset, shape), torch.empty(shape, dtype=spec.dtype)))
        elif key in copied:
            found[key] = files.read(key, spec)
        elif own is not None and (own.dtype, tuple(own.shape)) == (spec.dtype, spec.shape):
            found[key] = files.read(key, spec, into=own)
        else:
            # Views of the files are for who copies them; whatever is kept needs memory of its own.
            found[key] = files.read(key, spec, into=torch.empty(spec.shape, dtype=spec.dtype))
    return found


def _held(name: str, target: Stateful | None) -> Tensors:
    """The tensors that a plain optimizer has already, to be read into: fresh memory costs more than the copy does."""
    plain = isinstance(target, torch.optim.Optimizer) and type(target).load_state_dict is torch.optim.Optimizer.load_state_dict
    return split(name, {"state": target.state_dict()["state"]})[1] if target is not None and plain else {}


def _copied_on_load(name: str, target: Stateful | None) -> frozenset[str]:
    """The tensors of its state, by dotted names, whose values `target` copies into its own when it is loaded."""
    if not isinstance(target, torch.nn.Module) or type(target).load_state_dict is not torch.nn.Module.load_state_dict:
        return frozenset()
    return frozenset(f"{name}.{key}" for key, _ in [*target.named_parameters(), *target.named_buffers()])


def load(name: str, target: Stateful, state: Any, checkpoint: str) -> None:
    """Loads `state` into `target`. Raises StateMissingError saying how the two do not fit; wbdist's own errors pass."""
    if isinstance(target, torch.nn.Module):
        _check_types(name, target, state)
    try:
        target.load_state_dict(state)
    except Error:
        raise
    except Exception as error:
        raise StateMissingError(
            f"the state of {name!r} in {checkpoint} does not fit this job's {type(target).__name__}: {error}. "
            "Build the objects as the job that saved them did, or start anew in another checkpoint directory."
        ) from error
    if isinstance(target, torch.optim.Optimizer) and type(target).load_state_dict is torch.optim.Optimizer.load_state_dict:
        _keep_types(target, state)


def _keep_types(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """torch gives an optimizer's state the type of its parameter: float32 sums and master weights of bfloat16 parameters
    would lose their bits at each restore."""
    saved = [index for group in state["param_groups"] for index in group["params"]]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved, own, strict=True):
        for key, value in state["state"].get(index, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)


def _check_types(name: str, target: torch.nn.Module, state: Any) -> None:
    """A module would convert values of another type to its own, which loses bits or pretends to have more."""
    for key, own in target.state_dict().items():
        stored = state.get(key)
        if isinstance(own, torch.Tensor) and isinstance(stored, torch.Tensor) and own.dtype != stored.dtype:
            raise _another_type(f"{name}.{key}", stored.dtype, own.dtype)


def _another_type(key: str, stored: torch.dtype, own: torch.dtype) -> StateMissingError:
    return StateMissingError(
        f"{key} has type {stored} in the checkpoint, but {own} in this job. Build the model in the type that it was saved in, "
        "or start anew in another checkpoint directory."
    )
