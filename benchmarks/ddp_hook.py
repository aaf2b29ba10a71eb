"""What `job.watch_ddp` adds to a step of about 10 ms: plain DDP and watched DDP, step by step in turn, in one run.

    python benchmarks/ddp_hook.py [--steps 200] [--ranks 1,2]

In each round every variant takes one step, in turning order, and is compared with the two plain steps of that round. `plain
again` is the control: plain against plain, by the same reckoning; what is not far outside its error is not known. `no
details` looks closely at no pass, `all details` at each, `watched` (the default) at one in 50: its number is the mean of two
medians, of the passes that are looked at (those of `all details`) and of the others. Where a model lies in memory is worth
half a percent of a step, so all this is done once for each variant, which are made in another order each time: told are
means, and their standard errors. CPU time of the process is what our code costs, whatever else the machine does; wall clock
is shown beside it.

Each step ends with the row that a job writes then, and what the watching found is part of that row, as it is in a job.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

EVERY = 50
VARIANTS = {"plain": None, "plain again": None, "watched": EVERY, "no details": 0, "all details": 1}
WARM_UP = 20


def rank(steps: int, directory: str, turn: int) -> None:
    import msgspec
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from wbdist.distributed import coordination, identity, strategies
    from wbdist.hooks import ddp, stragglers
    from wbdist.run.init import make_spec
    from wbdist.settings import resolve

    torch.set_num_threads(1)
    me = identity.detect()
    peers = coordination.connect(me, timeout=60)
    incarnation = getattr(peers, "incarnation", None)
    if me.world_size == 1:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    else:
        coordination.init_process_group(me, incarnation=incarnation, timeout=60)
    settings = resolve({"mode": "offline", "root_dir": directory, "project": "bench", "run_id": "bench", "silent": True})
    runs = strategies.open_runs("auto", me, peers, msgspec.structs.replace(make_spec(settings), nonce="bench"))
    slow = [stragglers.StragglerWatch(peers, name, "here", print) for name in VARIANTS] if me.world_size > 1 else []
    ledger = {"_samples": "sum53", "epoch": "first", "_consumed": "first", "_batch": "first"}
    reduce = {**ledger, **ddp.REDUCE, **stragglers.REDUCE}
    steps_of_run = itertools.count()
    found: dict[str, object] = {}

    def made(name: str, detail_every: int | None) -> DistributedDataParallel:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(384, 384), nn.BatchNorm1d(384), nn.ReLU())]
        model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=1)
        if detail_every is not None:
            waited = slow[list(VARIANTS).index(name)].waited if slow else None
            ddp.DdpWatch(
                model,
                found.update,
                detail_every=detail_every,
                waited=waited,
            )
        return model

    turned = list(VARIANTS)[turn:] + list(VARIANTS)[:turn]
    models = {name: made(name, VARIANTS[name]) for name in turned}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-3) for name, model in models.items()}
    xs = torch.randn(160, 384)
    wall: dict[str, list[float]] = {name: [] for name in VARIANTS}
    cpu: dict[str, list[float]] = {name: [] for name in VARIANTS}
    order = list(VARIANTS)
    for number in range(steps + WARM_UP):
        for name in order:
            dist.barrier()
            began, spent = time.perf_counter(), time.process_time()
            models[name](xs).pow(2).mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            number_of_step = next(steps_of_run)
            runs.log({"_samples": number, "epoch": 0, "_consumed": number, "_batch": 160} | found, number_of_step, reduce)
            runs.commit_row()
            found.clear()
            if number >= WARM_UP:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - spent)
        order = order[1:] + order[:1]
    for each in slow:
        each.close()
    runs.finish(0)
    if me.rank == 0:
        print(json.dumps({"wall": wall, "cpu": cpu}))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.steps, args.directory, args.turn)
        return
    for size in map(int, args.ranks.split(",")):
        turns = [run(size, args.steps, turn) for turn in range(len(VARIANTS))]
        plural = "s" if size > 1 else ""
        print(f"{size} rank{plural}; load {os.getloadavg()[0]:.1f}; {len(turns)} times {args.steps} rounds")
        for clock in ("cpu", "wall"):
            show(clock, [each[clock] for each in turns])


def run(size: int, steps: int, turn: int) -> dict[str, dict[str, list[float]]]:
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
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--rank", "--steps", str(steps), "--turn", str(turn), "--directory", directory]
        processes = [
            subprocess.Popen(command, env={**where, "RANK": str(number)}, stdout=subprocess.PIPE, text=True)
            for number in range(size)
        ]
        outputs = [process.communicate()[0] for process in processes]
    found: dict[str, dict[str, list[float]]] = json.loads(outputs[0].strip().splitlines()[-1])
    return found


def show(clock: str, turns: list[dict[str, list[float]]]) -> None:
    step = statistics.mean(statistics.median(times["plain"]) for times in turns)
    print(f"  {clock:4} {'plain':12} a step of {step * 1e3:.2f} ms")
    for name in list(VARIANTS)[1:]:
        added = [added_by(name, times) for times in turns]
        middle, error = statistics.mean(added), statistics.stdev(added) / math.sqrt(len(added))
        told = f"{middle * 1e6:+7.0f} +- {error * 1e6:.0f} us ({middle / step * 100:+.2f} +- {error / step * 100:.2f} %)"
        print(f"  {clock:4} {name:12} added {told}")


def added_by(name: str, times: dict[str, list[float]]) -> float:
    """Seconds a step."""
    plain, again = times["plain"], times["plain again"]
    if name == "plain again":
        return statistics.median(second - first for first, second in zip(plain, again, strict=True))
    added = [mine - (a + b) / 2 for mine, a, b in zip(times[name], plain, again, strict=True)]
    if name != "watched":
        return statistics.median(added)
    near = added_by("all details", times)
    far = statistics.median(each for number, each in enumerate(added, WARM_UP) if number % EVERY)
    return (near + (EVERY - 1) * far) / EVERY


if __name__ == "__main__":
    main()
