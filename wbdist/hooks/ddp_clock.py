"""Moments of a step: on the host's clock, or as events in a device's streams. Reading one never waits."""

from __future__ import annotations

import time
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Mark: TypeAlias = Any
"""A float for the host, a torch.cuda.Event for CUDA."""


class Clock(Protocol):
    def mark(self) -> Mark:
        """Now; on a device, when what was queued on the current stream so far is done."""
        ...

    def is_over(self, mark: Mark) -> bool: ...

    def milliseconds(self, start: Mark, end: Mark) -> float:
        """Between two moments that are over."""
        ...

    def fetch(self, values: Tensor) -> Tensor:
        """`values` on the host once a mark made after this call is over."""
        ...


class HostClock:
    """For devices whose operations are done when they return."""

    mark = staticmethod(time.perf_counter)

    def is_over(self, mark: float) -> bool:
        return True

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def fetch(self, values: Tensor) -> Tensor:
        return values


class CudaClock:
    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_over(self, mark: Any) -> bool:
        return bool(mark.query())

    def milliseconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def fetch(self, values: Tensor) -> Tensor:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()
