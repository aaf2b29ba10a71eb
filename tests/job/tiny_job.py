"""A job small enough to be run dozens of times: linear regression with dropout-like noise from the RNG, on made-up data."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import TensorDataset

import wbdist


def train(args: argparse.Namespace) -> None:
    if args.die_at_start is not None and int(os.environ.get("RANK", "0")) == args.die_at_start:
        raise RuntimeError("told to die at start-up")
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(args.samples, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 0.1
    with wbdist.job(
        project="tiny",
        name=args.name,
        config={"lr": 0.01},
        checkpoint_dir=args.checkpoint_dir,
        checkpoint_copy=args.checkpoint_copy,
        save_every=args.save_every,
        strategy=args.strategy,
    ) as job:
        net = nn.Linear(4, 1)
        model = job.ddp(net)
        opt = torch.optim.SGD(model.parameters(), lr=job.config.lr, momentum=0.9)
        data = job.loader(TensorDataset(x, y), batch_size=4)
        job.track(model=model, optimizer=opt, data=data)
        for xs, ys in job.steps(data, epochs=args.epochs, accumulate=args.accumulate):
            noise = 0.01 * torch.randn_like(xs)
            # As a user of DDP does: gradients are summed over the ranks once a group.
            with model.no_sync() if job.accumulating and job.world_size > 1 else nullcontext():
                loss = ((model(xs + noise).squeeze(1) - ys) ** 2).mean()
                (loss / args.accumulate).backward()
            if not job.accumulating:
                opt.step()
                opt.zero_grad()
            job.log({"loss": loss})
            time.sleep(args.step_seconds)
        job.summary["weights"] = [float(v).hex() for v in net.weight.flatten().tolist() + net.bias.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint-dir", default=None)
    parser.add_argument("--checkpoint-copy", default=None)
    parser.add_argument("--save-every", default="5 steps")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--name", default=None)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--die-at-start", type=int, default=None)
    args = parser.parse_args()
    wbdist.launch(train, nprocs=args.nproc, args=(args,))


if __name__ == "__main__":
    main()
