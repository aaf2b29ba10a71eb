"""Under torchrun: windows of steps of a DDP model, in each of which one rank, or none, is slow; rank 0 writes who was named,
and each what it measured (`waits<rank>.json`, WINDOW numbers a window).

`straggling.py OUT SEED WINDOWS [SHARE]`: SHARE of the windows have a slow rank, by 5 to 50 ms before its forward pass.
"""

import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wbdist.distributed import coordination, identity
from wbdist.hooks.ddp import DdpWatch
from wbdist.hooks.stragglers import WINDOW, StragglerWatch, Verdict

out, seed, windows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
share = float(sys.argv[4]) if len(sys.argv) > 4 else 0.5
source = random.Random(seed)
me = identity.detect()
peers = coordination.connect(me, timeout=60)
coordination.init_process_group(me, incarnation=peers.incarnation, timeout=60)
verdicts: list[Verdict] = []
said: list[str] = []
slow = StragglerWatch(peers, "slow", f"host{me.rank}", said.append, verdicts.append)
torch.manual_seed(1)
model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 50), nn.BatchNorm1d(50), nn.Linear(50, 5)), bucket_cap_mb=0.001)
waits: list[float] = []


def waited(milliseconds: float) -> Mapping[str, object]:
    waits.append(milliseconds)
    return slow.waited(milliseconds)


DdpWatch(model, lambda row: None, detail_every=0, waited=waited)


def window(rank: int, delay: float) -> None:
    dist.barrier()
    for _ in range(WINDOW):
        time.sleep(0.003 + (delay if rank == me.rank else 0.0))
        model.zero_grad()
        model(torch.randn(8, 20)).sum().backward()


window(-1, 0.0)  # first passes build things
injected = []
for _ in range(windows):
    rank = source.randrange(me.world_size) if source.random() < share else -1
    delay = source.uniform(0.005, 0.050)
    injected.append((rank, delay * 1e3 if rank >= 0 else 0.0))
    window(rank, delay)
(out / f"waits{me.rank}.json").write_text(json.dumps(waits[WINDOW:]))
if me.rank == 0:
    deadline = time.monotonic() + 60
    while len(verdicts) < windows + 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    found = {verdict.window - 1: [verdict.rank, verdict.late_ms, verdict.named] for verdict in verdicts}
    report = [{"injected": injected[number], "found": found.get(number)} for number in range(windows)]
    (out / "report.json").write_text(json.dumps({"windows": report, "said": said}))
dist.barrier()
slow.close()
dist.destroy_process_group()
