"""Pools, and ranks as threads: what `wbdist.Pool` costs beside the pools it stands for, and what 64 writers of one run cost
each other.

    python benchmarks/pools.py [--calls 5000] [--rows 100000]

Columns: seconds, and as a ratio to the first line of its table. Nothing is asserted. A call of ours is handed over one by
one, so that a killed worker costs one task; multiprocessing's are handed over by chunk, and a killed worker costs the whole
program."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import multiprocess

import wbdist


def nothing(n: int) -> int:
    return n


def work(n: int) -> int:
    """About a millisecond."""
    return sum(range(40_000)) + n


def log_one(n: int) -> int:
    wbdist.log({"n": n, "loss": 0.5})
    return n


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def show(title: str, found: dict[str, float]) -> None:
    print(title)
    first = next(iter(found.values()))
    for name, value in found.items():
        print(f"  {name:<44} {value:8.3f} s  {value / first:6.2f} x")


def pools(calls: int) -> None:
    fork = multiprocessing.get_context("fork")
    dill = multiprocess.get_context("fork")
    run = wbdist.init(project="bench")
    for function, count, chunksize in ((nothing, calls, 1), (nothing, calls, 64), (work, calls // 20, 1)):
        found = {}
        for name, make in (
            ("multiprocessing.Pool", lambda: fork.Pool(2)),
            ("multiprocess.Pool", lambda: dill.Pool(2)),
            ("wbdist.Pool", lambda: wbdist.Pool(2, context="fork", runs="none")),
        ):
            with make() as pool:
                pool.map(nothing, range(8))
                found[name] = seconds(lambda pool=pool, f=function, n=count, c=chunksize: pool.map(f, range(n), c))
        show(f"{count} calls of {function.__name__}, chunks of {chunksize}, 2 workers", found)
    with wbdist.Pool(2, context="fork") as pool:
        pool.map(nothing, range(8))
        plain = seconds(lambda: pool.map(nothing, range(calls), 64))
        logged = seconds(lambda: pool.map(log_one, range(calls), 64))
    show(f"{calls} calls in workers of a run, chunks of 64", {"that log nothing": plain, "that log a row each": logged})
    run.finish()


def threads(rows: int) -> None:
    found = {}
    for count in (1, 8, 64):
        for own in (False, True):
            runs = [wbdist.init(project="bench", reinit="create_new") for _ in range(count if own else 1)]
            together = threading.Barrier(count + 1)

            def rank(run: wbdist.Run, together: threading.Barrier = together, share: int = rows // count) -> None:
                together.wait()
                for i in range(share):
                    run.log({"loss": 0.5, "i": i})

            ranks = [threading.Thread(target=rank, args=(runs[number % len(runs)],)) for number in range(count)]
            for thread in ranks:
                thread.start()

            def all_done(ranks: list[threading.Thread] = ranks, together: threading.Barrier = together) -> None:
                together.wait()
                for thread in ranks:
                    thread.join()

            found[f"{count} threads, {'a run each' if own else 'one run'}"] = seconds(all_done)
            for run in runs:
                run.finish()
    show(f"{rows} rows by ranks that are threads", found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args()
    os.environ.update(WBDIST_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB_X_DISABLE_STATS="true")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        pools(given.calls)
        threads(given.rows)
        os.chdir("/")


if __name__ == "__main__":
    main()
