"""Under torchrun: a job whose steps loop over uneven data: in a step, rank k has 1 + (step + k) % 3 batches of its own.

`ddp_uneven.py DIRECTORY [straight|around|other]`: rank 0 gets a notice in step 7 of the first attempt, unless it goes straight;
prints the weights at the end. `around`: all steps are under one Join. `other`: the last rank has a shorter dataset.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms import Join
from torch.utils.data import TensorDataset

import wbdist

directory = Path(sys.argv[1])
how = sys.argv[2] if len(sys.argv) > 2 else ""
try:
    with wbdist.job(project="uneven", mode="offline", checkpoint_dir=directory / "ck", save_every="3 steps") as job:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        model = job.ddp(net)
        job.watch_ddp(model, detail_every=2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        shorter = 4 if how == "other" and job.rank == job.world_size - 1 else 0
        data = job.loader(TensorDataset(torch.randn(40 * job.world_size - shorter, 4)), batch_size=4)
        job.track(model=model, optimizer=optimizer, data=data)
        with Join([model]) if how == "around" else nullcontext():
            for (x,) in job.steps(data, epochs=1):
                batches = 2 if how == "around" else 1 + (job.step + job.rank) % 3
                with nullcontext() if how == "around" else Join([model]):
                    for number in range(batches):
                        optimizer.zero_grad()
                        (model(x * (number + 1)) ** 2).mean().backward()
                        optimizer.step()
                job.log({"batches": batches}, reduce="sum")
                if job.step == 7 and job.rank == 0 and job.attempt == 1 and how != "straight":
                    os.kill(os.getpid(), signal.SIGTERM)
        if job.rank == 0:
            print("weights", [value.hex() for value in torch.cat([p.flatten() for p in net.parameters()]).tolist()], flush=True)
except wbdist.UsageError as error:
    print(f"refused on rank {os.environ['RANK']}: {error}", flush=True)
    os._exit(3)
except SystemExit as end:
    os._exit(0 if end.code == 75 else 1)  # not to make torchrun end the other rank first
