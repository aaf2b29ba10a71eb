"""One rank of the process tests: units that meet in a store barrier, until the agreement says stop; several rounds."""

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
parser.add_argument("--no-barrier", action="store_true")
parser.add_argument("--timeout", type=float, default=20.0)
args = parser.parse_args()
os.environ |= {"RANK": args.rank, "WORLD_SIZE": args.world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.port}
os.environ |= {"LOCAL_RANK": args.rank, "LOCAL_WORLD_SIZE": args.world}

for number in range(args.rounds):
    peers = coordination.connect(detect(), f"round{number}", timeout=30.0)
    hub = NoticeHub([SignalSource()])
    hub.start()
    agreement = StopAgreement(peers, hub, args.timeout)
    peers.barrier("ready", 30.0)
    print("running", number, flush=True)
    unit = 0
    while agreement.begin_unit():
        if args.no_barrier:
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
