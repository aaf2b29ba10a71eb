"""One rank of a training whose parameters are sharded (FSDP2 on gloo): a process of its own, for tests of checkpoints."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.training import position
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.distributed.coordination import connect
from wbdist.distributed.identity import RankIdentity


def train(directory: Path, rank: int, world: tuple[int, int, int], port: int, results: Any) -> None:
    """`world` = (ranks, attempt, step to reach); saves the last step. Every rank sees all data, so that worlds compare."""
    signal.alarm(100)
    torch.set_num_threads(1)
    ranks, attempt, until = world
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(4)
    # 7 rows do not divide among 2, 3 or 4 ranks; on one of 4 nothing is left of the last layer's 3.
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    for layer in (model[0], model[3], model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    data = torch.randn(16, 5, generator=torch.Generator().manual_seed(9))
    coordinator = connect(RankIdentity(rank=rank, world_size=ranks), f"attempt-{attempt}")
    checkpoints = Checkpointer(directory, coordinator, attempt=attempt)
    checkpoints.track(model=model, optimizer=optimizer, schedule=schedule)
    restored = checkpoints.restore(timeout=30)
    before = _bits(model, optimizer, schedule)
    for step in range(restored.step if restored else 0, until):
        model(data * (step + 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    checkpoints.save(until, position(until, attempt), block=True, timeout=30)
    after = _bits(model, optimizer, schedule)
    checkpoints.close()
    if rank == 0:
        results.put((before, after))
        results.close()
        results.join_thread()
    coordinator.close()
    dist.destroy_process_group()


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, str]:
    values = dict(model.state_dict())
    for index, slots in optimizer.state_dict()["state"].items():
        values |= {f"{index}.{key}": value for key, value in slots.items()}
    whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in values.items()}
    found = {key: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for key, value in whole.items()}
    return found | {"schedule": str(schedule.state_dict()["last_epoch"]), "lr": str(optimizer.param_groups[0]["lr"])}
