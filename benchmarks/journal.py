"""Cost of one journalled row: `python benchmarks/journal.py [--busy] [--rows N] [--runs N]`.

Contenders are interleaved, each run a fresh process: our writer with mapped and with written storage, and two floors (encode
with msgpack and `write` a row; a bare list append). Full rate and a 1 ms pace. `--busy`: another process writes and
fsyncs 16 MiB blocks on the same disk meanwhile. Prints medians over the runs (max: worst), as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = ("append", "msgpack-write", "mapped", "written")
GOALS = {"p50": 3.0, "p99": 25.0, "p99.9": 60.0, "max": 5000.0, "bytes": 110.0, "cpu": 6.0}


def contender(name: str, directory: Path) -> tuple[Callable[[dict[str, float], int], None], Callable[[], int]]:
    """The call that logs one row, and one that ends it and says how many bytes lie on disk."""
    if name == "append":
        rows: list[dict[str, float]] = []
        return lambda row, step: rows.append(row), lambda: 0
    if name == "msgpack-write":
        import msgspec

        encode = msgspec.msgpack.encode
        fd = os.open(directory / "rows", os.O_WRONLY | os.O_CREAT)
        return lambda row, step: void(os.write(fd, encode((step, time.time(), row)))), lambda: os.fstat(fd).st_size
    from wbdist.run.journal import JournalHeader, JournalWriter

    header = JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n", writer="w")
    writer = JournalWriter.create(directory / "w.a1.wbdj", header, storage=name)

    def end() -> int:
        writer.close(0)
        return writer.path.stat().st_size

    return lambda row, step: writer.append_row(row, step=step, commit=True, time=time.time()), end


def void(_: object) -> None:
    pass


def measure(name: str, rows: int, pace: float, directory: Path) -> dict[str, float]:
    call, end = contender(name, directory)
    base = {f"train/metric_{k}": random.random() for k in range(10)}
    clock = time.perf_counter_ns
    took = [0] * rows
    cpu = time.process_time()
    for step in range(rows):
        row = dict(base)
        if pace:
            time.sleep(pace)
        began = clock()
        call(row, step)
        took[step] = clock() - began
    cpu = time.process_time() - cpu
    began = clock()
    size = end()
    finish = clock() - began
    took.sort()
    return {
        "p50": took[rows // 2] / 1e3, "p99": took[int(rows * 0.99)] / 1e3, "p99.9": took[int(rows * 0.999)] / 1e3,
        "max": took[-1] / 1e3, "cpu": cpu / rows * 1e6, "bytes": size / rows, "finish_ms": finish / 1e6,
    }  # fmt: skip


def disturb(directory: Path) -> subprocess.Popen[bytes]:
    code = (
        "import os, sys\nblock = os.urandom(1 << 20)\nfd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "while True:\n    for _ in range(16): os.write(fd, block)\n    os.fsync(fd); os.lseek(fd, 0, 0)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(directory / "disturbance")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="at full rate; a thirtieth of it at the 1 ms pace")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--dir", type=Path, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, rows, pace, directory = options.one
        print(json.dumps(measure(name, int(rows), float(pace), Path(directory))))
        return
    results: dict[tuple[float, str], list[dict[str, float]]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="journal-bench-", dir=options.dir))
    disturbance = disturb(scratch) if options.busy else None
    try:
        for run in range(options.runs):
            for pace, rows in ((0.0, options.rows), (0.001, options.rows // 30)):
                for name in CONTENDERS:
                    place = scratch / f"{run}-{pace}-{name}"
                    place.mkdir()
                    command = [sys.executable, __file__, "--one", name, str(rows), str(pace), str(place)]
                    env = {**os.environ, "PYTHONPATH": str(ROOT)}
                    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=300)
                    results.setdefault((pace, name), []).append(json.loads(done.stdout))
                    shutil.rmtree(place)
    finally:
        if disturbance is not None:
            disturbance.kill()
            disturbance.wait()
        shutil.rmtree(scratch, ignore_errors=True)
    fields = ["p50", "p99", "p99.9", "max", "cpu", "bytes", "finish_ms"]
    disk = ", busy disk" if options.busy else ""
    print(f"us a row, 10 scalars, {options.runs} runs{disk}; cpu at the 1 ms pace includes the sleeps")
    print("| pace | contender | " + " | ".join(fields) + " |\n|" + "---|" * (len(fields) + 2))
    for (pace, name), runs in results.items():
        columns = {field: [run[field] for run in runs] for field in fields}
        shown = {field: (max if field == "max" else statistics.median)(values) for field, values in columns.items()}
        print(f"| {'1 ms' if pace else 'full'} | {name} | " + " | ".join(f"{shown[field]:.4g}" for field in fields) + " |")
    print("goals:", ", ".join(f"{name} <= {goal:g}" for name, goal in GOALS.items()))


if __name__ == "__main__":
    main()
