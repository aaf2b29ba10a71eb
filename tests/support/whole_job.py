"""A job in this process with everything in it that a checkpoint must bring back: for tests of checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.aftermath import kept_journals
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

import wbdist
from wbdist.core.position import HISTORY

BATCHES = 7
"""In an epoch; odd, so that its last group is a smaller one."""
STEPS = 3 * BATCHES


class Killed(Exception):  # noqa: N818  (what happened, not an error of anybody)
    """Stands for the death of the process: nothing is saved on the way out."""


class Errors:
    """A metric that accumulates over batches, with per-rank state as torchmetrics has it: sums and a list."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.seen: list[torch.Tensor] = []

    def update(self, value: torch.Tensor) -> None:
        self.total = self.total + value.double()
        self.seen.append(value.detach().clone())

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.seen = state["total"].clone(), [value.clone() for value in state["seen"]]


def live(root: Path) -> list[Any]:
    """The run's rows as the newest attempt shows them: its own, behind what it was built upon. Clocks left out."""
    kept = {journal.header.attempt: journal for journal in kept_journals(root)}
    assert len({journal.header.run_id for journal in kept.values()}) == 1

    def view(attempt: int, count: int | None) -> list[Any]:
        journal = kept[attempt]
        own = journal.rows[:count]
        if journal.header.base is None:
            return own
        below = journal.header.base
        return view(below.attempt, below.counts.get(HISTORY, {}).get("rank0", 0)) + own

    return view(max(kept), None)


def attempt(directory: Path, *, without: str = "", killed_after: int | None = None, save_every: int = 4, **said: Any) -> Any:
    """One life of the job in `directory`: its final state, bit by bit; raises Killed after the step told."""
    with wbdist.job(
        project="p", checkpoint_dir=directory / "ckpt", save_every=save_every, config={"lr": 0.05}, seed=3, **said
    ) as job:
        x = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(1))
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=job.config.lr)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [4])
        # Grows every second step, so that its scale is another one at each.
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        errors = Errors()
        data = job.loader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
        pieces = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "scaler": scaler,
            "average": average,
            "data": data,
        }
        own = {} if without == "errors" else {"errors": errors}
        job.track(**{name: piece for name, piece in pieces.items() if name != without}, per_rank=own)
        for inputs, wanted in job.steps(data, epochs=STEPS // BATCHES, accumulate=2):
            noise = random.random() + float(np.random.random()) + float(torch.rand(()))
            loss = ((model(inputs).sum(1, keepdim=True) - wanted + 0.01 * noise) ** 2).mean()
            scaler.scale(loss / 2).backward()
            errors.update(loss.detach())
            if not job.accumulating:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                average.update_parameters(model)
            job.log({"loss": loss.item(), "scale": scaler.get_scale(), "lr": optimizer.param_groups[0]["lr"]})
            if killed_after is not None and job.step + 1 == killed_after:
                raise Killed
        states = {name: piece.state_dict() for name, piece in {**pieces, "errors": errors}.items()}
        states["draws"] = (random.random(), float(np.random.random()), float(torch.rand(())))
        return bits(states)


def bits(value: Any) -> Any:
    """`value` with tensors as what they are bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value.hex() if isinstance(value, float) else value
