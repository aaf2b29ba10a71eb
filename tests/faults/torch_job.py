"""The job that is killed, as the README writes one: it uses every generator and logs in every way. Notes, pace: `pace.py`."""

from __future__ import annotations

import argparse
import math
import os
import random

import torch
from pace import arguments, open_acks, take_time
from torch import nn
from torch.utils.data import TensorDataset

import wbdist


def train(args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(args.steps * args.world * 4 // args.epochs, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 0.1
    with wbdist.job(
        project="faults",
        name=args.name,
        config={"lr": 0.01},
        checkpoint_dir=args.checkpoint_dir,
        save_every=args.save_every,
        strategy=args.strategy,
    ) as job:
        acks = open_acks(args, job.rank)
        net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        model = job.ddp(net)
        opt = torch.optim.SGD(model.parameters(), lr=job.config.lr, momentum=0.9)
        data = job.loader(TensorDataset(x, y), batch_size=4)
        job.track(model=model, optimizer=opt, data=data)
        for xs, ys in job.steps(data, epochs=args.epochs):
            noise = 0.01 * torch.randn_like(xs)
            loss = ((model(xs + noise).squeeze(1) - ys) ** 2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            job.log({"loss": loss})
            job.log({"dice": random.random(), "rank": job.rank}, reduce="sum")
            if job.step % 3 == 0:
                job.log({"rare": math.nan if job.step % 2 else 1.0, "word": f"step {job.step}"}, reduce="first")
            if args.padding:
                job.log({"padding": "x" * args.padding}, reduce="first")
            os.write(acks, b"%d %d\n" % (job.attempt, job.step))
            print(f"at step {job.step}", flush=True)
            take_time(args, job.step)
        weights = torch.cat([tensor.flatten() for tensor in net.state_dict().values()])
        job.summary["weights"] = " ".join(float(value).hex() for value in weights)


if __name__ == "__main__":
    train(arguments())
