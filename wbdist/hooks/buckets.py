"""DDP's buckets as they will stay, from the first step on.

DDP begins with one bucket for all gradients, and lays them out anew before its second forward pass, in the order in which they
were ready. A ring all-reduce of three or more ranks adds each element in an order that depends on its place in the bucket. So a
job that goes on from a checkpoint, whose first step is the uninterrupted job's n-th, would sum that step's gradients in another
order: other last bits, and another job from there on. (With gloo, 3 and 4 ranks: of 19 steps to go on from, 8 and 15 gave other
weights. With two ranks a + b is b + a.)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def settle(model: DistributedDataParallel) -> bool:
    """All ranks, in step, right after the model was wrapped: lets DDP lay out its buckets now; it never does so again.

    A backward pass of zeros tells it an order: that of the parameters, last ones first. It costs one reduction of the model and
    changes nothing else: no forward pass, no random numbers, gradients and their hooks as they were. Blocks as a
    backward pass does.
    `DDP(find_unused_parameters=True)`, whose layout is fixed anyway, is left alone; so are `static_graph=True` and modules with
    sparse gradients, where the layout cannot be told beforehand. Returns whether the layout is the same from now on.
    """
    if model.find_unused_parameters and not model.static_graph:
        return True
    if model.static_graph or any(getattr(module, "sparse", False) for module in model.modules()):
        return False
    reducer = model.reducer
    parameters = [parameter for parameter in _reduced(model) if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    # An optimizer's step within the backward pass, for one. Emptied in place: the parameter itself holds on to the dict.
    hooks = [dict(parameter._post_accumulate_grad_hooks or {}) for parameter in parameters]  # noqa: SLF001
    for parameter in parameters:
        parameter.grad = None
        (parameter._post_accumulate_grad_hooks or {}).clear()  # noqa: SLF001
    try:
        with torch.enable_grad():
            nothing = torch.zeros(())
            for parameter in parameters:
                nothing = nothing + (parameter.view(-1)[:1].sum() * 0).to("cpu", torch.float32)
            reducer.prepare_for_forward()
            reducer.prepare_for_backward([])
            nothing.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, grad, kept in zip(parameters, before, hooks, strict=True):
            parameter.grad = grad
            if kept:
                parameter._post_accumulate_grad_hooks.update(kept)  # noqa: SLF001
    return bool(reducer._rebuild_buckets())  # noqa: SLF001


def _reduced(model: DistributedDataParallel) -> list[nn.Parameter]:
    """What DDP reduces: all but what it was told to leave alone."""
    ignored = set(getattr(model, "parameters_to_ignore", ()))
    return [parameter for name, parameter in model.module.named_parameters() if name not in ignored]
