"""One rank of the process test: rounds of units that meet in a store barrier, until the agreement says stop; then a last
round without barriers, in which a rank may die."""

from __future__ import annotations

import argparse
import os
import sys
import time

from wbdist.distributed import coordination
from wbdist.distributed.identity import detect
from wbdist.preemption.agreement import StopAgreement
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.signals import SignalSource

parser = argparse.ArgumentParser()
parser.add_argument("rank")
parser.add_argument("world")
parser.add_argument("port")
parser.add_argument("rounds", type=int)
args = parser.parse_args()
os.environ |= {"RANK": args.rank, "WORLD_SIZE": args.world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.port}
os.environ |= {"LOCAL_RANK": args.rank, "LOCAL_WORLD_SIZE": args.world}

for number in range(args.rounds + 1):
    last = number == args.rounds
    peers = coordination.connect(detect(), f"round{number}", timeout=30.0)
    hub = NoticeHub([SignalSource()])
    hub.start()
    agreement = StopAgreement(peers, hub, 1.0 if last else 20.0)
    peers.barrier("ready", 30.0)
    print("running", number, flush=True)
    unit = 0
    while agreement.begin_unit():
        if last:
            time.sleep(0.001)
        else:
            peers.barrier(f"unit/{unit}", 10.0)
        unit += 1
    print("stopped", agreement.units, agreement.agreed, flush=True)
    if not agreement.agreed:
        print("missing", agreement.missing, flush=True)
    sys.stdin.readline()
    agreement.close()
    hub.close()
    peers.close()
