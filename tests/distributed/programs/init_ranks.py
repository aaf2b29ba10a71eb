"""A rank of a script that tracks itself: `init_ranks.py KEYS STRATEGY`; RANK and WORLD_SIZE say which. Without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from file_coordinator import FileCoordinator

import wbdist
from wbdist.distributed import coordination


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keys = Path(sys.argv[1])
    coordination.connect = lambda *_, **__: FileCoordinator(keys, rank, size)
    run = wbdist.init_ranks(project="p", strategy=sys.argv[2], config={"lr": 0.1 if rank == 0 else 0.2}, mode="offline")
    run.define_reduction({"tokens": "sum"})
    for step in range(5):
        wbdist.log({"loss": float(rank), "tokens": 10 + rank, "lr": wbdist.config.lr}, step=step)
    wbdist.finish()


if __name__ == "__main__":
    main()
