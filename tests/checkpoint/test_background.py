"""Saves in the background: one at a time, in one region of memory, and all there when the block is left."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.ranks import ThreadCoordinator, alone, run_ranks
from support.training import position

from wbdist.checkpoint import checkpointer, staging
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.files import FileLayer, Ready
from wbdist.checkpoint.image import Box, lay_out
from wbdist.checkpoint.manifest import FileEntry, committed, verify

STEPS = 6


class Slow(FileLayer):
    """Notes how many saves of its rank are at the disk at once, which takes longer than a step."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active, self.most = 0, 0

    def store_all(self, files: Mapping[Path, memoryview], ready: Ready = lambda path, size: None) -> dict[Path, FileEntry]:
        with self.lock:
            self.active += 1
            self.most = max(self.most, self.active)
        time.sleep(0.02)
        found = super().store_all(files, ready)
        with self.lock:
            self.active -= 1
        return found


def test_one_at_a_time_in_one_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that save faster than the disk writes: no two saves overlap, none is skipped or mixed with the next, memory is
    taken once a rank; a state of another size gets another region when the old one is gone; the exit waits for the last."""
    regions: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    pages, lock = staging._pages, threading.Lock()

    def counted(size: int) -> torch.Tensor:
        made = pages(size)
        with lock:
            alive.append(sum(region() is not None for region in regions))
            regions.append(weakref.ref(made))
        return made

    monkeypatch.setattr(staging, "_pages", counted)

    def rank(coordinator: ThreadCoordinator) -> int:
        layer, model = Slow(), torch.nn.ParameterDict({"w": torch.zeros(1 << 10)})
        with Checkpointer(tmp_path, coordinator, attempt=1, keep_last=99, layer=layer) as checkpoints:
            checkpoints.track(model=model)
            for step in range(1, STEPS + 1):
                torch.nn.init.constant_(model["w"], step)
                pending = checkpoints.save(step, position(step), timeout=20)
                torch.nn.init.constant_(model["w"], -1)
        assert pending.durable_at is not None
        return layer.most

    assert run_ranks(2, rank) == [1, 1]
    assert [manifest.step for manifest in committed(tmp_path)] == list(range(STEPS, 0, -1))
    for manifest in committed(tmp_path):
        verify(manifest)
    assert len(regions) == 2  # one a rank
    alive.clear()
    regions.clear()
    arena = staging.Arena()
    for size in (1 << 10, 1 << 16, 1 << 10):
        layout = lay_out([Box("w", torch.zeros(size), (0,))])
        arena.stage([layout]).copy()
    assert alive == [0, 0, 0]


class Held(FileLayer):
    """A disk that takes nothing before it is let."""

    def __init__(self) -> None:
        self.let = threading.Event()

    def store_all(self, files: Mapping[Path, memoryview], ready: Ready = lambda path, size: None) -> dict[Path, FileEntry]:
        assert self.let.wait(60)
        return super().store_all(files, ready)


def test_leaving_the_program_well_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.exit()` within the block waits for the save as the block's end does; after a failure the wait is short."""
    monkeypatch.setattr(checkpointer, "ABANDON_AFTER", 0.0)
    for code, steps in ((None, [1]), (0, [1]), (1, [])):
        directory, layer = tmp_path / str(code), Held()
        with pytest.raises(SystemExit), Checkpointer(directory, alone(), attempt=1, layer=layer) as checkpoints:
            checkpoints.track(model=torch.nn.Linear(2, 2))
            pending = checkpoints.save(1, position(1), timeout=60)
            if not code:
                threading.Timer(0.05, layer.let.set).start()
            sys.exit(code)
        assert [manifest.step for manifest in committed(directory)] == steps
        layer.let.set()
        pending.wait(60)
