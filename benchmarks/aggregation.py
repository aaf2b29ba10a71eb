"""What N ranks' rows cost the ranks, and how fast they become one run (or N), beside the usual ways to do it.

    python benchmarks/aggregation.py [--ranks 2 4 8] [--rows 10000] [--repeat 3] [--pace MICROSECONDS] [--only NAME ...]
    python benchmarks/aggregation.py --step [--ranks 4] [--rows 2000] [--repeat 3] [--json]

Contenders, interleaved, each in fresh processes, 10 floats a row:

- `rank0`: rows reduced over the ranks into one run's journal, durable against SIGKILL when `log` returns; the time
  includes `finish` on all ranks, so END is fsynced.
- `per_rank`: a run a rank, the same otherwise.
- `queue`: ranks `put` into one multiprocessing.Queue, the parent writes each row (msgpack) to a file. Nothing is reduced; rows
  in a killed rank's feeder are lost, and a rank killed at the wrong moment blocks all others.
- `queue + wandb`: the documented pattern: the parent logs the rows of the queue to its W&B run, offline.
- `wandb per rank`: an offline W&B run a rank, grouped.
- `frames`: the floor of a row that is durable when the call returns: each rank packs the ten numbers with `struct`, sums them
  with `crc32` and copies the frame into a mapped file. No keys and types are looked at, no step, no lock, nobody reads them.
- `alone`: one process logs into a plain offline run, without peers, feed or aggregator, while the other ranks only compute.

`yardstick` is a fixed piece of Python (eight tuples of ten), timed between the calls of the same processes: a virtual machine's
processors change their speed by half with what else their host does, and `p50` is to be read against it.

`--step` is what a training step is longer by: 20 metrics a step, 1 ms of work between. In one online run, in turns of
steps: `log` under rank0, `log` while the aggregator is stopped (SIGSTOP), `log` while the server is, and one packed all-
reduce (gloo) of the same 20 numbers.

Rows are counted over all ranks. Ratios within one table are what to look at; the machine may be shared.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import multiprocessing
import os
import signal
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from common.serving import Server

KEYS = [f"metric_{number}" for number in range(10)]


def loop(put: Callable[[dict[str, float], int], None], rows: int, pace: float) -> dict[str, float]:
    """Microseconds of a call, and of the yardstick."""
    took, yardstick = [], []
    clock = time.perf_counter_ns
    due = time.perf_counter()
    for step in range(rows):
        row = dict.fromkeys(KEYS, step * 0.5)
        began = clock()
        put(row, step)
        took.append(clock() - began)
        if step % 16 == 0:
            began = clock()
            for _ in range(8):
                tuple(row)
            yardstick.append(clock() - began)
        if pace:
            due += pace
            time.sleep(max(0.0, due - time.perf_counter()))
    return digest(took) | {"yard": statistics.median(yardstick) / 1000}


def digest(took: list[int]) -> dict[str, float]:
    ordered = sorted(took)
    at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] / 1000 for share in (0.5, 0.99, 0.999)]
    return {"p50": at[0], "p99": at[1], "p999": at[2], "max": ordered[-1] / 1000}


# wbdist -------------------------------------------------------------------------------------------------


def rank_of_wbdist(directory: str, rows: int, pace: float, strategy: str) -> None:
    from wbdist.distributed import coordination, identity, strategies
    from wbdist.run.init import make_spec
    from wbdist.settings import resolve

    me = identity.detect()
    peers = coordination.connect(me, timeout=60)
    settings = resolve({"mode": "offline", "root_dir": directory, "project": "bench", "run_id": "bench", "silent": True})
    runs = strategies.open_runs(strategy, me, peers, msgspec.structs.replace(make_spec(settings), nonce="bench"))
    peers.barrier("ready", 60)
    began = time.perf_counter()
    took = loop(runs.log, rows, pace)
    looped = time.perf_counter() - began
    runs.finish(0)
    wall = time.perf_counter() - began
    result = {"calls": took, "loop": looped, "wall": wall}
    (Path(directory) / f"{me.rank}.json").write_text(json.dumps(result))
    peers.close()


def count_rows(directory: Path) -> int:
    from wbdist.run.journal import JournalReader, Kind, find_journals

    rows = 0
    for path in find_journals(directory / "wandb"):
        with JournalReader.open(path) as reader:
            while reader.header.role == "run" and (records := reader.read()):
                rows += sum(record.kind is Kind.ROW for record in records)
    return rows


def run_wbdist(ranks: int, rows: int, pace: float, strategy: str = "rank0") -> dict[str, Any]:
    from wbdist.distributed.bootstrap import launch

    with tempfile.TemporaryDirectory() as name:
        launch(rank_of_wbdist, nprocs=ranks, args=(name, rows, pace, strategy))
        results = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(ranks)]
        kept = count_rows(Path(name))
    expected = rows if strategy == "rank0" else ranks * rows
    assert kept == expected, f"{kept} rows of {expected} are in the journals"
    return summary(results, ranks * rows)


# The queue ----------------------------------------------------------------------------------------------


def rank_of_queue(queue: Any, start: Any, rows: int, pace: float, result: Any) -> None:
    start.wait()
    began = time.perf_counter()
    rank = os.getpid()
    took = loop(lambda row, step: queue.put((rank, step, row)), rows, pace)
    looped = time.perf_counter() - began
    queue.put(None)
    result.send({"calls": took, "loop": looped})


def run_queue(ranks: int, rows: int, pace: float, *, wandb: bool = False) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Barrier(ranks + 1)
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    children = [context.Process(target=rank_of_queue, args=(queue, start, rows, pace, send)) for _, send in pipes]
    for child in children:
        child.start()
    encoder = msgspec.msgpack.Encoder()
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as name:
        run = wandb_run(name) if wandb else None
        start.wait()
        began = time.perf_counter()
        ended = count = 0
        while ended < ranks:
            message = queue.get()
            if message is None:
                ended += 1
                continue
            count += 1
            if run is None:
                file.write(encoder.encode(message))
            else:
                run.log({f"rank{message[0]}/{key}": value for key, value in message[2].items()})
        if run is not None:
            run.finish()
        file.flush()
        os.fsync(file.fileno())
        wall = time.perf_counter() - began
    assert count == ranks * rows
    results = [receive.recv() | {"wall": wall} for receive, _ in pipes]
    for child in children:
        child.join()
    return summary(results, ranks * rows)


# wandb --------------------------------------------------------------------------------------------------


def wandb_run(directory: str) -> Any:
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True)
    return wandb.init(project="bench", mode="offline", dir=directory, group="bench", settings=settings)


def rank_of_wandb(directory: str, start: Any, rows: int, pace: float, result: Any) -> None:
    run = wandb_run(directory)
    start.wait()
    began = time.perf_counter()
    took = loop(lambda row, step: run.log(row, step=step), rows, pace)
    looped = time.perf_counter() - began
    run.finish()
    result.send({"calls": took, "loop": looped, "wall": time.perf_counter() - began})


def run_wandb(ranks: int, rows: int, pace: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(ranks)
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    with tempfile.TemporaryDirectory() as name:
        children = [context.Process(target=rank_of_wandb, args=(name, start, rows, pace, send)) for _, send in pipes]
        for child in children:
            child.start()
        results = [receive.recv() for receive, _ in pipes]
        for child in children:
            child.join()
    return summary(results, ranks * rows)


# Floors -------------------------------------------------------------------------------------------------


def rank_of_frames(_number: int, start: Any, rows: int, pace: float, result: Any) -> None:
    head, packed = struct.Struct("<II"), struct.Struct(f"<IBIqd{len(KEYS)}d")
    length = head.size + packed.size
    frame = bytearray(length)
    body = memoryview(frame)[head.size :]
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, rows * length)
        target = mmap.mmap(file.fileno(), rows * length)
        target.madvise(23)  # MADV_POPULATE_WRITE, as a journal does

        def put(row: dict[str, float], step: int) -> None:
            packed.pack_into(frame, head.size, step, 1, 0, step, time.time(), *row.values())
            head.pack_into(frame, 0, packed.size, zlib.crc32(body))
            target.write(frame)

        start.wait()
        began = time.perf_counter()
        took = loop(put, rows, pace)
        wall = time.perf_counter() - began
        os.fsync(file.fileno())
    result.send({"calls": took, "loop": wall, "wall": time.perf_counter() - began})


def rank_alone(number: int, start: Any, rows: int, pace: float, result: Any) -> None:
    """Rank 0 logs, the others compute until it is done."""
    if number:
        start.wait()
        while not result.poll():
            sum(range(1000))
        return
    import wbdist

    with tempfile.TemporaryDirectory() as name:
        settings = wbdist.Settings(silent=True, console="off", x_disable_stats=True)
        run = wbdist.init(project="bench", mode="offline", dir=name, settings=settings)
        start.wait()
        began = time.perf_counter()
        took = loop(run.log, rows, pace)
        looped = time.perf_counter() - began
        run.finish()
        wall = time.perf_counter() - began
    result.send({"calls": took, "loop": looped, "wall": wall})


def run_forked(ranks: int, rows: int, pace: float, rank: Callable[..., None], *, logging: int | None = None) -> dict[str, Any]:
    """`logging`: how many of the ranks log and tell of it; the others go on until these are done."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(ranks)
    pipes = [context.Pipe() for _ in range(ranks)]
    children = [
        context.Process(target=rank, args=(number, start, rows, pace, theirs)) for number, (_, theirs) in enumerate(pipes)
    ]
    for child in children:
        child.start()
    results = [ours.recv() for ours, _ in pipes[:logging]]
    for ours, _ in pipes[logging or ranks :]:
        ours.send(None)
    for child in children:
        child.join()
    return summary(results, rows * len(results))


# A training step ------------------------------------------------------------------------------------------

STEP_KEYS = [f"train/metric_{number}" for number in range(20)]
KIND = "20 metrics a step"
TURN = 50
"""Steps of one kind before the next kind's turn."""


def rank_of_steps(directory: str, steps: int, server: int, url: str, key: str) -> None:
    import torch
    import torch.distributed as dist

    from wbdist.distributed import coordination, identity, strategies
    from wbdist.run.init import make_spec
    from wbdist.settings import resolve

    torch.set_num_threads(1)
    me = identity.detect()
    peers = coordination.connect(me, timeout=60)
    coordination.init_process_group(me, "gloo")
    where = {"mode": "online", "base_url": url, "api_key": key, "root_dir": directory}
    settings = resolve(where | {"project": "bench", "run_id": "bench", "silent": True})
    runs = strategies.open_runs("rank0", me, peers, msgspec.structs.replace(make_spec(settings), nonce="bench"))
    aggregator = getattr(runs, "_aggregator", None)
    stopped = {"log, server stopped": server}
    if aggregator is not None:
        stopped["log, aggregator stopped"] = aggregator.pid
    kinds = ["log", "log, aggregator stopped", "log, server stopped", "packed all-reduce"]
    took: dict[str, list[int]] = {kind: [] for kind in kinds}
    clock = time.perf_counter_ns
    step = 0
    for turn in range(steps * len(kinds) // TURN):
        kind = kinds[turn % len(kinds)]
        dist.barrier()
        if me.rank == 0:
            for stops_in, pid in stopped.items():
                os.kill(pid, signal.SIGSTOP if kind == stops_in else signal.SIGCONT)
        dist.barrier()
        for _ in range(TURN):
            due = clock() + 1_000_000
            row = dict.fromkeys(STEP_KEYS, step * 0.5)
            packed = torch.tensor(list(row.values()), dtype=torch.float64)
            while clock() < due:
                pass
            began = clock()
            if kind == "packed all-reduce":
                dist.all_reduce(packed)
            else:
                runs.log(row, step=step)
            took[kind].append(clock() - began)
            step += 1
    if me.rank == 0:
        for pid in stopped.values():
            os.kill(pid, signal.SIGCONT)
    runs.finish(0)
    (Path(directory) / f"{me.rank}.json").write_text(json.dumps({kind: digest(calls) for kind, calls in took.items()}))
    dist.destroy_process_group()
    peers.close()


def run_steps(ranks: int, steps: int) -> dict[str, dict[str, float]]:
    from wbdist.distributed.bootstrap import launch

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        with Server(Path(name)) as server:
            launch(rank_of_steps, nprocs=ranks, args=(name, steps, server.process.pid, server.url, server.key))
        results = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {
        kind: {at: statistics.median(result[kind][at] for result in results) for at in ("p50", "p99", "max")}
        for kind in results[0]
    }


def show_steps(args: argparse.Namespace) -> None:
    table = []
    for ranks in args.ranks:
        seen = [run_steps(ranks, args.rows) for _ in range(args.repeat)]
        for kind in seen[0]:
            row = {at: statistics.median(run[kind][at] for run in seen) for at in ("p50", "p99", "max")}
            table.append({"ranks": ranks, KIND: kind, **row})
    if args.json:
        json.dump(table, sys.stdout, indent=1)
        return
    print("| ranks | 20 metrics a step | p50 us | p99 us | max us |")
    print("|" + "---|" * 5)
    for row in table:
        print(f"| {row['ranks']} | {row[KIND]} | {row['p50']:.3g} | {row['p99']:.3g} | {row['max']:.3g} |")


def summary(results: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """The ranks' calls: medians over ranks, the worst `max`."""
    calls = {name: statistics.median(result["calls"][name] for result in results) for name in ("p50", "p99", "p999", "yard")}
    calls["max"] = max(result["calls"]["max"] for result in results)
    wall = max(result["wall"] for result in results)
    return {"wall": wall, "krows": rows / wall / 1000, "loop": max(result["loop"] for result in results), **calls}


CONTENDERS: dict[str, Callable[[int, int, float], dict[str, Any]]] = {
    "rank0": run_wbdist,
    "per_rank": functools.partial(run_wbdist, strategy="per_rank"),
    "queue": run_queue,
    "queue + wandb": functools.partial(run_queue, wandb=True),
    "wandb per rank": run_wandb,
    "frames": functools.partial(run_forked, rank=rank_of_frames),
    "alone": functools.partial(run_forked, rank=rank_alone, logging=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, default=10_000, help="per rank")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--pace", type=float, default=0.0, help="microseconds between two rows of a rank; 0: as fast as it goes"
    )
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.step:
        show_steps(args)
        return
    table = []
    for ranks in args.ranks:
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
        for _ in range(args.repeat):
            for name in args.only:
                seen[name].append(CONTENDERS[name](ranks, args.rows, args.pace / 1e6))
        for name, runs in seen.items():
            row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            row["max"] = max(run["max"] for run in runs)
            table.append({"ranks": ranks, "contender": name, **row})
    if args.json:
        json.dump(table, sys.stdout, indent=1)
        return
    print("| ranks | contender | wall s | krows/s | loop s | p50 us | p99 us | p99.9 us | max us | yardstick us |")
    print("|" + "---|" * 10)
    for row in table:
        numbers = [f"{row[key]:.3g}" for key in ("wall", "krows", "loop", "p50", "p99", "p999", "max", "yard")]
        print(f"| {row['ranks']} | {row['contender']} | " + " | ".join(numbers) + " |")


if __name__ == "__main__":
    main()
