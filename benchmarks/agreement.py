"""What it costs a step to be stoppable: the agreement, against the collectives that are used for it elsewhere.

    python benchmarks/agreement.py [--world 2] [--calls 200000]

On every rank, in one run, interleaved: an empty call; `StopAgreement.begin_unit` with its listener running; an all-reduce
(MAX) of one integer over gloo, as frameworks do it; one look at the c10d store. Then how long a stop takes: from the notice on
one rank until every rank has been told to stop, with units of 1 ms.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from wbdist.core.coordination import Coordinator
from wbdist.distributed import coordination
from wbdist.distributed.identity import detect
from wbdist.preemption.agreement import StopAgreement
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice

BATCH = 1000
"""Calls timed together where one call is too short for the clock."""
ROUNDS = 10
GOAL_US = 1.0


def timed(body: Callable[[], object], calls: int, batch: int) -> list[float]:
    """Microseconds per call of each batch."""
    found = []
    for _ in range(max(calls // batch, 1)):
        began = time.perf_counter_ns()
        for _ in range(batch):
            body()
        found.append((time.perf_counter_ns() - began) / batch / 1000)
    return found


def show(name: str, values: list[float]) -> float:
    values = sorted(values)
    middle = statistics.median(values)
    print(f"  {name:<34} p50 {middle:9.3f} us   p99 {values[int(len(values) * 0.99)]:9.3f} us", flush=True)
    return middle


def stop_time(peers: Coordinator, number: int, unit: float) -> float:
    """Seconds from a notice on the last rank until all ranks have stopped; measured there."""
    hub = NoticeHub([])
    agreement = StopAgreement(peers, hub, timeout=20.0)
    peers.barrier(f"ready{number}", 60.0)
    told = 0.0
    while agreement.begin_unit():
        time.sleep(unit)
        if peers.rank == peers.world_size - 1 and agreement.units == 20 + number:
            told = time.monotonic()
            hub.tell(Notice("bench", "stop", told))
    assert agreement.agreed
    peers.barrier(f"stopped{number}", 60.0)
    took = time.monotonic() - told
    agreement.close()
    return took


def rank_main(calls: int) -> None:
    logging.getLogger("wbdist").setLevel(logging.ERROR)
    identity = detect()
    peers = coordination.connect(identity, "bench", timeout=60.0)
    coordination.init_process_group(identity, incarnation="bench", timeout=60.0)
    hub = NoticeHub([])
    agreement = StopAgreement(peers, hub, timeout=20.0)
    flag = torch.zeros(1, dtype=torch.int32)
    empty: list[float] = []
    begin: list[float] = []
    reduce: list[float] = []
    look: list[float] = []
    for _ in range(ROUNDS):
        share = calls // ROUNDS
        empty += timed(lambda: None, share, BATCH)
        begin += timed(agreement.begin_unit, share, BATCH)
        if identity.world_size > 1:
            dist.barrier()
            reduce += timed(lambda: dist.all_reduce(flag, op=dist.ReduceOp.MAX), 200, 1)
            look += timed(lambda: peers.peek("nothing"), 200, 1)
    agreement.close()
    if identity.rank == 0:
        print(f"{identity.world_size} rank(s)")
        base = show("empty call", empty)
        cost = show("begin_unit, nobody asks", begin) - base
        if reduce:
            ratio = show("all_reduce of one integer (gloo)", reduce) / cost
            show("one look at the store", look)
            print(
                f"  begin_unit above an empty call: {cost:.3f} us (goal {GOAL_US} us); the all-reduce costs {ratio:.0f}x that"
            )
        if cost > GOAL_US:
            raise SystemExit(f"begin_unit costs {cost:.3f} us, the goal is {GOAL_US} us")
    if identity.world_size > 1:
        stops = []
        for number in range(ROUNDS):
            round_peers = coordination.connect(identity, f"stop{number}", timeout=60.0)
            stops.append(stop_time(round_peers, number, 0.001))
            round_peers.barrier("next", 60.0)
        if identity.rank == identity.world_size - 1:
            stops.sort()
            print(f"  notice -> all ranks stopped: p50 {stops[len(stops) // 2] * 1000:.0f} ms, max {stops[-1] * 1000:.0f} ms")
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--calls", type=int, default=200_000)
    args = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(args.calls)
        return 0
    for world in args.world:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--calls", str(args.calls)],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]
        try:
            codes = [rank.wait(300) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
