"""A job whose state is a number: counts one further every 20 ms up to its argument, saves it when told to stop, and notes which
attempt counted what. It stands for a training job; what carries over a real one is the checkpoint directory."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

rank = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f".{os.environ['RANK']}"
last, state, told = int(sys.argv[1]), Path(f"state{rank}"), []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, _: told.append(signal.Signals(number).name))
at = int(state.read_text()) if state.exists() else 0
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
while at < last:
    at += 1
    with Path(f"counted{rank}").open("a") as file:
        file.write(f"{restart} {at}\n")
    time.sleep(0.02)
    if told:
        state.write_text(str(at))
        Path(f"told.{restart}{rank}").write_text(" ".join(told))
        sys.exit(75)
