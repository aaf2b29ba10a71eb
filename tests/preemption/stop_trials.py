"""Jobs told to stop at random moments, by random sources: do all ranks stop before the same step, and go on from there?

    python tests/preemption/stop_trials.py --world 2 4 8 --count 1000 --seed 1      # replay one: --first N --count 1

The ranks (trial_rank.py) are processes that live through many trials, each a whole job over torch's TCPStore and gloo, with
real checkpoints, signals, files and metadata services.
"""

from __future__ import annotations

import argparse
import json
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK = Path(__file__).with_name("trial_rank.py")
HANG = 90.0
"""Seconds without a word from any rank, on a loaded machine, until a trial counts as hanging."""


def run(world: int, seed: int, first: int, count: int) -> dict[int, list[dict[str, Any]]]:
    """What each rank said of each trial. Raises AssertionError with the ranks' last words when one hangs or dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(tempfile.mkdtemp(prefix="stop-trials-"))
    errors = [(root / f"rank{rank}.err").open("w+") for rank in range(world)]
    words = [str(word) for word in (world, port, seed, first, count, root)]
    ranks = [
        subprocess.Popen([sys.executable, str(RANK), str(rank), *words], stdout=subprocess.PIPE, stderr=errors[rank], text=True)
        for rank in range(world)
    ]
    said: dict[int, list[dict[str, Any]]] = {trial: [] for trial in range(first, first + count)}
    try:
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                assert rank.stdout is not None
                selector.register(rank.stdout, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(HANG)
                assert ready, f"no rank has said anything for {HANG:.0f} s{_last_words(errors)}"
                for key, _ in ready:
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    if line:
                        found = json.loads(line)
                        said[found["trial"]].append(found)
                    else:
                        selector.unregister(key.fileobj)
        codes = [rank.wait(HANG) for rank in ranks]
        assert codes == [0] * world, f"ranks ended with {codes}{_last_words(errors)}"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for error in errors:
            error.close()
        shutil.rmtree(root, ignore_errors=True)
    return said


def judge(world: int, said: dict[int, list[dict[str, Any]]]) -> list[str]:
    """What is wrong, by trial."""
    wrong = []
    for trial, lines in said.items():
        stopped = {tuple(line["stopped"]) for line in lines}
        resumed = {tuple(line["resumed"]) for line in lines}
        if len(lines) != world or len(stopped) != 1 or len(resumed) != 1:
            wrong.append(f"world {world}, trial {trial}: the ranks differ: {lines}")
            continue
        (began, at, code), (again, end, last_code) = stopped.pop(), resumed.pop()
        if (began, code) != (0, 75) or again != at or (end, last_code) != (at + 3, 0):
            wrong.append(f"world {world}, trial {trial}: {lines[0]}")
    return wrong


def _last_words(errors: list[Any]) -> str:
    text = ""
    for number, error in enumerate(errors):
        error.seek(0)
        text += f"\n--- rank {number}\n{error.read()[-1500:]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--count", type=int, default=1000, help="Trials in all, shared out over the world sizes.")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    share = -(-args.count // len(args.world))
    wrong: list[str] = []
    for world in args.world:
        began = time.monotonic()
        found = judge(world, run(world, args.seed, args.first, share))
        wrong += found
        took = time.monotonic() - began
        print(
            f"world {world}: {share} trials from {args.first}, {len(found)} wrong, 0 hangs, {took / share:.2f} s each",
            flush=True,
        )
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
