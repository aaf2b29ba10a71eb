"""Ranks that train straight through, and again with DDP made anew at each step, as a resumed job does.

`ddp_settled.py OUT`: rank 0 writes, for each kind of model, after which steps other weights came of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wbdist.hooks.buckets import settle, settle_tracked
from wbdist.hooks.ddp import DdpWatch

STEPS = 7
KINDS = (
    "plain",
    "frozen, two types",
    "unused, sometimes",
    "accumulated",
    "watched",
    "static",
    "static, sometimes",
    "static, unused, sometimes",
    "sparse",
    "static, sparse",
    "view",
    "static, view",
    "channels last",
    "tracked",
)
fired = 0


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    if "sparse" in kind:
        net = nn.Sequential(nn.Embedding(30, 4, sparse=True), _Mean(), *net)
    if kind == "channels last":
        net = nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), *net)
        net = net.to(memory_format=torch.channels_last)
    if "sometimes" in kind:
        net = _Sometimes(net)
    if kind == "frozen, two types":
        net[0].requires_grad_(False)
        net.append(nn.Linear(1, 1)).double()
        net[-1].float()
        net.insert(len(net) - 1, _Cast())
    return net


class _Sometimes(nn.Module):
    """One part of it is never used, as static graphs allow, or in every other pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.never = nn.Linear(3, 3)
        self.often = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.often(x))


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


class _Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def wrap(net: nn.Module, kind: str) -> nn.Module:
    model = DistributedDataParallel(
        net,
        bucket_cap_mb=0.001,
        find_unused_parameters="unused" in kind,
        static_graph="static" in kind,
        gradient_as_bucket_view="view" in kind,
    )
    generator = torch.get_rng_state()
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()]
    if kind == "tracked":
        settle_tracked([net, model, "anything"])
    else:
        settle(model)
    settle(model)
    assert torch.equal(generator, torch.get_rng_state())
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(_dense(parameter.grad), _dense(grad))
    if kind == "watched":
        DdpWatch(model, lambda _: None)
    return model


def _dense(values: torch.Tensor) -> torch.Tensor:
    return values.to_dense() if values.is_sparse else values


def train(kind: str, cut: int) -> torch.Tensor:
    net = network(kind)
    data = torch.Generator().manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.0 if "sparse" in kind else 0.9
    )
    model = wrap(net, kind)
    for step in range(STEPS):
        if step == cut:
            model = wrap(net, kind)
        x = torch.randn(8, 4, generator=data, dtype=torch.float64 if "types" in kind else torch.float32)
        if "sparse" in kind:
            x = torch.randint(0, 30, (8, 3), generator=data)
        optimizer.zero_grad()
        if kind == "accumulated":
            with model.no_sync():
                (model(x * 0.5) ** 2).mean().backward()
        (model(x) ** 2).mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten().double() for parameter in net.parameters()])


def main() -> None:
    dist.init_process_group("gloo")
    net = nn.Linear(2, 2)
    calls: list[int] = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    settle(DistributedDataParallel(net))
    assert not calls
    (net(torch.ones(1, 2))).sum().backward()
    assert len(calls) == 2
    differing = {}
    for kind in KINDS:
        straight = train(kind, -1)
        differing[kind] = [cut for cut in range(1, STEPS) if not torch.equal(straight, train(kind, cut))]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(differing))
    dist.barrier()  # a rank that leaves closes connections which others may still be using
    dist.destroy_process_group()


main()
