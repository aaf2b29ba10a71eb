"""A job whose result is a function of its sample order alone: linear regression in float64, without noise.

Slow until the file `hurry` exists, so that whoever changes the world under it need not hurry.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import wbdist

SAMPLES, BATCH, EPOCHS, RATE, MOMENTUM = 2400, 4, 3, 0.01, 0.5


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64) + 0.1


def start() -> nn.Linear:
    net = nn.Linear(4, 1, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def step(model: nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = ((model(x).squeeze(1) - y) ** 2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.detach()


def main(strategy: str) -> None:
    with wbdist.job(
        project="elastic", name="job", checkpoint_dir="ckpt", save_every="3 steps", strategy=strategy, keep_last=3
    ) as job:
        net = start()
        model = job.ddp(net)
        opt = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        data = job.loader(TensorDataset(*samples()), batch_size=BATCH)
        job.track(model=model, optimizer=opt, data=data)
        for x, y in job.steps(data, epochs=EPOCHS):
            loss = step(model, opt, x, y)
            job.log({"loss": float(loss), "world": job.world_size})
            if not Path("hurry").exists():
                time.sleep(0.2)
        job.summary["weights"] = [*net.weight.flatten().tolist(), *net.bias.tolist()]


if __name__ == "__main__":
    main(sys.argv[1])
