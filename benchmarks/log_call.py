"""One `log` call of 10 scalars: wbdist against wandb offline, trackio, and the cheapest code that does the physical work.

    python benchmarks/log_call.py [--rounds 3] [--trackio-python PATH]

Contenders are interleaved: each round runs each of them once in each mode, in a fresh process and directory.

    full     calls back to back                      paced   one call a millisecond
    work     a call after 1 ms of work that holds the GIL      busy    paced, while another process writes and fsyncs

Printed are the medians over the rounds of each percentile, the worst call of all rounds, the CPU of the whole process tree a
row (the same process without calls subtracted), bytes a row on disk, and memory. Floors: `write` encodes with msgspec and makes
one write(2) a row, `mmap` copies the same bytes into a mapped file. trackio needs an environment of its own
(`python -m venv X; X/bin/pip install trackio psutil`), given by --trackio-python; without it, it is left out.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEYS = [f"train/metric_{i}" for i in range(10)]
CALLS = {"full": 50_000, "paced": 2_000, "work": 1_500, "busy": 2_000}
PEERS = ("wandb", "trackio")
CONTENDERS = ("none", "write", "mmap", "wbdist", *PEERS)


# In the measured process ------------------------------------------------------------------------------


def open_contender(name: str, directory: Path) -> tuple[Callable[[dict[str, float]], Any], Callable[[], None]]:
    """(log, finish)"""
    if name == "none":
        return lambda row: None, lambda: None
    if name == "wbdist":
        import wbdist

        run = wbdist.init(project="bench", mode="offline", dir=directory, settings={"silent": True, "console": "off"})
        return run.log, run.finish
    if name == "wandb":
        os.environ.update(WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB_ERROR_REPORTING="false", WANDB_X_DISABLE_STATS="true")
        import wandb

        peer = wandb.init(project="bench", mode="offline", dir=str(directory))
        return peer.log, peer.finish
    if name == "trackio":
        os.environ.update(TRACKIO_DIR=str(directory), HF_HUB_OFFLINE="1")
        import trackio

        trackio.init(project="bench", embed=False)
        return trackio.log, trackio.finish
    import msgspec

    encode = msgspec.msgpack.Encoder().encode
    fd = os.open(directory / "rows", os.O_RDWR | os.O_CREAT)
    if name == "write":
        write, now = os.write, time.time

        def log_written(row: dict[str, float]) -> None:
            write(fd, encode((now(), row)))

        return log_written, lambda: os.fsync(fd)
    import mmap

    os.posix_fallocate(fd, 0, 64 << 20)
    window = mmap.mmap(fd, 64 << 20)
    at = 0

    def log_mapped(row: dict[str, float]) -> None:
        nonlocal at
        data = encode((time.time(), row))
        window[at : at + len(data)] = data
        at += len(data)

    def finish_mapped() -> None:
        os.fsync(fd)
        os.ftruncate(fd, at)

    return log_mapped, finish_mapped


def tree_cpu(process: Any) -> dict[int, float]:
    """pid -> CPU seconds, of the process and what it has started."""
    import psutil

    found = {}
    for member in [process, *process.children(recursive=True)]:
        try:
            times = member.cpu_times()
            found[member.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def hold_the_gil(seconds: float) -> None:
    end = time.perf_counter() + seconds
    x = 0
    while time.perf_counter() < end:
        for i in range(200):
            x += i * i


def measure(name: str, mode: str, calls: int, directory: Path) -> dict[str, Any]:
    import psutil

    me = psutil.Process()
    log, finish = open_contender(name, directory)
    row = dict.fromkeys(KEYS, 0.5)
    for i in range(20):  # warm: schemas, caches, lazy threads
        row[KEYS[0]] = i / 7
        log(row)
    clock = time.perf_counter_ns
    taken: list[int] = [0] * calls
    cpu_before = tree_cpu(me)
    began = time.perf_counter()
    deadline = began
    steps = []
    for i in range(calls):
        row = {key: i / (7 + n) for n, key in enumerate(KEYS)}
        if mode == "work":
            step_began = clock()
            hold_the_gil(0.001)
        elif mode != "full":
            deadline += 0.001
            while (rest := deadline - time.perf_counter()) > 0:
                time.sleep(rest)
        start = clock()
        log(row)
        taken[i] = clock() - start
        if mode == "work":
            steps.append(clock() - step_began)
    loop = time.perf_counter() - began
    memory = sum(p.memory_info().rss for p in [me, *me.children(recursive=True)]) / 2**20
    cpu_after = tree_cpu(me)
    finish_began = time.perf_counter()
    finish()
    finish_seconds = time.perf_counter() - finish_began
    cpu_finished = tree_cpu(me)
    # The tree is smaller after finish (a peer's service may have left): each process counts with the last that was seen of it.
    cpu = sum(
        max(cpu_after.get(pid, 0.0), cpu_finished.get(pid, 0.0)) - cpu_before.get(pid, 0.0) for pid in cpu_after | cpu_finished
    )
    return {
        "taken": sorted(taken),
        "loop_us": loop / calls * 1e6,
        "finish_ms": finish_seconds * 1e3,
        "cpu_us": cpu / calls * 1e6,
        "rss_mib": memory,
        "step_us": statistics.fmean(steps) / 1e3 if steps else 0.0,
    }


# The driver -------------------------------------------------------------------------------------------


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def run_one(name: str, mode: str, calls: int, python: str, where: str | None) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix=f"bench-{name}-", dir=where))
    # Byte code is cached, as in any installed package: this checkout may forbid it.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": str(ROOT)}
    if name in PEERS:
        env["PYTHONPATH"] = ""
    env.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "wbdist-bench-pyc"))
    flood = _start_flood(directory.parent) if mode == "busy" else None
    try:
        command = [python, __file__, "--worker", name, mode, str(calls), str(directory)]
        done = subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        result["bytes_row"] = size_of(directory) / (calls + 20)
        return result
    finally:
        if flood is not None:
            flood.kill()
            flood.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _start_flood(directory: Path) -> subprocess.Popen[bytes]:
    """Writes and fsyncs 256 MiB again and again on the same file system, as a checkpoint would."""
    code = (
        "import os, sys\nblock = os.urandom(1 << 22)\npath = sys.argv[1]\n"
        "fd = os.open(path, os.O_WRONLY | os.O_CREAT)\nos.unlink(path)\n"
        "while True:\n    os.lseek(fd, 0, 0)\n    for _ in range(64): os.write(fd, block)\n    os.fsync(fd)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(directory / f"flood-{os.getpid()}")])


def report(mode: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    def at(result: dict[str, Any], share: float) -> float:
        taken = result["taken"]
        return float(taken[min(len(taken) - 1, int(len(taken) * share))]) / 1e3

    med = statistics.median
    idle = med(r["cpu_us"] for r in found["none"])
    table: dict[str, dict[str, float]] = {}
    for name, results in found.items():
        table[name] = {
            "p50": med(at(r, 0.5) for r in results),
            "p99": med(at(r, 0.99) for r in results),
            "p99.9": med(at(r, 0.999) for r in results),
            "worst": max(r["taken"][-1] for r in results) / 1e3,
            "step": med(r["step_us"] for r in results),
            "cpu": med(r["cpu_us"] for r in results) - idle,
            "bytes": med(r["bytes_row"] for r in results),
            "rss": med(r["rss_mib"] for r in results),
            "finish": med(r["finish_ms"] for r in results),
        }
    print(f"\n{mode}: {CALLS[mode]} calls, times in us, median of {len(found['none'])} rounds, worst of all")
    titles = ("p50", "p99", "p99.9", "worst", "CPU/row", "B/row", "RSS MiB", "finish ms", "step us" if mode == "work" else "")
    print(" " * 8 + "".join(f"{title:>{width}}" for title, width in zip(titles, (8, 8, 9, 9, 9, 7, 9, 11, 9), strict=True)))
    for name, v in table.items():
        step = f"{v['step']:9.0f}" if mode == "work" else ""
        print(
            f"{name:<8}{v['p50']:8.2f}{v['p99']:8.1f}{v['p99.9']:9.1f}{v['worst']:9.0f}{v['cpu']:9.1f}{v['bytes']:7.0f}"
            f"{v['rss']:9.1f}{v['finish']:11.1f}{step}"
        )
    for peer in (*PEERS, "write", "mmap"):
        if peer in table:
            ratios = "  ".join(
                f"{key} {table['wbdist'][key] / max(table[peer][key], 1e-9):.3g}" for key in ("p50", "p99", "p99.9", "cpu")
            )
            print(f"  wbdist / {peer}: {ratios}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", default="full,paced,work,busy")
    parser.add_argument("--trackio-python", help="a Python that has trackio and psutil")
    parser.add_argument("--dir", help="where the contenders write; default: the system's temporary directory")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, mode, calls, directory = args.worker
        print("\n" + json.dumps(measure(name, mode, int(calls), Path(directory))))
        return
    contenders = [name for name in CONTENDERS if name != "trackio" or args.trackio_python]
    for mode in args.modes.split(","):
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name in contenders:
                python = args.trackio_python if name == "trackio" else sys.executable
                calls = CALLS[mode] // (10 if mode == "full" and name in PEERS else 1)
                found[name].append(run_one(name, mode, calls, python, args.dir))
        report(mode, found)


if __name__ == "__main__":
    main()
