"""Train a small CNN on real handwritten digits with DDP: tracked, resumable, preemption-tolerant.

The same file runs unchanged as

    wbdist launch --nproc 2 examples/digits_ddp.py          # supervised: comes back after a crash
    torchrun --nproc-per-node 2 examples/digits_ddp.py      # somebody else's launcher
    python examples/digits_ddp.py --nproc 2                 # spawns its own ranks
    python examples/digits_ddp.py --nproc 1                 # one plain process, no distributed environment

Kill it at any moment and start it again with the same --checkpoint-dir: it continues where its last checkpoint was, in
the same run, and ends with the history, sample order and weights of a job that was never interrupted.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
import xxhash
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import wbdist


class Net(nn.Module):
    """Two convolutions and two linear layers: 8x8 grey image -> 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 1, 8, 8) in [0, 1] -> (batch, 10)."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.dropout(F.relu(self.hidden(x.flatten(1))), 0.2, self.training)
        logits: torch.Tensor = self.out(x)
        return logits


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 images that ship with scikit-learn: every fifth is held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


def shift(x: torch.Tensor) -> torch.Tensor:
    """Moves each batch by up to one pixel, at random: uses the global generator, which the checkpoint restores."""
    dy, dx = (int(v) for v in torch.randint(-1, 2, (2,)))
    return torch.roll(x, (dy, dx), dims=(2, 3))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    x, y = data.tensors
    return float((model(x).argmax(1) == y).float().mean())


def digest(model: nn.Module) -> str:
    """A fingerprint of every weight, bit by bit."""
    h = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def train(args: argparse.Namespace) -> None:
    train_set, test_set = digits()
    with wbdist.job(
        project=args.project,
        name=args.name,
        config={"lr": args.lr, "momentum": 0.9, "batch_size": args.batch_size, "epochs": args.epochs},
        checkpoint_dir=args.checkpoint_dir,
        save_every=args.save_every,
        strategy=args.strategy,
        seed=args.seed,
    ) as job:
        net = Net()
        model = job.ddp(net)
        opt = torch.optim.SGD(model.parameters(), lr=job.config.lr, momentum=job.config.momentum)
        sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=args.epochs * 22)
        data = job.loader(train_set, batch_size=args.batch_size)
        job.track(model=model, optimizer=opt, scheduler=sched, data=data)  # restored here when a checkpoint exists

        for x, y in job.steps(data, epochs=args.epochs):  # saves, agrees on stops, ends cleanly on a notice
            model.train()
            loss = F.cross_entropy(model(shift(x)), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            job.log({"loss": loss, "lr": sched.get_last_lr()[0]})  # one line for all ranks, the mean over them

        job.log({"accuracy": accuracy(net, test_set)})
        job.summary["weights_xxh3"] = digest(net)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="digits")
    parser.add_argument("--name", default=None)
    parser.add_argument("--checkpoint-dir", default="checkpoints/digits")
    parser.add_argument("--save-every", default="50 steps")
    parser.add_argument("--strategy", default="auto", choices=["auto", "rank0", "per_rank"])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="per rank")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2, help="ranks to spawn when no launcher started us")
    args = parser.parse_args()
    wbdist.launch(train, nprocs=args.nproc, args=(args,))


if __name__ == "__main__":
    main()
