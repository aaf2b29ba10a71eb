"""`Run.watch`: how a model's gradients and parameters are distributed, every so many batches.

A batch that is not looked at costs one call of a hook on the model, however many parameters it has: gradients get hooks for the
one batch that is. What is counted stays on the model's device until the backward pass has ended; then all of it is fetched at
once, and journaled into the open row, so that the next `log` of the script is of the same step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wbdist.errors import UsageError

BINS = 64

Kind = Literal["gradients", "parameters", "all"]


class _Handle(Protocol):
    def remove(self) -> None: ...


class Watched:
    """One model. `keep` gets {key: histogram record}, on the thread that ends the backward pass, or runs `forward`."""

    def __init__(
        self, model: nn.Module, log: Kind, log_freq: int, prefix: str, keep: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.model = model
        self._log = log
        self._freq = log_freq
        self._prefix = prefix
        self._keep = keep
        self._batches = 0
        self._counts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._fetching = False
        self._for_one_batch: list[_Handle] = []
        self._hook = model.register_forward_pre_hook(self._on_forward)

    def remove(self) -> None:
        """The model is as it was before."""
        self._hook.remove()
        self._end_batch()

    def _on_forward(self, _model: nn.Module, _inputs: Any) -> None:
        if not self.model.training:
            return
        self._batches += 1
        if self._batches < self._freq:
            return
        self._batches = 0
        self._end_batch()
        self._counts.clear()
        for name, parameter in self.model.named_parameters():
            if self._log != "gradients":
                self._counts[f"parameters/{self._prefix}{name}"] = count(parameter)
            if self._log != "parameters" and parameter.requires_grad:
                key = f"gradients/{self._prefix}{name}"
                hook = functools.partial(self._on_gradient, key)
                self._for_one_batch.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
        if self._log == "parameters":
            self._fetch()

    def _on_gradient(self, key: str, gradient: Tensor) -> None:
        self._counts[key] = count(gradient)
        if not self._fetching:
            self._fetching = True
            # Runs when the whole backward pass is done: the only moment when all gradients are there.
            torch.autograd.Variable._execution_engine.queue_callback(self._fetch)  # noqa: SLF001

    def _fetch(self) -> None:
        self._end_batch()
        counts, self._counts = self._counts, {}
        if counts:
            self._keep(histograms(counts))

    def _end_batch(self) -> None:
        self._fetching = False
        for handle in self._for_one_batch:
            handle.remove()
        self._for_one_batch.clear()


def watch(  # noqa: PLR0917  (internal, of one caller)
    watched: list[Watched],
    models: Any,
    log: Kind | None,
    log_freq: int,
    idx: int | None,
    log_graph: bool,
    keep: Callable[[Mapping[str, Any]], None],
) -> None:
    """`Run.watch`: adds to `watched`, all models or none."""
    given = list(models) if isinstance(models, list | tuple) else [models]
    if log not in {"gradients", "parameters", "all", None}:
        raise UsageError(f"watch(log={log!r}): choose 'gradients', 'parameters' or 'all'")
    if log_freq < 1:
        raise UsageError(f"watch(log_freq={log_freq!r}): give a number of batches, 1 or more")
    if log_graph:
        raise UsageError("watch(log_graph=True): a model's graph is not kept; leave it out")
    for number, model in enumerate(given):
        if not isinstance(model, nn.Module):
            raise UsageError(f"watch() takes torch.nn.Module, not {type(model).__name__}")
        if any(each.model is model for each in watched) or any(other is model for other in given[:number]):
            raise UsageError("watch(): this model is watched already; call unwatch(model) first to watch it otherwise")
    if log is None:
        return
    for model in given:
        place = len(watched) if idx is None else idx
        watched.append(Watched(model, log, log_freq, f"graph_{place}" if place else "", keep))


def unwatch(watched: list[Watched], models: Any) -> None:
    """`Run.unwatch`."""
    chosen = None if models is None else [id(model) for model in (models if isinstance(models, list | tuple) else [models])]
    for each in list(watched):
        if chosen is None or id(each.model) in chosen:
            each.remove()
            watched.remove(each)


def count(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(counts, lowest, highest) of what is finite, on the values' device; nothing here waits for it."""
    flat = values.detach()
    flat = (flat.coalesce().values() if flat.is_sparse else flat).flatten()
    flat = flat.abs() if flat.is_complex() else flat
    flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
    counts = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
    if flat.numel() == 0:
        return counts, flat.new_tensor(0.0), flat.new_tensor(0.0)
    finite = torch.isfinite(flat)
    low = torch.where(finite, flat, torch.inf).amin()
    high = torch.where(finite, flat, -torch.inf).amax()
    place = ((flat - low) * (BINS / (high - low))).nan_to_num(0.0, 0.0, 0.0).clamp(0, BINS - 1).long()
    return counts.scatter_add_(0, place, finite.long()), low, high


def histograms(counts: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, dict[str, Any]]:
    """Records of what `count` counted, fetched from each device at once."""
    by_device: dict[torch.device, list[str]] = {}
    for key, (_, low, _) in counts.items():
        by_device.setdefault(low.device, []).append(key)
    found: dict[str, dict[str, Any]] = {}
    for keys in by_device.values():
        numbers = torch.stack([counts[key][0] for key in keys]).tolist()
        lows = torch.stack([counts[key][1].double() for key in keys]).tolist()
        highs = torch.stack([counts[key][2].double() for key in keys]).tolist()
        for key, values, low, high in zip(keys, numbers, lows, highs, strict=True):
            found[key] = {"_type": "histogram", "values": values, "bins": _edges(low, high, sum(values))}
    return {key: found[key] for key in counts}


def _edges(low: float, high: float, number: int) -> list[float]:
    if number == 0:
        low, high = 0.0, 1.0
    elif low == high:  # as numpy has it
        low, high = low - 0.5, high + 0.5
    return [low + (high - low) * place / BINS for place in range(BINS + 1)]
