"""Under torchrun: trains the same thing with plain DDP and with DDP watched, and compares every gradient bit by bit.

`ddp_bits.py OUT SEED CASES`: drawn alike on all ranks; rank 0 writes what differed, and what was told, as JSON.
"""

import json
import math
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms import Join
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from wbdist.hooks.ddp import DdpWatch


class Net(nn.Module):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, sparse=case["sparse"])
        self.first = nn.Linear(6, 17)
        self.norm = nn.BatchNorm1d(17)
        self.sometimes = nn.Linear(17, 17)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(17, 5)
        self.unused_every = case["unused_every"]
        self.calls = 0

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = self.norm(self.first(self.embedding(places)))
        if not self.unused_every or (self.calls + dist.get_rank()) % self.unused_every:
            hidden = hidden + self.sometimes(hidden)
        return self.last(self.drop(hidden.relu()))


def own_hook(group, bucket):
    """A future of one's own: sums, and divides by something else afterwards."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0] / 7)


def bf16_hook(group, bucket):  # torch refuses its own by name where there is no CUDA
    return default_hooks.bf16_compress_hook(group, bucket)


def power_sgd(_state, bucket):
    return powerSGD_hook.powerSGD_hook(_state, bucket)


HOOKS: dict[str, Any] = {
    "none": None,
    "allreduce": default_hooks.allreduce_hook,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": bf16_hook,
    "own": own_hook,
    "power_sgd": power_sgd,
}


def draw(source: random.Random) -> dict[str, Any]:
    unused_every = source.choice([0, 0, 3])
    hook = source.choice(["none", "none", *HOOKS])
    # PowerSGD's callbacks start collectives: over gloo's threads they are in order with one bucket only, never sparse, and
    # with no other collective such as that of the unused parameters.
    one = hook == "power_sgd"
    unused_every = 0 if one else unused_every
    return {
        "hook": hook,
        "as_view": (as_view := source.random() < 0.5),
        "sparse": hook not in {"power_sgd", "fp16", "bf16"} and not as_view and source.random() < 0.2,
        "bucket_mb": 25 if one else source.choice([25, 0.0005]),
        "unused_every": unused_every,
        "static": (static := not unused_every and source.random() < 0.4),
        "accumulate": 1 if static else source.choice([1, 1, 3]),  # torch itself fails on a static graph within no_sync
        "to_none": source.random() < 0.5,
        "zero_late": source.random() < 0.5,
        "double": source.random() < 0.3,
        "detail_every": source.choice([0, 1, 2]),
        "later": source.random() < 0.5,
        "clip": source.random() < 0.3,
    }


def hook_of(case: dict[str, Any]) -> tuple[Any, Any]:
    state = None
    if case["hook"] == "power_sgd":
        state = powerSGD_hook.PowerSGDState(process_group=None, start_powerSGD_iter=2, min_compression_rate=1)
    return state, HOOKS[case["hook"]]


def train(case: dict[str, Any], watched: bool) -> tuple[list[bytes], list[dict[str, Any]], list[float]]:
    """(all gradients of all steps, rows told, the gradients' norms as they really were)"""
    torch.manual_seed(11)
    net = Net(case)
    if case["double"] and case["hook"] != "power_sgd":
        net = net.double()
    model = DistributedDataParallel(
        net,
        bucket_cap_mb=case["bucket_mb"],
        gradient_as_bucket_view=case["as_view"],
        find_unused_parameters=bool(case["unused_every"]),
        static_graph=case["static"],
    )
    rows: list[dict[str, Any]] = []
    state, hook = hook_of(case)
    if watched and case["later"]:
        DdpWatch(model, rows.append, detail_every=case["detail_every"])
        if hook is not None:
            model.register_comm_hook(state, hook)
    elif watched:
        DdpWatch(model, rows.append, hook=hook, state=state, detail_every=case["detail_every"])
    elif hook is not None:
        model.register_comm_hook(state, hook)
    torch.manual_seed(100 + dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bits: list[bytes] = []
    norms: list[float] = []
    for _ in range(4):
        if not case["zero_late"]:
            optimizer.zero_grad(set_to_none=case["to_none"])
        for micro in range(case["accumulate"]):
            last = micro == case["accumulate"] - 1
            with nullcontext() if last else model.no_sync():
                places = torch.randint(0, 20, (5,))
                loss = (model(places) ** 2).mean()
                if case["zero_late"] and micro == 0:
                    optimizer.zero_grad(set_to_none=case["to_none"])
                loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        found = [g.coalesce().to_dense() if g.is_sparse else g for g in found]
        norms.append(math.sqrt(sum(float(g.double().pow(2).sum()) for g in found)))
        bits += [g.numpy().tobytes() for g in found]
        if case["clip"]:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p is not net.embedding.weight], 0.5)
        optimizer.step()
    return bits + [p.detach().numpy().tobytes() for p in model.parameters()], rows, norms


def train_uneven(watched: bool, hook: Any, **options: Any) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Rank k has 2 + 2k batches; torch's Join makes up for those that the others lack."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    model = DistributedDataParallel(net, bucket_cap_mb=0.0001)
    rows: list[dict[str, Any]] = []
    if watched:
        DdpWatch(model, rows.append, hook=hook, detail_every=1)
    elif hook is not None:
        model.register_comm_hook(None, hook)
    torch.manual_seed(100 + dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bits: list[bytes] = []
    with Join([model], **options):
        for _ in range(2 + 2 * dist.get_rank()):
            optimizer.zero_grad()
            (model(torch.randn(6, 4)) ** 2).mean().backward()
            bits += [p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None]
            optimizer.step()
    return bits + [p.detach().numpy().tobytes() for p in model.parameters()], rows


def compare_uneven() -> list[dict[str, Any]]:
    found = []
    for by_initial in (True, False):
        for hook in (None, own_hook):
            plain, _ = train_uneven(False, hook, divide_by_initial_world_size=by_initial)
            bits, rows = train_uneven(True, hook, divide_by_initial_world_size=by_initial)
            same = torch.tensor([int(bits == plain and len(rows) == 2 + 2 * dist.get_rank())])
            dist.all_reduce(same, op=dist.ReduceOp.MIN)
            found.append({"by_initial": by_initial, "hook": str(hook), "same": bool(same)})
    return found


def main() -> None:
    out, seed, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo")
    source = random.Random(seed)
    report = []
    for _ in range(cases):
        case = draw(source)
        if dist.get_rank() == 0:
            print(case, flush=True)  # what a crash of torch is about
        plain, _, _ = train(case, watched=False)
        bits, rows, norms = train(case, watched=True)
        same = torch.tensor([int(bits == plain)])
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        report.append({"case": case, "same": bool(same), "rows": rows, "norms": norms})
    uneven = compare_uneven()
    if dist.get_rank() == 0:
        (out / "report.json").write_text(json.dumps({"cases": report, "uneven": uneven}))
    dist.barrier()
    dist.destroy_process_group()


main()
