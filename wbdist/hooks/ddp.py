"""What DDP's gradient reduction costs and brings: a communication hook around the one that is there, or around none.

A backward pass is followed through its buckets:

    forward  ->  bucket 0 ready  ->  ...  ->  last bucket ready  ->  backward computed  ->  all reduced
    (waits in a broadcast of buffers)  (each bucket: ready -> reduced)                 (exposed)

Gradients are what they are without it, bit for bit: a hook of the user's runs as it is, and where there is none the buckets
are scaled and summed exactly as DDP itself does it (`ddp_plain`). Nothing waits, no collective is added, and numbers are read
after the last bucket was reduced, on the thread that ends the backward pass. On CUDA times are events, read when they are
done, so that no step waits for the device: its numbers are in the row of a later step.
"""
# Without `from __future__ import annotations`: DDP compares a hook's annotations with the classes themselves.

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from wbdist.errors import UsageError
from wbdist.hooks.ddp_clock import Mark, clock_of
from wbdist.hooks.ddp_plain import PlainReduction

Hook: TypeAlias = Callable[[Any, GradBucket], Future[Tensor]]

UNREAD = 8
"""Passes whose device times are not done yet; older ones are given up, so that a lagging device costs no memory."""

REDUCE: Mapping[str, str] = {
    "ddp/buckets": "first",
    "ddp/bytes": "first",
    "ddp/comm_ms": "mean",
    "ddp/exposed_ms": "max",
    "ddp/overlap": "mean",
    "ddp/wait_ms": "max",
    "ddp/grad_norm": "first",
    "ddp/nonfinite": "first",
}
"""What becomes of the ranks' values in one run for all: gradients are alike on all ranks, times are not."""


class Log(Protocol):
    """Takes one pass's numbers; called on the thread that ends a backward pass."""

    def __call__(self, data: Mapping[str, Any]) -> None: ...


class _Bucket:
    """One bucket of a pass."""

    __slots__ = ("future", "ready", "reduced")

    def __init__(self, ready: Mark) -> None:
        self.ready = ready
        self.reduced: Mark | None = None
        self.future: Future[Tensor] | None = None


class _Pass:
    """One backward pass that reduces."""

    __slots__ = ("buckets", "bytes", "computed", "forward", "norms", "reduced")

    def __init__(self, forward: list[tuple[Mark, Mark]]) -> None:
        self.forward = forward
        """Where the forward passes waited for buffers to be broadcast: before and after."""
        self.buckets: list[_Bucket] = []
        self.bytes = 0
        self.computed: Mark | None = None
        self.reduced: Mark | None = None
        self.norms: Tensor | None = None
        """What `_looked_at` made of it, on the host once `reduced` is over; None in a pass that is not looked at."""


class DdpWatch:
    """One model's reduction, watched. Made on all ranks, before the first backward pass; it lasts as long as the model.

    Every pass that reduces gives `log` one row of numbers: `ddp/buckets`, `ddp/bytes` (before a hook compresses them),
    `ddp/comm_ms` (time in which a bucket was being reduced), `ddp/exposed_ms` (the part after backward had computed
    everything), `ddp/overlap` (the share of comm_ms that computing hid) and `ddp/wait_ms` (from where this rank was ready until
    all were: see `stragglers`). Every `norm_every`-th pass, the first included, `ddp/grad_norm` of the reduced gradient (with a
    GradScaler: of the scaled one) and `ddp/nonfinite`, its number of NaN and infinite elements; 0 looks at none.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        log: Log,
        *,
        hook: Hook | None = None,
        state: Any = None,
        norm_every: int = 10,
        say: Callable[[str], None] = lambda text: None,
        waited: Callable[[float], Mapping[str, Any]] | None = None,
    ) -> None:
        """`hook` and `state` as for `register_comm_hook`, which may also be called later. `say`: called once when the
        gradient stops being finite, with the names of parameters. `waited`: called with each pass's wait in ms; what it
        returns is logged along.

        Raises UsageError when the model is none of DDP's, or has a hook already.
        """
        if not isinstance(model, DistributedDataParallel):
            raise UsageError(f"watch_ddp() takes a model wrapped in DistributedDataParallel, not {type(model).__name__}")
        if norm_every < 0:
            raise UsageError(f"watch_ddp(norm_every={norm_every}): give a number of backward passes, or 0 for no norms")
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
        self._norm_every = norm_every
        self._clock = clock_of(model.device)
        self._passes = 0
        self._pass: _Pass | None = None
        self._unread: deque[_Pass] = deque(maxlen=UNREAD)
        self._finite = True
        self._entered: Mark | None = None
        self._forward: list[tuple[Mark, Mark]] = []
        self._reduce: Callable[[GradBucket], Future[Any]] = PlainReduction(model)
        self._composed = False
        model.register_comm_hook(None, self._on_bucket)
        model.register_comm_hook = self._compose  # type: ignore[method-assign]
        if hook is not None:
            self._compose(state, hook)
        model.register_forward_pre_hook(self._on_enter)
        model.module.register_forward_pre_hook(self._on_forward, prepend=True)

    def _compose(self, state: object, hook: Hook) -> None:
        """In place of the model's `register_comm_hook`: the hook runs inside ours; torch's own checks, once, as there."""
        if self._composed:
            raise RuntimeError("register_comm_hook or register_builtin_comm_hook can only be called once.")
        self._model._check_comm_hook(hook)  # type: ignore[no-untyped-call]  # noqa: SLF001
        self._composed = True
        self._reduce = functools.partial(hook, state)

    # A pass, in the order in which it happens ---------------------------------------------------------

    def _on_enter(self, _model: torch.nn.Module, _inputs: Any) -> None:
        self._entered = self._clock.mark() if torch.is_grad_enabled() else None

    def _on_forward(self, _module: torch.nn.Module, _inputs: Any) -> None:
        """DDP has done what it does before a forward pass."""
        entered, self._entered = self._entered, None
        if entered is not None:
            if len(self._forward) == UNREAD * 8:  # passes that nobody differentiates
                self._forward.clear()
            self._forward.append((entered, self._clock.mark()))

    def _on_bucket(self, _state: object, bucket: GradBucket) -> Future[Tensor]:
        # A rank that has joined (torch's Join) reduces zeros to match its peers, and no backward pass is going on here.
        if torch._C._current_graph_task_id() == -1:  # noqa: SLF001
            return self._reduce(bucket)
        if self._pass is None or bucket.index() == 0:
            self._pass, self._forward = _Pass(self._forward), []
        entry = _Bucket(self._clock.mark())
        self._pass.buckets.append(entry)
        self._pass.bytes += _bytes(bucket.buffer())
        # A `then`, not a done-callback, which may run after who waits for the future has gone on.
        future: Future[Tensor] = self._reduce(bucket).then(functools.partial(self._on_reduced, entry))
        entry.future = future
        if bucket.is_last():
            torch.autograd.Variable._execution_engine.queue_callback(self._on_computed)  # noqa: SLF001
        return future

    def _on_reduced(self, entry: _Bucket, future: Future[Any]) -> Tensor:
        """On the process group's thread, or a stream of its own."""
        result: Tensor | list[Tensor] = future.value()
        entry.reduced = self._clock.mark()
        return result[0] if isinstance(result, list) else result

    def _on_computed(self) -> None:
        if self._pass is not None:
            self._pass.computed = self._clock.mark()
            # DDP's own callback, which waits for the buckets, was queued in between.
            torch.autograd.Variable._execution_engine.queue_callback(self._on_all_reduced)  # noqa: SLF001

    def _on_all_reduced(self) -> None:
        done, self._pass = self._pass, None
        if done is None:
            return
        results = [bucket.future.value() for bucket in done.buckets if bucket.future is not None]
        for bucket in done.buckets:
            bucket.future = None  # with it goes the bucket's memory
        if self._norm_every and self._passes % self._norm_every == 0:
            done.norms = self._clock.fetch(_looked_at(results, self._model.device))
        self._passes += 1
        done.reduced = self._clock.mark()
        self._unread.append(done)
        while self._unread and self._clock.is_over(self._unread[0].reduced):
            self._read(self._unread.popleft())

    def _read(self, done: _Pass) -> None:
        first = done.buckets[0].ready
        since = functools.partial(self._clock.milliseconds, first)
        comm = until = 0.0
        for bucket in done.buckets:
            ready, reduced = since(bucket.ready), since(bucket.reduced)
            comm += max(0.0, reduced - max(ready, until))
            until = max(until, reduced)
        exposed = min(comm, max(0.0, until - since(done.computed)))
        wait = since(done.buckets[0].reduced) + sum(self._clock.milliseconds(*marks) for marks in done.forward)
        row: dict[str, Any] = {
            "ddp/buckets": len(done.buckets),
            "ddp/bytes": done.bytes,
            "ddp/comm_ms": comm,
            "ddp/exposed_ms": exposed,
            "ddp/overlap": 1.0 - exposed / comm if comm > 0 else 1.0,
            "ddp/wait_ms": wait,
        }
        if done.norms is not None:
            row |= self._of_gradient(*done.norms.tolist())
        if self._waited is not None:
            row |= self._waited(wait)
        self._log(row)

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


def _dense(values: Tensor) -> Tensor:
    return values.coalesce().values() if values.is_sparse else values


def _bytes(values: Tensor) -> int:
    dense = values._values() if values.is_sparse else values  # noqa: SLF001  (of uncoalesced ones: what is sent)
    return dense.numel() * dense.element_size()


def _looked_at(results: list[Tensor], device: torch.device) -> Tensor:
    """(norms, numbers of elements that are not finite) of the buckets. Nothing waits for a device; on the host, where it costs
    nothing to look at a norm, elements are only counted when it is not finite."""
    dense = [_dense(result).flatten() for result in results]
    norms = torch.stack([_norm(values) for values in dense])
    if device.type == "cpu" and bool(torch.isfinite(norms).all()):
        return torch.stack([norms, torch.zeros_like(norms)])
    return torch.stack([norms, torch.stack([(~torch.isfinite(values)).sum() for values in dense]).double()])


def _norm(dense: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(dense, dtype=None if dense.dtype.itemsize >= 4 else torch.float32)
    return norm.double()
