"""DDP's buckets as they will stay, from the first step on.

DDP begins with one bucket for all gradients, and lays them out anew before its second forward pass, in the order in which they
were ready. A ring all-reduce of three or more ranks adds each element in an order that depends on its place in the bucket. So a
job that goes on from a checkpoint, whose first step is the uninterrupted job's n-th, would sum that step's gradients in another
order: other last bits, and another job from there on. (With gloo, 3 and 4 ranks: of 19 steps to go on from, 8 and 15 gave other
weights. With two ranks a + b is b + a.)
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_settled: WeakSet[DistributedDataParallel] = WeakSet()


def settle(model: DistributedDataParallel) -> None:
    """All ranks of the model's group, in step, before its first forward pass: DDP lays out its buckets now, and never again.

    A backward pass of zeros tells it an order: that of the parameters, last ones first. It costs one reduction of the model and
    changes nothing else: no forward pass, no random numbers, gradients and their hooks as they were. Blocks as a
    backward pass does. A static graph would learn from it that all parameters are used, so that one is given the order of the
    parameters themselves: on a CPU with three ranks or more, where bits are promised, since with it nothing is reduced
    before backward is through.

    Does nothing where the layout is fixed anyway (`find_unused_parameters`), to a model that has been trained, or the second
    time.
    """
    known = model in _settled or model._has_rebuilt_buckets  # noqa: SLF001
    _settled.add(model)
    if known:
        return
    if model.static_graph:
        begun = model._static_graph_delay_allreduce_enqueued  # noqa: SLF001
        if not begun and model.device.type == "cpu" and dist.get_world_size(model.process_group) > 2:
            model.reducer._push_all_rebuilt_params()  # noqa: SLF001
            model.reducer._rebuild_buckets()  # noqa: SLF001
    elif not model.find_unused_parameters:
        _settle_by_zeros(model)


def _settle_by_zeros(model: DistributedDataParallel) -> None:
    parameters = [parameter for parameter in _reduced(model) if parameter.requires_grad]
    sparse = {
        id(module.weight)
        for module in model.module.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }
    before = [parameter.grad for parameter in parameters]
    if model.gradient_as_bucket_view:  # they lie where the zeros will
        before = [None if grad is None else grad.clone() for grad in before]
    # An optimizer's step within the backward pass, for one. Emptied in place: the parameter itself holds on to the dict.
    hooks = [dict(parameter._post_accumulate_grad_hooks or {}) for parameter in parameters]  # noqa: SLF001
    for parameter in parameters:
        parameter.grad = None
        (parameter._post_accumulate_grad_hooks or {}).clear()  # noqa: SLF001
    try:
        with torch.enable_grad():
            nothing = torch.zeros(())
            for parameter in parameters:
                first = _first(parameter, sparse=id(parameter) in sparse)
                nothing = nothing + (first.sum() * 0).to("cpu", torch.float32)
            model.reducer.prepare_for_forward()
            model.reducer.prepare_for_backward([])
            nothing.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, grad, kept in zip(parameters, before, hooks, strict=True):
            parameter.grad = grad
            if kept:
                parameter._post_accumulate_grad_hooks.update(kept)  # noqa: SLF001
    model.reducer._rebuild_buckets()  # noqa: SLF001


def settle_tracked(tracked: Iterable[object]) -> None:
    """All ranks, in step: the same for those of `tracked` that a script wrapped in DDP itself."""
    for each in tracked:
        if isinstance(each, DistributedDataParallel):
            settle(each)


def _first(parameter: nn.Parameter, *, sparse: bool) -> torch.Tensor:
    """A part of it whose gradient is of the kind that DDP expects."""
    if sparse:
        return nn.functional.embedding(torch.zeros(1, dtype=torch.long, device=parameter.device), parameter, sparse=True)
    return parameter.flatten()[:1]


def _reduced(model: DistributedDataParallel) -> list[nn.Parameter]:
    """What DDP reduces: all but what it was told to leave alone."""
    ignored = set(getattr(model, "parameters_to_ignore", ()))
    return [parameter for name, parameter in model.module.named_parameters() if name not in ignored]
