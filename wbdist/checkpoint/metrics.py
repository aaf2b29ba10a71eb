"""The accumulated state of torchmetrics' metrics, which their own `state_dict` leaves out.

By default a metric's state_dict is empty, and never holds how many updates there were, by which running means are weighted.
Tracked as any module, a metric would come back as if nothing had been seen, without a word.
"""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import torch

from wbdist.errors import StateMissingError


def is_metric(value: Any) -> TypeGuard[torch.nn.Module]:
    """Whether `value` is a metric or a collection of them. Does not import what would make one."""
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(value, (library.Metric, library.MetricCollection))


class Metrics:
    """A metric, or a collection, with the metrics within it, as an object with a state. Of this rank alone: not reduced."""

    def __init__(self, metric: torch.nn.Module) -> None:
        self.metric = metric

    def state_dict(self) -> dict[str, Any]:
        states = {
            name: {"values": dict(metric.metric_state), "beside": _beside(metric)} for name, metric in self._all().items()
        }
        return {"module": self.metric.state_dict(), "metrics": states}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Raises StateMissingError when these are not the metrics that were saved."""
        own = self._all()
        here = {name: sorted(metric.metric_state) for name, metric in own.items()}
        there = {name: sorted(saved["values"]) for name, saved in state["metrics"].items()}
        if here != there:
            raise StateMissingError(f"the checkpoint holds the metrics {there}, this job has {here}")
        self.metric.load_state_dict(state["module"])
        for name, metric in own.items():
            metric.reset()  # also what it computed before
            saved = state["metrics"][name]
            for key, value in {**saved["values"], **saved["beside"]}.items():
                setattr(metric, key, _placed(value, metric.device))

    def _all(self) -> dict[str, Any]:
        library = sys.modules["torchmetrics"]
        for module in self.metric.modules():
            if isinstance(module, library.MetricCollection):
                list(module.items(copy_state=False))  # metrics that share a state are brought up to date
        return {name: module for name, module in self.metric.named_modules() if isinstance(module, library.Metric)}


def _beside(metric: Any) -> dict[str, Any]:
    """What a metric keeps beside its declared states: the count of its updates, the extremes of MinMaxMetric, the place in the
    window of Running. Public numbers are what it was made with."""
    return {
        name: value
        for name, value in vars(metric).items()
        if name not in {*metric.metric_state, "_computed"}
        and (isinstance(value, torch.Tensor) or (name.startswith("_") and type(value) in {int, float}))
    }


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_placed(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value
