"""A DDP training with the checkpointer and no run: `alone.py STEPS DIES_AFTER`; rank 1 dies after that step (0: never)."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import nn

import wbdist


def say(*words: str) -> None:
    """In one piece, since both ranks write to one pipe."""
    os.write(1, f"{' '.join(words)}\n".encode())


def main(steps: int, dies_after: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    torch.manual_seed(dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with wbdist.checkpoints("ckpt", save_every="3 steps", config={"lr": 0.1}) as saved:
        saved.track(model=model, optimizer=optimizer)
        restored = saved.restore()
        say("restored", restored.manifest.name if restored else "nothing")
        for note in restored.notes if restored else ():
            say("note", note)
        for step in range(restored.step if restored else 0, steps):
            model(torch.full((2, 4), float(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            saved.maybe_save(step + 1)
            if step + 1 == dies_after and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        saved.save(steps, block=True)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    say("weights", weights.numpy().tobytes().hex())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
