"""What a run costs around its rows: import, init, first log, finish, and 20 short runs in one process; against wandb offline.

    python benchmarks/startup.py [--rounds 5]

Every number comes from a fresh process, contenders interleaved; medians over the rounds. `finish` of wbdist is durable
(fsynced); wandb's offline finish is not. "interpreter" is Python starting and doing nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
import json, os, sys, time
name, directory = sys.argv[1:]
clock = time.perf_counter
began = clock()
found = {}
if name == "interpreter":
    print(json.dumps(found)); raise SystemExit
if name == "wbdist":
    import wbdist as peer
    kwargs = dict(project="bench", mode="offline", dir=directory, settings=dict(silent=True))
else:
    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false", WANDB_X_DISABLE_STATS="true")
    import wandb as peer
    kwargs = dict(project="bench", mode="offline", dir=directory)
row = {f"metric_{i}": i / 7 for i in range(10)}
imported = clock()
found["import ms"] = (imported - began) * 1e3
run = peer.init(**kwargs)
opened = clock()
found["init ms"] = (opened - imported) * 1e3
run.log(row)
logged = clock()
found["first log us"] = (logged - opened) * 1e6
found["init to first log ms"] = (logged - imported) * 1e3
run.finish()
found["finish ms"] = (clock() - logged) * 1e3
many = clock()
for _ in range(20):
    run = peer.init(**kwargs)
    for _ in range(100):
        run.log(row)
    run.finish()
found["20 runs of 100 rows s"] = clock() - many
found["torch or numpy loaded"] = float("torch" in sys.modules or "numpy" in sys.modules)
print("\\n" + json.dumps(found))
"""

GOALS = {"import ms": 60.0, "init to first log ms": 10.0, "finish ms": 10.0, "20 runs of 100 rows s": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the contenders write; default: the system's temporary directory")
    args = parser.parse_args()
    names = ("interpreter", "wbdist", "wandb")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(args.rounds + 1):
        for name in names:
            directory = tempfile.mkdtemp(prefix=f"bench-{name}-", dir=args.dir)
            # Byte code is cached, as in any installed package; the round that fills the cache does not count.
            env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": str(ROOT)}
            env.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "wbdist-bench-pyc"))
            try:
                command = [sys.executable, "-c", WORKER, name, directory]
                done = subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
                if done.returncode != 0:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
                if round_:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    print(f"{'median of ' + str(args.rounds):<26}{'wbdist':>12}{'wandb':>12}{'ratio':>9}{'goal':>9}")
    for key in found["wbdist"][0]:
        ours, theirs = (statistics.median(result[key] for result in found[name]) for name in ("wbdist", "wandb"))
        goal = GOALS.get(key)
        verdict = "" if goal is None else f"{goal:9g} {'met' if ours <= goal else 'MISSED'}"
        print(f"{key:<26}{ours:12.2f}{theirs:12.2f}{ours / theirs if theirs else 0:9.3f}{verdict}")


if __name__ == "__main__":
    main()
