"""A rank of a sweep's trial: `trial.py KEYS`; RANK and WORLD_SIZE say which. Opens its run under every strategy, one after the
other, and prints a JSON line for each: what this rank's config is, and after the script tried to change it. Without torch."""

from __future__ import annotations

import json
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
    for strategy in ("rank0", "per_rank", "shared", "rank_zero_only"):
        os.environ["WANDB_RUN_ID"] = f"t-{strategy}"
        config = {"lr": 1.0, "net": {"width": 8, "deep": 2}, "rank": 16}
        run = wbdist.init_ranks(project="p", id="always the same", mode="offline", strategy=strategy, config=config)
        run.config.update({"lr": 9})
        wbdist.log({"loss": run.config.lr})
        facts = {"strategy": strategy, "id": run.id, "sweep": run.sweep_id, "config": run.config.as_dict()}
        print(json.dumps(facts), flush=True)
        wbdist.finish()


if __name__ == "__main__":
    main()
