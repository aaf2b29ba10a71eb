"""A training of one rank, and a DDP training of two, that is killed after any step ends bit by bit as one that never was."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support import dying
from support.ports import free_port

STEPS = 50


def live(directory: Path, ranks: int, attempt: int, kill_after: int) -> dict[int, tuple[int, dict[str, Any]]]:
    """One life: by rank, the step it began with and its final state; nothing when it was killed."""
    context, port = dying.context(), free_port()
    results: Any = context.Queue()
    life = (ranks, attempt, kill_after, STEPS)
    processes = [context.Process(target=dying.one_of_ddp, args=(directory, rank, life, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    if kill_after:
        assert all(dying.ended(process) < 0 for process in processes)
        return {}
    found = {rank: (began, state) for rank, began, state in (results.get(timeout=100) for _ in processes)}
    assert {dying.ended(process) for process in processes} == {0}
    return found


@cache
def uninterrupted(ranks: int) -> dict[int, tuple[int, dict[str, Any]]]:
    with TemporaryDirectory() as directory:
        return live(Path(directory), ranks, 1, 0)


def check(directory: Path, ranks: int, kill_after: int) -> None:
    assert live(directory, ranks, 1, kill_after) == {}
    for rank, (began, state) in live(directory, ranks, 2, 0).items():
        whole = uninterrupted(ranks)[rank][1]
        # A save under way dies with its ranks: then it is the step before.
        assert kill_after - 2 <= began <= kill_after
        assert state == {**whole, "losses": whole["losses"][began:]}, f"rank {rank}, killed after step {kill_after}"


def test_killed_once(tmp_path: Path) -> None:
    """Within the second epoch; buffers, dropout, noise from every generator, schedule and data order included."""
    check(tmp_path, 2, 9)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_after_each_step(tmp_path: Path, step: int, ranks: int) -> None:
    """Each of fifty steps, by SIGKILL."""
    check(tmp_path, ranks, step)
