"""Under any launcher: a job whose DDP model and whose rank's own model are watched; one rank's loss is NaN in step 5.

`ddp_job.py STRATEGY [STEP]`: prints a line of what it saw; fails in that step, behind its backward pass.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import TensorDataset

import wbdist

with wbdist.job(project="hooks", mode="offline", strategy=sys.argv[1]) as job:
    net = nn.Linear(4, 1)
    model = job.ddp(net)
    if job.world_size > 1:
        model.register_comm_hook(None, default_hooks.allreduce_hook)
        try:
            job.watch_ddp(model)
        except wbdist.UsageError as error:
            print(json.dumps({"refused": str(error)}), flush=True)
        model = nn.parallel.DistributedDataParallel(net)
    job.watch_ddp(model, detail_every=1)
    job.run.watch(net, log="parameters", log_freq=1)
    data = job.loader(TensorDataset(torch.randn(4 * 8 * job.world_size, 4)), batch_size=4)
    for (xs,) in job.steps(data, epochs=1):
        loss = (model(xs) ** 2).mean()
        if job.step == 5 and job.rank == job.world_size - 1:
            loss = loss * float("nan")
        net.zero_grad()
        loss.backward()
        job.log({"loss": loss.detach(), "norm": torch.stack([p.grad.norm() for p in net.parameters()]).norm()}, reduce="first")
        if sys.argv[2:] == [str(job.step)]:
            raise ValueError("as asked")
