"""A DDP training of two ranks that is killed after any step ends bit by bit as one that never was."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support import dying

STEPS = 50


def live(directory: Path, attempt: int, kill_after: int) -> dict[int, tuple[int, dict[str, Any]]]:
    """One life: by rank, the step it began with and its final state; nothing when it was killed."""
    context, port = dying.context(), dying.free_port()
    results: Any = context.Queue()
    life = (attempt, kill_after, STEPS)
    processes = [context.Process(target=dying.one_of_two, args=(directory, rank, life, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    if kill_after:
        assert all(dying.ended(process) < 0 for process in processes)
        return {}
    found = {rank: (began, state) for rank, began, state in (results.get(timeout=100) for _ in processes)}
    assert [dying.ended(process) for process in processes] == [0, 0]
    return found


@cache
def uninterrupted() -> dict[int, tuple[int, dict[str, Any]]]:
    with TemporaryDirectory() as directory:
        return live(Path(directory), 1, 0)


def check(directory: Path, kill_after: int) -> None:
    assert live(directory, 1, kill_after) == {}
    for rank, (began, state) in live(directory, 2, 0).items():
        whole = uninterrupted()[rank][1]
        # A save under way dies with its ranks: then it is the step before.
        assert kill_after - 2 <= began <= kill_after
        assert state == {**whole, "losses": whole["losses"][began:]}, f"rank {rank}, killed after step {kill_after}"


def test_killed_once(tmp_path: Path) -> None:
    """Within the second epoch; buffers, dropout, noise from every generator, schedule and data order included."""
    check(tmp_path, 9)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_after_each_step(tmp_path: Path, step: int) -> None:
    """Each of fifty steps."""
    check(tmp_path, step)
