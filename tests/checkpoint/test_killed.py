"""SIGKILL at every system call of a save, and one rank of two killed: the newest whole checkpoint always loads."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from support import dying
from support.ports import free_port
from support.ranks import alone

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.manifest import committed, verify


def test_killed_at_every_system_call(tmp_path: Path) -> None:
    """Step 3 exists exactly from its rename on; before it, step 2; and whatever exists verifies and loads."""
    calls = dying.save_three(tmp_path / "whole", 0, after=False)
    assert calls > 20
    steps = []
    for at in range(1, calls + 1):
        directory = tmp_path / str(at)
        process = dying.context().Process(target=dying.save_three, args=(directory, at, at % 2 == 0))
        process.start()
        assert dying.ended(process) == -signal.SIGKILL, at
        for manifest in committed(directory):
            verify(manifest)
        model = torch.nn.Linear(2, 2)
        with Checkpointer(directory, alone(), attempt=2) as checkpoints:
            checkpoints.track(model=model)
            restored = checkpoints.restore(timeout=20)
        assert restored is not None
        # torch gives a forked process one thread, which is a fact of its environment; nothing else is to be said.
        assert all("threads" in note for note in restored.notes)
        assert model.weight.tolist() == [[restored.step] * 2] * 2
        assert not list(directory.glob("*.tmp"))
        steps.append(restored.step)
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


@pytest.mark.slow
def test_killed_in_training(tmp_path: Path) -> None:
    """A training killed again and again while saving every step in the background ends bit by bit as one never killed."""
    context = dying.context()
    results = context.Queue()
    whole = context.Process(target=dying.one_life, args=(tmp_path / "never", 1, 0, 9, results))
    whole.start()
    expected = results.get(timeout=dying.LIFE)
    assert dying.ended(whole) == 0
    deaths, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        process = context.Process(target=dying.one_life, args=(tmp_path / "cut", deaths + 1, 40 + 7 * deaths, 9, results))
        process.start()
        code = dying.ended(process)
        deaths += code == -signal.SIGKILL
    assert code == 0
    assert deaths > 2
    assert results.get(timeout=60) == expected
    assert committed(tmp_path / "cut")[0].step == 9


def test_one_of_two_ranks_is_killed_in_a_save(tmp_path: Path) -> None:
    """Over the real store: the survivor is told which rank is missing, nothing is committed, the next attempt goes on."""

    def attempt(number: int) -> list[int]:
        port = free_port()
        ranks = [dying.context().Process(target=dying.one_rank, args=(tmp_path, rank, number, port)) for rank in range(2)]
        for process in ranks:
            process.start()
        return [dying.ended(process) for process in ranks]

    assert attempt(1) == [0, -signal.SIGKILL]
    assert [manifest.name for manifest in committed(tmp_path)] == ["step-3.a1"]
    assert attempt(2) == [0, 0]
    assert [manifest.name for manifest in committed(tmp_path)] == ["step-6.a2", "step-3.a1"]
    assert committed(tmp_path)[0].world_size == 2
