"""Plays plans of kills outside of pytest: to replay a failure, or to look for new ones for as long as wanted.

python tests/faults/hunt.py --seed 17                     one plan
python tests/faults/hunt.py --seed 100 --count 50 --keep-going
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.aftermath import verify
from support.plans import make_plan
from support.trial import FaultError, Trial
from support.uninterrupted import References


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--job", choices=["torch", "light"], default="torch")
    parser.add_argument("--blows", type=int, help="kills from outside")
    parser.add_argument("--aims", type=int, help="kills from inside")
    parser.add_argument("--world", type=int)
    parser.add_argument("--strategy", choices=["rank0", "per_rank"])
    parser.add_argument("--mode", choices=["online", "offline"])
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    parser.add_argument("--directory", type=Path, help="where everything is kept (default: a new temporary directory)")
    options = parser.parse_args()
    root = options.directory or Path(tempfile.mkdtemp(prefix="wbdist-faults-"))
    kills = failures = 0
    references = References(root / "references")
    for seed in range(options.seed, options.seed + options.count):
        plan = make_plan(
            seed,
            job=options.job,
            blows=options.blows,
            aims=options.aims,
            world_size=options.world,
            strategy=options.strategy,
            mode=options.mode,
        )
        began = time.monotonic()
        reference = references.get(plan)
        trial, failed = Trial(root / f"seed-{seed}", plan), False
        try:
            with trial:
                trial.run()
                verify(trial, reference)
        except FaultError as error:
            failures += 1
            print(f"FAILED {error}\n", flush=True)
            failed = True
        done, aimed = trial.kills, len(trial.hits())
        kills += done
        if not failed:
            shutil.rmtree(trial.directory)
        seconds = time.monotonic() - began
        print(
            f"seed {seed}: {plan.world_size} ranks, {plan.strategy}, {plan.mode}: {done} kills ({aimed} aimed), "
            f"{len(trial.codes)} launchers, {seconds:.0f} s; so far {kills} kills, {failures} failures",
            flush=True,
        )
        if failures and not options.keep_going:
            break
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
