"""What `job.watch_ddp` adds to a step of about 10 ms: plain DDP and watched DDP, step by step in turn, in one run.

    python benchmarks/ddp_hook.py [--steps 400] [--ranks 1,2]

CPU time of the process is what our code costs, whatever else the machine does; wall clock is shown beside it. `no details`
looks closely at no pass, `all details` at each, the default at one in ten. Rows are logged into an offline run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

VARIANTS = {"plain": None, "plain again": None, "watched": 25, "no details": 0, "all details": 1}


def rank(steps: int) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import wbdist
    from wbdist.distributed import coordination, identity
    from wbdist.hooks.ddp import DdpWatch
    from wbdist.hooks.stragglers import StragglerWatch

    torch.set_num_threads(1)
    me = identity.detect()
    peers = coordination.connect(me, timeout=60)
    incarnation = getattr(peers, "incarnation", None)
    if me.world_size == 1:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    else:
        coordination.init_process_group(me, incarnation=incarnation, timeout=60)
    run = wbdist.init(project="bench", mode="offline", dir=tempfile.mkdtemp(), settings=wbdist.Settings(x_disable_stats=True))
    slow = [StragglerWatch(peers, name, "here", print) for name in VARIANTS] if me.world_size > 1 else []

    def made(name: str, detail_every: int | None) -> DistributedDataParallel:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(384, 384), nn.BatchNorm1d(384), nn.ReLU())]
        model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=1)
        if detail_every is not None:
            waited = slow[list(VARIANTS).index(name)].waited if slow else None
            DdpWatch(model, run.log, detail_every=detail_every, waited=waited)
        return model

    models = {name: made(name, detail_every) for name, detail_every in VARIANTS.items()}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-3) for name, model in models.items()}
    xs = torch.randn(160, 384)
    wall: dict[str, list[float]] = {name: [] for name in VARIANTS}
    cpu: dict[str, list[float]] = {name: [] for name in VARIANTS}
    order = list(VARIANTS)
    for number in range(steps + 20):
        for name in order:
            dist.barrier()
            began, spent = time.perf_counter(), time.process_time()
            models[name](xs).pow(2).mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number >= 20:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - spent)
        order = order[1:] + order[:1]
    run.finish()
    for each in slow:
        each.close()
    if me.rank == 0:
        print(json.dumps({"wall": wall, "cpu": cpu}))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.steps)
        return
    for size in map(int, args.ranks.split(",")):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = {
            **os.environ,
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--rank", "--steps", str(args.steps)]
        processes = [
            subprocess.Popen(command, env={**where, "RANK": str(number)}, stdout=subprocess.PIPE, text=True)
            for number in range(size)
        ]
        outputs = [process.communicate()[0] for process in processes]
        found = json.loads(outputs[0].strip().splitlines()[-1])
        print(
            f"{size} rank{'s' if size > 1 else ''}; load {os.getloadavg()[0]:.1f}; medians and means of {args.steps} steps each"
        )
        for clock in ("cpu", "wall"):
            base = found[clock]["plain"]
            for name, times in found[clock].items():
                added = [(mine - other) * 1e6 for mine, other in zip(times, base, strict=True)]
                middle, mean = statistics.median(added), statistics.fmean(sorted(added)[len(added) // 20 : -len(added) // 20])
                step = statistics.median(base) * 1e3
                print(
                    f"  {clock:4} {name:12} step {statistics.median(times) * 1e3:7.2f} ms   added {middle:7.0f} us median "
                    f"({middle / step / 10:+.2f} %), {mean:7.0f} us mean without the outer tenth ({mean / step / 10:+.2f} %)"
                )


if __name__ == "__main__":
    main()
