"""One rank of the jobs in test_data_waits.py: `data_wait_rank.py WORK BLOCKED_RANK FIRST`.

After FIRST samples the worker of BLOCKED_RANK has no data until WORK/gate exists; it says so in WORK/blocked. Every rank makes
WORK/in-step-<n>.<rank> in the body of step n, writes how many are done to WORK/steps.<rank>, and the final weights to
WORK/weights.<rank>.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import wbdist

WORK, BLOCKED, FIRST = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
SAMPLES, BATCH, EPOCHS = 16, 2, 3


class Slow(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, rank: int) -> None:
        self.rank, self.asked = rank, 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += 1
        if self.rank == BLOCKED and self.asked > FIRST:
            (WORK / "blocked").touch()
            while not (WORK / "gate").exists():
                time.sleep(0.01)
        return torch.tensor([float(index)]) + torch.rand(1), torch.tensor([float(index % 3)])


def main() -> None:
    with wbdist.job(project="waits", checkpoint_dir=WORK / "ckpt", strategy="per_rank", mode="disabled") as job:
        model = job.ddp(nn.Linear(1, 1))
        data = job.loader(Slow(job.rank), BATCH, num_workers=1, prefetch_factor=2, persistent_workers=True)
        job.track(model=model, data=data)
        for x, y in job.steps(data, epochs=EPOCHS):
            (WORK / f"in-step-{job.step + 1}.{job.rank}").touch()
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            with torch.no_grad():  # torch.optim would import the compiler, which takes longer than all else here
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=1e-3)
            (WORK / f"steps.{job.rank}").write_text(str(job.step + 1))
        (WORK / f"weights.{job.rank}").write_text(repr([p.tolist() for p in model.parameters()]))


if __name__ == "__main__":
    main()
