"""A rank under torchrun: coordinates, makes the process group, and prints what it saw as one JSON line.

`elastic.py OUT [kill-rank]`: on the first attempt that rank kills itself after everybody met.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from wbdist.distributed import coordination, identity

out, kill = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
me = identity.detect()
peers = coordination.connect(me, timeout=20)
gathered = [value.decode() for value in peers.gather("hello", f"r{me.rank}".encode(), 20)]
agreed = peers.agree("word", b"from rank 0" if me.rank == 0 else None, 20).decode()
made = coordination.init_process_group(me, timeout=20)
total = torch.tensor([float(me.rank)])
if made:
    dist.all_reduce(total)
if kill is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    peers.barrier("before the kill", 20)
    if me.rank == int(kill):
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
again = identity.detect()  # with an initialised group: must agree
other = coordination.connect(me, timeout=20)
other.barrier("second connection", 20)
facts = {
    "identity": [me.rank, me.world_size, me.local_rank, me.local_world_size, me.source, again.source],
    "gathered": gathered,
    "agreed": agreed,
    "sum": float(total),
    "incarnation": getattr(peers, "incarnation", ""),
    "restart": me.restart,
}
(out / f"{me.rank}.json").write_text(json.dumps(facts))
if made:
    dist.barrier()
    dist.destroy_process_group()
