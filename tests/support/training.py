"""A tiny training with everything in it that a checkpoint must bring back: for tests of checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.files import FileLayer
from wbdist.core.coordination import Coordinator
from wbdist.core.position import HISTORY, RunPosition, Watermark
from wbdist.hooks.loader import ResumableLoader


def position(step: int, attempt: int = 1, run_id: str = "r1") -> RunPosition:
    """Where the run stands after `step`, when every step logs one row."""
    return RunPosition(run_id, "p", "e", Watermark(attempt, {HISTORY: {"rank0": step}}, step - 1), {"loss": 0.25}, 1.5)


class Average:
    """An exponential moving average: a Stateful of one's own, with tensors, numbers and a tuple inside."""

    def __init__(self) -> None:
        self.mean = torch.zeros(3)
        self.count = 0

    def update(self, value: torch.Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * value
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": (self.count, "steps")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"].clone()
        self.count, _ = state["seen"]


class Training:
    """One rank's training: dropout, batch norm, momentum, a schedule, an average, and noise from every generator."""

    def __init__(
        self,
        coordinator: Coordinator,
        directory: Path,
        *,
        attempt: int = 1,
        layer: FileLayer | None = None,
        same_data: bool = False,
        **options: Any,
    ) -> None:
        """`same_data`: every rank trains on all data, so that ranks stay alike without talking."""
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        self.coordinator = coordinator
        data = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.8)
        self.average = Average()
        rank, world_size = (0, 1) if same_data else (coordinator.rank, coordinator.world_size)
        self.data = ResumableLoader(TensorDataset(data, data.sum(1, keepdim=True)), 4, rank=rank, world_size=world_size, seed=5)
        self.losses: list[float] = []
        self.step = 0
        self.attempt = attempt
        self.checkpoints = Checkpointer(directory, coordinator, attempt=attempt, layer=layer, **options)

    def track(self, *without: str) -> None:
        pieces = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
            "data": self.data,
        }
        self.checkpoints.track(**{name: piece for name, piece in pieces.items() if name not in without})

    def restore(self) -> Any:
        restored = self.checkpoints.restore(timeout=20)
        if restored is not None:
            self.step = restored.step
        return restored

    def train(self, steps: int, save_at: tuple[int, ...] = ()) -> None:
        """Trains up to step `steps`; the loss of step n is losses[-1] after it."""
        while self.step < steps:
            for x, y in self.data:
                noise = random.random() + float(np.random.random()) + float(torch.rand(()))
                output = self.model(x)
                loss = ((output.sum(1, keepdim=True) - y + 0.01 * noise) ** 2).mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                self.average.update(output.detach().mean(0))
                self.losses.append(loss.item())
                self.step += 1
                if self.step in save_at:
                    self.checkpoints.save(self.step, position(self.step, self.attempt), timeout=20)
                if self.step == steps:
                    break

    def everything(self) -> dict[str, Any]:
        """All state, bit by bit, to compare two trainings."""
        words = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            words.update({f"optimizer.{index}.{k}": v for k, v in slots.items()})
        words["average"] = self.average.mean
        bits = {name: tensor.detach().numpy().tobytes().hex() for name, tensor in words.items()}
        return bits | {
            "losses": [loss.hex() for loss in self.losses],
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "schedule": self.scheduler.state_dict()["last_epoch"],
            "count": self.average.count,
            "data": self.data.state_dict(),
            "python": random.random(),
            "numpy": float(np.random.random()),
            "torch": float(torch.rand(())),
        }
