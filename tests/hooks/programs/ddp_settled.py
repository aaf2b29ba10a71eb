"""Ranks that train straight through, and again with DDP made anew at each step, as a resumed job does. Writes what differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wbdist.hooks.buckets import settle
from wbdist.hooks.ddp import DdpWatch

STEPS = 7
fired = 0


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    if kind == "frozen, two types":
        net[0].requires_grad_(False)
        net.append(nn.Linear(1, 1)).double()
        net[-1].float()
        net.insert(len(net) - 1, _Cast())
    return net


class _Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def wrap(net: nn.Module, kind: str) -> nn.Module:
    model = DistributedDataParallel(net, bucket_cap_mb=0.001, find_unused_parameters=kind == "unused")
    generator = torch.get_rng_state()
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()]
    assert settle(model)
    assert torch.equal(generator, torch.get_rng_state())
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    if kind == "watched":
        DdpWatch(model, lambda _: None)
    return model


def train(kind: str, cut: int) -> torch.Tensor:
    net = network(kind)
    data = torch.Generator().manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model = wrap(net, kind)
    for step in range(STEPS):
        if step == cut:
            model = wrap(net, kind)
        x = torch.randn(8, 4, generator=data, dtype=torch.float64 if "types" in kind else torch.float32)
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
    for kind in ("plain", "frozen, two types", "unused", "accumulated", "watched"):
        straight = train(kind, -1)
        differing[kind] = [cut for cut in range(1, STEPS) if not torch.equal(straight, train(kind, cut))]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(differing))
    dist.destroy_process_group()


main()
