"""The buckets of one backward pass, one by one: when each was ready, and when it was reduced.

DDP hands its buckets to a process group, or to the user's communication hook. For a pass that is looked at closely, the group
is replaced by one that notes and passes on; the hook is wrapped, and left alone in other passes. Either way the reduction is
the one that would have been: DDP's own scaling, the user's own future.
"""
# Without `from __future__ import annotations`: DDP compares a hook's annotations with the classes themselves.

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from wbdist.hooks.ddp_clock import Clock, Mark

Hook: TypeAlias = Callable[[Any, GradBucket], Future[Tensor]]


class Bucket:
    __slots__ = ("bytes", "future", "ready", "reduced")

    def __init__(self, ready: Mark, buffer: Tensor) -> None:
        self.ready = ready
        self.bytes = _bytes(buffer)
        self.reduced: Mark | None = None
        """None while it is not, and on the host for a moment after DDP knows that it is."""
        self.future: Future[Any] | None = None
        """Of the reduced values, a tensor or a list of one."""

    def values(self) -> Tensor:
        """Once it is reduced. Keeps the bucket's memory alive, as `future` does."""
        assert self.future is not None
        value: Tensor | list[Tensor] = self.future.value()
        return value[0] if isinstance(value, list) else value


class NotingGroup(dist.ProcessGroup):
    """Stands before `inner` for a DDP reducer, between a forward pass and the end of its backward pass: all that a reducer asks
    of its group then is all-reduce."""

    def __init__(self, inner: dist.ProcessGroup, clock: Clock) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]  # torch's stub lacks this one
        self._inner = inner
        self._clock = clock
        self.buckets: list[Bucket] = []
        """Since somebody emptied it."""

    def allreduce(self, tensors: Any, options: Any = None) -> Any:  # type: ignore[override]  # the one way DDP calls it
        (buffer,) = tensors
        if not buffer.is_floating_point() and not buffer.is_complex():  # which parameters were used, not a bucket
            return self._inner.allreduce(tensors, options)
        bucket = Bucket(self._clock.mark(), buffer)
        self.buckets.append(bucket)
        work = self._inner.allreduce(tensors, options)
        bucket.future = work.get_future()
        bucket.future.then(functools.partial(self._on_reduced, bucket))
        return work

    def _on_reduced(self, bucket: Bucket, _future: Future[Any]) -> None:
        """On a thread of the process group, or a stream of its own."""
        bucket.reduced = self._clock.mark()


class NotingHook:
    """A communication hook of the user's, wrapped."""

    def __init__(self, hook: Hook, state: object, clock: Clock) -> None:
        self._hook = hook
        self._state = state
        self._clock = clock
        self.buckets: list[Bucket] | None = None
        """Where to note; None while nobody looks."""

    def reduce(self, _state: object, bucket: GradBucket) -> Future[Tensor]:
        """What DDP is given in place of the user's."""
        if self.buckets is None:
            return self._hook(self._state, bucket)
        noted = Bucket(self._clock.mark(), bucket.buffer())
        self.buckets.append(noted)
        # The future that DDP waits for is the one behind `then`, so that what it noted is there when DDP goes on.
        noted.future = self._hook(self._state, bucket).then(functools.partial(self._on_reduced, noted))
        return noted.future

    def _on_reduced(self, bucket: Bucket, future: Future[Any]) -> Any:
        value = future.value()
        bucket.reduced = self._clock.mark()
        return value[0] if isinstance(value, list) else value


def _bytes(values: Tensor) -> int:
    dense = values._values() if values.is_sparse else values  # noqa: SLF001  (of uncoalesced ones: what is sent)
    return dense.numel() * dense.element_size()
