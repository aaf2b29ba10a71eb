"""What DDP does when no communication hook is registered, as a hook: the same bits in the gradients.

DDP's reducer scales while it copies a gradient into its bucket, by a product with 1/n; a gradient that lies in the bucket
already (`gradient_as_bucket_view`, kept from the pass before) it divides by n. A registered hook gets unscaled buckets. The two
ways give the same bits when n is a power of two; for other n each parameter is scaled the way the reducer would have.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel


class PlainReduction:
    """`(bucket) -> Future[list[Tensor]]` for one model, on all ranks alike."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        self._active = 0
        """Ranks that have not joined, of the pass that is going on."""
        self._before: dict[int, int] = {}
        """id(parameter) -> where its gradient lay when the pass came to it, for those that may lie in a bucket."""
        size = dist.get_world_size(model.process_group)
        if model.gradient_as_bucket_view and size & (size - 1):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    note = functools.partial(self._note, parameter)
                    parameter.register_hook(note)  # type: ignore[no-untyped-call]

    def __call__(self, bucket: GradBucket) -> Future[list[Tensor]]:
        buffer, ranks = bucket.buffer(), self._ranks(bucket)
        if buffer.is_sparse:
            buffer.div_(ranks)
        elif self._before:
            home = buffer.untyped_storage().data_ptr()
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                if self._before.get(id(parameter), home) == home:
                    gradient.div_(ranks)
                else:
                    gradient.mul_(1.0 / ranks)
        elif ranks > 1:
            buffer.mul_(1.0 / ranks)
        # As DDP's reducer calls it: torch.distributed.all_reduce costs tens of microseconds more, for each bucket.
        reduced: Future[list[Tensor]] = self._model.process_group.allreduce([buffer]).get_future()
        return reduced

    def _note(self, parameter: Parameter, _gradient: Tensor) -> None:
        gradient = parameter.grad
        self._before[id(parameter)] = 0 if gradient is None else gradient.untyped_storage().data_ptr()

    def _ranks(self, bucket: GradBucket) -> int:
        """What to divide by. Under `Join(divide_by_initial_world_size=False)` the ranks that still train: they are counted
        once a pass, by a collective of one number that only this mode has (DDP keeps the result of its own to itself)."""
        model = self._model
        config = model._join_config  # noqa: SLF001  (Join has no public way to ask)
        if not config.enable or not config.is_first_joinable or model._divide_by_initial_world_size:  # noqa: SLF001
            return dist.get_world_size(model.process_group)
        if bucket.index() == 0:
            trains = torch._C._current_graph_task_id() != -1  # noqa: SLF001
            count = torch.tensor([int(trains)], device=model.device)
            dist.all_reduce(count, group=model.process_group)
            self._active = int(count.item())
        return self._active
