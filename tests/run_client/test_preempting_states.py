"""What becomes of a run when its process ends: marked preempting or not, by every ending, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wbdist

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import multiprocessing, os, signal, sys, time, wbdist

name, marked, how = sys.argv[1:]


def handler(number, frame):
    wbdist.mark_preempting()
    sys.exit(128 + number)


def work():
    run = wbdist.init(project="p", id=name, settings={"silent": True})
    if marked == "start":
        run.mark_preempting()
    if marked == "handler":
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)
    if marked == "exits":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run.log({"a": 1})
    if how == "_exit":
        os._exit(0)
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)
    if how == "raise":
        raise ValueError("as planned")
    sys.exit(int(how))


if __name__ == "__main__":
    if name.startswith("child"):
        child = multiprocessing.get_context("fork" if "fork" in name else "spawn").Process(target=work)
        child.start()
        child.join()
        os._exit(0)  # the parent's end must not matter
    work()
"""
TABLE = {
    ("no", "0"): "finished",
    ("no", "3"): "failed",
    ("no", "raise"): "failed",
    ("no", "SIGKILL"): "crashed",
    ("no", "SIGTERM"): "crashed",
    ("no", "SIGINT"): "killed",
    ("no", "_exit"): "crashed",
    ("exits", "SIGTERM"): "failed",
    ("start", "0"): "finished",
    ("start", "3"): "preempted",
    ("start", "raise"): "preempted",
    ("start", "SIGKILL"): "preempted",
    ("start", "SIGTERM"): "preempted",
    ("start", "SIGINT"): "preempted",
    ("handler", "0"): "finished",
    ("handler", "3"): "failed",
    ("handler", "SIGKILL"): "crashed",
    ("handler", "SIGTERM"): "preempted",
    ("handler", "SIGINT"): "preempted",
}


def run_all(names: dict[str, tuple[str, str]], directory: Path) -> None:
    path = directory / "program.py"
    path.write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, str(path), name, *case], cwd=directory, env=env, stderr=subprocess.DEVNULL)
        for name, case in names.items()
    ]
    try:
        for process in processes:
            process.wait(90)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def states_become(expected: dict[str, str]) -> None:
    """Polls: the shipper tells of a lost process when it has seen it."""
    deadline = time.monotonic() + 60
    while True:
        states = {run.id: run.state for run in wbdist.Api().runs("p")}
        if states == expected:
            return
        assert time.monotonic() < deadline, {k: (states.get(k), v) for k, v in expected.items() if states.get(k) != v}
        time.sleep(0.1)


@pytest.mark.usefixtures("embedded")
def test_every_ending(tmp_path: Path) -> None:
    """Proves W&B's table of marked and unmarked runs, for exits, exceptions and signals; rows are there however it ended."""
    names = {f"{marked}-{how}": (marked, how) for marked, how in TABLE}
    run_all(names, tmp_path)
    states_become({name: TABLE[case] for name, case in names.items()})
    for run in wbdist.Api().runs("p"):
        assert [row["a"] for row in run.scan_history()] == [1]
    assert [
        attempt.exit_code for name in ("no-SIGINT", "exits-SIGTERM") for attempt in wbdist.Api().run(f"p/{name}").attempts()
    ] == [
        255,
        143,
    ]


@pytest.mark.usefixtures("embedded")
def test_children_of_multiprocessing(tmp_path: Path) -> None:
    """Proves that a run of a multiprocessing child ends with the child's own code, forked or spawned."""
    cases = {"0": "finished", "3": "failed", "raise": "failed", "SIGKILL": "crashed"}
    names = {f"child-{method}-{how}": ("no", how) for method in ("fork", "spawn") for how in cases}
    run_all(names, tmp_path)
    states_become({name: cases[case[1]] for name, case in names.items()})
