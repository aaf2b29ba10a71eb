"""Ranks on another host may see another directory under the same path; here each rank is given a directory of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import ThreadCoordinator, run_ranks
from support.training import position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.manifest import committed
from wbdist.checkpoint.views import _view
from wbdist.errors import CheckpointError

RANKS = 3
"""The first and the last are of one host."""


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.fixture
def hosts(tmp_path: Path) -> list[Path]:
    """Checkpoints of steps 1 and 2 by three ranks, and what the second one's host has of them: a copy."""

    def save(coordinator: ThreadCoordinator) -> None:
        counter = Counter()
        with Checkpointer(tmp_path / "a", coordinator, attempt=1) as checkpoints:
            checkpoints.track(counter=counter)
            for counter.value in (1, 2):
                checkpoints.save(counter.value, position(counter.value), block=True, timeout=20)

    assert run_ranks(RANKS, save) == [None] * RANKS
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return [tmp_path / "a", tmp_path / "b", tmp_path / "a"]


def restored(hosts: list[Path]) -> list[Any]:
    """By rank: value and notes, or the error."""

    def restore(coordinator: ThreadCoordinator) -> tuple[int, tuple[str, ...]]:
        counter = Counter()
        with Checkpointer(hosts[coordinator.rank], coordinator, attempt=2) as checkpoints:
            checkpoints.track(counter=counter)
            found = checkpoints.restore(timeout=20)
            assert found is not None
            assert found.step == counter.value
            assert found.manifest.directory == str(hosts[coordinator.rank] / found.manifest.name)
            return counter.value, found.notes

    return run_ranks(RANKS, restore)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_what_a_host_reads_is_verified_there(hosts: list[Path]) -> None:
    """Damage that only another host sees is found, in any file that its ranks read and in no other; all ranks go back to
    the checkpoint that is whole for all, and the newer one stays where it is."""
    assert restored(hosts) == [(2, ())] * RANKS
    flip(hosts[1] / "step-2.a1" / "rank-2" / "state.json")
    assert restored(hosts) == [(2, ())] * RANKS
    for name in ("rank-1/state.json", "shared/state.json"):
        shutil.copytree(hosts[1] / "step-2.a1", hosts[1] / "kept")
        flip(hosts[1] / "step-2.a1" / name)
        found = restored(hosts)
        assert [value for value, _ in found] == [1] * RANKS
        first, last = found[1][1]
        assert first.startswith("step-2.a1 is not whole for all ranks: rank 1 on ")
        assert f"{name} has another content" in first
        assert last == "continuing from step-1.a1, the newest checkpoint that verifies"
        assert [manifest.step for manifest in committed(hosts[0])] == [2, 1]
        shutil.rmtree(hosts[1] / "step-2.a1")
        (hosts[1] / "kept").rename(hosts[1] / "step-2.a1")


@pytest.mark.parametrize("lose", [shutil.rmtree, lambda host: [flip(p) for p in host.rglob("shared/*")]])
def test_a_host_that_sees_none_is_an_error(hosts: list[Path], lose: Callable[[Path], object]) -> None:
    """Never a start from nothing: the job's checkpoints are there, on a host."""
    lose(hosts[1])
    for error in restored(hosts):
        assert isinstance(error, CheckpointError)
        assert "must be one directory for all ranks, across hosts too" in str(error)
        assert "rank 1 on " in str(error)
    assert [manifest.step for manifest in committed(hosts[0])] == [2, 1]


def test_a_save_that_rank_zero_does_not_see_is_no_checkpoint(tmp_path: Path) -> None:
    """With a disk for each host nobody could restore what was saved: the first save says so."""

    def save(coordinator: ThreadCoordinator) -> None:
        with Checkpointer(tmp_path / str(coordinator.rank), coordinator, attempt=1) as checkpoints:
            checkpoints.track(counter=Counter())
            checkpoints.save(1, position(1), block=True, timeout=20)

    for error in run_ranks(2, save):
        assert isinstance(error, CheckpointError)
        assert ", which rank 1 wrote, is not there for rank 0" in str(error)
        assert "must be one directory for all ranks" in str(error)
    assert committed(tmp_path / "0") == committed(tmp_path / "1") == []


def test_processes_of_one_kernel_see_the_same(tmp_path: Path) -> None:
    """Another name of the same directory is the same; what is not there is nobody's."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert _view(tmp_path / "a") == _view(tmp_path / "link") != _view(tmp_path)
    assert _view(tmp_path / "b").endswith("alone")
