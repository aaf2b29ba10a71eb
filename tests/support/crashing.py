"""Run with native/crash.c preloaded: forks a child for each disk call of a save, which dies there, and looks at what it left.

    LD_PRELOAD=crash.so python -m support.crashing DIRECTORY save|claim before|after|torn

Prints one line of JSON: the calls that there were, and for each the step that a job would go on from.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import torch
from support.ranks import alone
from support.training import position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.claim import Claim, attempts
from wbdist.checkpoint.manifest import committed, verify

LIFE = 60
"""Seconds after which a child is killed by the kernel: by another signal than the one that it is to die of."""
WIDTH = 600
"""Of the layer: its weights are more than a mebibyte, which go past the page cache."""
MODES = ("before", "after", "torn")


def library() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    found.crash_arm.argtypes = [ctypes.c_long, ctypes.c_int]
    found.crash_disarm.restype = ctypes.c_long
    found.crash_name.restype = ctypes.c_char_p
    return found


def save(directory: Path, arm: Callable[[], None]) -> None:
    """Commits steps 1 and 2, then saves step 3, which also removes step 1."""
    model = torch.nn.Linear(WIDTH, WIDTH)
    checkpoints = Checkpointer(directory, alone(), attempt=1)
    checkpoints.track(model=model)
    for step in (1, 2, 3):
        torch.nn.init.constant_(model.weight, step)
        if step == 3:
            arm()
        checkpoints.save(step, position(step), block=True, timeout=30)
    checkpoints.close()


def saved(directory: Path) -> int:
    """The step that the next attempt goes on from, everything looked at."""
    for manifest in committed(directory):
        verify(manifest)
    model = torch.nn.Linear(WIDTH, WIDTH)
    with Checkpointer(directory, alone(), attempt=2) as checkpoints:
        checkpoints.track(model=model)
        restored = checkpoints.restore(timeout=30)
    assert restored is not None
    assert restored.notes == ()
    assert bool((model.weight == restored.step).all())
    assert not list(directory.glob("*.tmp"))
    return restored.step


def claim(directory: Path, arm: Callable[[], None]) -> None:
    """Begins the second attempt on a directory, or the first."""
    if directory.name.endswith("again"):
        Claim.take(directory, run_id=None, project="p", entity="e", name=None).release()
    arm()
    Claim.take(directory, run_id=None, project="p", entity="e", name=None)


def claimed(directory: Path) -> int:
    """The next attempt has a number of its own, and the directory one run; how many attempts there were before."""
    before = len(attempts(directory))
    held = Claim.take(directory, run_id=None, project="p", entity="e", name=None, timeout=30)
    held.release()
    assert [attempt.number for attempt in attempts(directory)] == list(range(1, before + 2))
    assert held.attempt.number == before + 1
    return before


def died(act: Callable[[Path, Callable[[], None]], None], directory: Path, at: int, mode: int) -> bool:
    """Whether a forked child that does `act` was killed at the disk call `at` after it armed; else there are fewer."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(LIFE)
            act(directory, lambda: library().crash_arm(at, mode))
            library().crash_disarm()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in {0, -signal.SIGKILL}, f"the child ended with {code} at call {at}"
    return code != 0


def calls(act: Callable[[Path, Callable[[], None]], None], directory: Path) -> list[str]:
    """The names of the disk calls of `act`, in a process of their own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            lib = library()
            act(directory, lambda: lib.crash_arm(-1, 0))
            count = lib.crash_disarm()
            os.write(writer, json.dumps([lib.crash_name(n + 1).decode() for n in range(count)]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    return list(json.loads(said))


def main(root: Path, what: str, mode: str) -> None:
    torch.set_num_threads(1)
    root.mkdir(exist_ok=True)
    act, look, end = (save, saved, "") if what == "save" else (claim, claimed, "" if what == "claim" else "again")
    names = calls(act, root / f"whole{end}")
    found: list[tuple[str, int]] = []
    for number, name in enumerate(names, 1):
        if mode == "torn" and "write" not in name:
            continue
        directory = root / f"{number}{end}"
        started = time.monotonic()
        assert died(act, directory, number, MODES.index(mode)), f"call {number} ({name}) did not come"
        found.append((name, look(directory)))
        assert time.monotonic() - started < LIFE
        rmtree(directory)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
