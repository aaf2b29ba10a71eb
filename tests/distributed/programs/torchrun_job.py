"""Under torchrun: a DDP job under one strategy after the other, whose rows tell which ranks were at which step.

`torchrun_job.py STEPS STRATEGY ...`: each strategy's run is named after it; prints a JSON line a rank and strategy.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import wbdist

steps = int(sys.argv[1])
for strategy in sys.argv[2:]:
    with wbdist.job(project="torchrun", name=strategy, mode="offline", strategy=strategy) as job:
        torch.manual_seed(job.rank)  # DDP begins from rank 0's
        net = nn.Linear(4, 1)
        model = job.ddp(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        data = job.loader(TensorDataset(torch.randn(2 * steps * job.world_size, 4)), batch_size=2)
        job.track(model=model, optimizer=optimizer, data=data)
        for (xs,) in job.steps(data, epochs=1):
            optimizer.zero_grad()
            (model(xs) ** 2).mean().backward()
            optimizer.step()
            ranks = torch.tensor(2**job.rank)
            if job.world_size > 1:
                dist.all_reduce(ranks)
            job.log({"who": job.rank, "all": int(ranks)}, reduce={"who": "per_rank", "all": "max"})
            job.log({"logged": 1}, reduce="sum")
        weights = [value.hex() for parameter in net.parameters() for value in parameter.flatten().tolist()]
        backend = dist.get_backend() if dist.is_initialized() else None
        facts = {"strategy": strategy, "rank": job.rank, "size": job.world_size, "backend": backend, "weights": weights}
        print(json.dumps(facts) + "\n", end="", flush=True)
