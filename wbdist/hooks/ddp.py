"""What DDP's gradient reduction costs and brings, of a model that somebody else trains.

    forward  ->  backward begins  ->  buckets ready, and reduced behind it  ->  computed  ->  all reduced
    (waits in a broadcast of buffers)                                                    (exposed)

Of every pass only its corners are noted: a hook on what the forward pass returned sees where backward begins, and two callbacks
of the autograd engine, one on each side of DDP's own, see where it ends. DDP reduces as it always does, in C++. Now and then a
pass is looked at closely, bucket by bucket (`ddp_buckets`), and its gradient's norm is taken.

Gradients are what they are without it, bit for bit, with a communication hook of the user's or without. Nothing waits, no
collective is added, and numbers are read on the thread that ends the backward pass. On CUDA times are events, read when they
are done, so that no step waits for the device: its numbers are in the row of a later step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from wbdist.errors import UsageError
from wbdist.hooks.ddp_buckets import Bucket, Hook, NotingGroup, NotingHook
from wbdist.hooks.ddp_clock import Mark, clock_of

UNREAD = 8
"""Passes whose device times are not done yet; older ones are given up, so that a lagging device costs no memory."""

REDUCE: Mapping[str, str] = {
    "ddp/exposed_ms": "max",
    "ddp/buckets": "first",
    "ddp/bytes": "first",
    "ddp/comm_ms": "mean",
    "ddp/overlap": "mean",
    "ddp/wait_ms": "max",
    "ddp/grad_norm": "first",
    "ddp/nonfinite": "first",
}
"""What becomes of the ranks' values in one run for all: gradients are alike on all ranks, times are not."""


class Log(Protocol):
    """Takes one pass's numbers; called on the thread that ends a backward pass."""

    def __call__(self, data: Mapping[str, Any]) -> None: ...


class _Pass:
    """One forward pass and the backward pass that reduces."""

    __slots__ = ("began", "buckets", "computed", "forward", "norms", "over", "parts", "reduced", "uneven")

    def __init__(self, forward: list[tuple[Mark, Mark]]) -> None:
        self.forward = forward
        """Where forward passes waited for buffers to be broadcast: before and after."""
        self.began: Mark | None = None
        self.computed: Mark | None = None
        self.reduced: Mark | None = None
        self.over: Mark | None = None
        """Then all of this can be read."""
        self.buckets: list[Bucket] | None = None
        """None in a pass that is not looked at closely."""
        self.parts = 0
        """Tensors that the forward pass returned: of several, each may have a backward pass of its own."""
        self.uneven = False
        """Under torch's Join, or after it: ranks' passes are not each other's any more."""
        self.norms: Tensor | None = None
        """What `_looked_at` made of it."""


class DdpWatch:
    """One model's reduction, watched. Made on all ranks, before the first backward pass; it lasts as long as the model.

    Every pass that reduces gives `log` one row: `ddp/exposed_ms`, the time after backward had computed everything until all
    was reduced. Of every `detail_every`-th pass, the first included, it has also `ddp/buckets`, `ddp/bytes` (before a hook
    compresses them), `ddp/comm_ms` (time in which a bucket was being reduced), `ddp/overlap` (the share of it that was not
    exposed), `ddp/wait_ms` (from where this rank's first bucket was ready to where it was reduced, and before for buffers),
    `ddp/grad_norm` of the reduced gradient (with a GradScaler: of the scaled one) and `ddp/nonfinite`, its number of NaN and
    infinite elements; 0 looks closely at none.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        log: Log,
        *,
        hook: Hook | None = None,
        state: Any = None,
        detail_every: int = 50,
        say: Callable[[str], None] = lambda text: None,
        waited: Callable[[float], Mapping[str, Any]] | None = None,
    ) -> None:
        """`hook` and `state` as for `register_comm_hook`, which may also be called later. `say`: called once when the
        gradient stops being finite, with the names of parameters. `waited`: called after each pass, but for models
        that were under torch's Join, with the ms from where this rank's backward began to where all was reduced (what
        differs among ranks is by how much they came before the last one, see `stragglers`); what it returns is logged.

        Raises UsageError when the model is none of DDP's, or has a hook already.
        """
        if not isinstance(model, DistributedDataParallel):
            raise UsageError(f"watch_ddp() takes a model wrapped in DistributedDataParallel, not {type(model).__name__}")
        if detail_every < 0:
            raise UsageError(f"watch_ddp(detail_every={detail_every}): give a number of backward passes, or 0 for no details")
        if model._comm_hooks:  # noqa: SLF001  (DDP has no public way to ask)
            name = getattr(model._comm_hooks[0][0], "__qualname__", "a hook")  # noqa: SLF001
            raise UsageError(
                f"this model has the communication hook {name} already, and DDP takes one; "
                "call watch_ddp() first and register the hook afterwards, or give it: watch_ddp(model, hook=..., state=...)"
            )
        self._model = model
        self._log = log
        self._say = say
        self._waited = waited
        self._detail_every = detail_every
        self._clock = clock_of(model.device)
        self._at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001
        self._passes = 0
        self._pass: _Pass | None = None
        self._unread: deque[_Pass] = deque(maxlen=UNREAD)
        self._finite = True
        self._entered: Mark | None = None
        self._forward: list[tuple[Mark, Mark]] = []
        self._group = NotingGroup(model.process_group, self._clock)
        self._hook: NotingHook | None = None
        self._swapped = False
        model.register_comm_hook = self._compose  # type: ignore[method-assign]
        if hook is not None:
            self._compose(state, hook)
        model.register_forward_pre_hook(self._on_enter)
        if model.broadcast_buffers and model.modules_buffers:
            model.module.register_forward_pre_hook(self._on_forward, prepend=True)
        model.register_forward_hook(self._on_forwarded)

    def _compose(self, state: object, hook: Hook) -> None:
        """In place of the model's `register_comm_hook`: the hook runs inside ours; torch's own checks as there."""
        self._model._check_comm_hook(hook)  # type: ignore[no-untyped-call]  # noqa: SLF001
        noting = NotingHook(hook, state, self._clock)
        DistributedDataParallel.register_comm_hook(self._model, None, noting.reduce)
        self._hook = noting

    # A pass, in the order in which it happens ---------------------------------------------------------

    def _on_enter(self, _model: torch.nn.Module, _inputs: Any) -> None:
        if self._swapped or self._hook is not None:
            self._swap_back()  # if there was no backward pass
        self._entered = self._clock.mark() if torch.is_grad_enabled() else None

    def _on_forward(self, _module: torch.nn.Module, _inputs: Any) -> None:
        """DDP has done what it does before a forward pass."""
        entered, self._entered = self._entered, None
        if entered is not None:
            if len(self._forward) == UNREAD * 8:  # passes that nobody differentiates
                self._forward.clear()
            self._forward.append((entered, self._clock.mark()))

    def _on_forwarded(self, model: torch.nn.Module, _inputs: Any, returned: Any) -> None:
        if not (torch.is_grad_enabled() and model.require_backward_grad_sync):
            return
        self._pass = _Pass(self._forward)
        for tensor in (returned,) if isinstance(returned, Tensor) else _tensors(returned):
            if (node := tensor.grad_fn) is not None:
                node.register_prehook(self._on_backward)
                self._pass.parts += 1
        self._pass.uneven = self._model._join_config.enable  # noqa: SLF001  (Join cannot be asked)
        if self._detail_every and self._passes % self._detail_every == 0:
            self._pass.buckets = []
            if self._hook is not None:
                self._hook.buckets = self._pass.buckets
            else:
                self._group.buckets = self._pass.buckets
                self._model.reducer._update_process_group(self._group)  # noqa: SLF001
                self._swapped = True

    def _swap_back(self) -> None:
        if self._hook is not None:
            self._hook.buckets = None
        if self._swapped:
            self._model.reducer._update_process_group(self._model.process_group)  # noqa: SLF001
            self._swapped = False

    def _on_backward(self, _gradients: Any) -> None:
        """Backward comes to something that the forward pass returned: the first of them begins it."""
        if self._pass is None or self._pass.began is not None:
            return
        self._pass.began = self._clock.mark()
        self._at_end_of_backward(self._on_computed)

    def _on_computed(self) -> None:
        if self._pass is not None:
            self._pass.computed = self._clock.mark()
            # DDP's own callback, which waits for the buckets, was queued in between.
            self._at_end_of_backward(self._on_all_reduced)

    def _on_all_reduced(self) -> None:
        done = self._pass
        if done is None:
            return
        if done.parts > 1:
            try:
                self._model.reducer._check_reducer_finalized()  # noqa: SLF001
            except RuntimeError:  # a backward pass over a part of what was returned: the others are to come
                done.began = None
                return
        self._pass, self._forward = None, []
        if done.buckets is not None:
            self._swap_back()
        self._passes += 1
        done.over = done.reduced = self._clock.mark()
        if done.buckets is not None:
            done.norms = self._clock.fetch(_looked_at(self._gradients(done.buckets), self._model.device))
            done.over = self._clock.mark()
        self._unread.append(done)
        while self._unread and self._clock.is_over(self._unread[0].over):
            self._read(self._unread.popleft())

    def _gradients(self, buckets: list[Bucket]) -> list[Tensor]:
        """Reduced. The parameters' own where buckets cannot be seen: of hooks that torch keeps in C++."""
        if not buckets:
            return [parameter.grad for parameter in self._model.module.parameters() if parameter.grad is not None]
        values = [bucket.values() for bucket in buckets]
        for bucket in buckets:
            bucket.future = None  # with it goes the bucket's memory
        return values

    def _read(self, done: _Pass) -> None:
        exposed = self._clock.milliseconds(done.computed, done.reduced)
        forward = 0.0
        for marks in done.forward:
            forward += self._clock.milliseconds(*marks)
        row: dict[str, Any] = {"ddp/exposed_ms": exposed}
        if done.buckets:
            row |= self._of_buckets(done, done.buckets, exposed, forward)
        if done.norms is not None:
            row |= self._of_gradient(*done.norms.tolist())
        if self._waited is not None and not done.uneven:
            row |= self._waited(self._clock.milliseconds(done.began, done.reduced) + forward)
        self._log(row)

    def _of_buckets(self, done: _Pass, buckets: list[Bucket], exposed: float, forward: float) -> dict[str, Any]:
        since = functools.partial(self._clock.milliseconds, buckets[0].ready)
        first = comm = until = 0.0
        for bucket in buckets:
            ready, reduced = since(bucket.ready), since(bucket.reduced or done.reduced)
            first = first or reduced
            comm += max(0.0, reduced - max(ready, until))
            until = max(until, reduced)
        return {
            "ddp/buckets": len(buckets),
            "ddp/bytes": sum(bucket.bytes for bucket in buckets),
            "ddp/comm_ms": comm,
            "ddp/overlap": 1.0 - min(exposed, comm) / comm if comm > 0 else 1.0,
            "ddp/wait_ms": first + forward,
        }

    def _of_gradient(self, norms: list[float], counts: list[float]) -> dict[str, Any]:
        nonfinite = int(sum(counts))
        if self._finite and nonfinite:
            self._say(f"the gradient is not finite: {nonfinite} elements, {self._names()}")
        self._finite = nonfinite == 0
        return {"ddp/grad_norm": math.hypot(*norms), "ddp/nonfinite": nonfinite}

    def _names(self) -> str:
        """Of the parameters whose gradients are not finite: few, since one bad loss spoils all."""
        bad = [
            name
            for name, parameter in self._model.module.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(_dense(parameter.grad)).all())
        ]
        more = f" and {len(bad) - 3} more parameters" if len(bad) > 3 else ""
        return f"in {', '.join(bad[:3])}{more}" if bad else "in no parameter's .grad"


def _tensors(returned: Any) -> Iterator[Tensor]:
    """In what a forward pass returned, as far as DDP itself looks for them."""
    if isinstance(returned, Tensor):
        yield returned
    elif isinstance(returned, list | tuple):
        for value in returned:
            yield from _tensors(value)
    elif isinstance(returned, Mapping):
        for value in returned.values():
            yield from _tensors(value)
    elif dataclasses.is_dataclass(returned):
        for field in dataclasses.fields(returned):
            yield from _tensors(getattr(returned, field.name))


def _dense(values: Tensor) -> Tensor:
    return values.coalesce().values() if values.is_sparse else values


def _looked_at(gradients: list[Tensor], device: torch.device) -> Tensor:
    """(norms, numbers of elements that are not finite) of them. Nothing waits for a device; on the host, where it costs
    nothing to look at a norm, elements are only counted when it is not finite."""
    if not gradients:
        return torch.zeros(2, 1)
    dense = [_dense(values) for values in gradients]
    norms = [_norm(values) for values in dense]
    if device.type == "cpu":
        read = [norm.item() for norm in norms]  # further tensors would cost a tenth of a millisecond
        if all(map(math.isfinite, read)):
            return torch.tensor([read, [0.0] * len(read)], dtype=torch.float64)
    counts = [(~torch.isfinite(values)).sum() for values in dense]
    return torch.stack([torch.stack([norm.double() for norm in norms]), torch.stack(counts).double()])


def _norm(dense: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(dense, dtype=None if dense.dtype.itemsize >= 4 else torch.float32)
    return norm
