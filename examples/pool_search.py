"""Random search on a pool: every worker logs into the one run, whatever happens to it.

python examples/pool_search.py [--mode offline]
"""

from __future__ import annotations

import argparse
import random

import wbdist


def evaluate(seed: int) -> tuple[float, float]:
    """Descends on (x - 3)^2 with a step size of its own; its losses are rows of the parent's run."""
    rate = random.Random(seed).uniform(0.01, 1.1)
    x = 10.0
    for _ in range(20):
        x -= rate * 2 * (x - 3)
        wbdist.log({"loss": (x - 3) ** 2, "rate": rate})
    return (x - 3) ** 2, rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default=None)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with wbdist.init(project="pool-search", mode=arguments.mode) as run, wbdist.Pool(arguments.workers) as pool:
        best = (float("inf"), 0.0)
        results = pool.imap_unordered(evaluate, range(24))
        for found in results:
            best = min(best, found)
            run.log({"best": best[0], "evaluated": results.completed})
        run.summary["best_rate"] = best[1]
        pool.close()
        pool.join()
    print(f"best loss {best[0]:.3g} at rate {best[1]:.3f}")


if __name__ == "__main__":
    main()
