"""Several ranks: one fails, one is missing, the world changes."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import ThreadCoordinator, alone, run_ranks
from support.training import position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import committed
from wbdist.core.position import RunPosition
from wbdist.errors import CheckpointError, DeadlineError, PeerLostError, StateMissingError, UsageError


class Counter:
    """A Stateful with one number."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Broken(FileLayer):
    """A disk that takes nothing on one rank."""

    def create(self, path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))


def test_own_and_shared_state_come_back_to_each_rank(tmp_path: Path) -> None:
    """Shared state is saved once; each rank gets back its own objects, its own run position."""

    def first(coordinator: ThreadCoordinator) -> None:
        with Checkpointer(tmp_path, coordinator, attempt=1) as checkpoints:
            checkpoints.track(shared=Counter(7))
            checkpoints.track(per_rank=True, own=Counter(coordinator.rank))
            checkpoints.save(1, lambda: position(1, run_id=f"r{coordinator.rank}"), block=True, timeout=10)

    def second(coordinator: ThreadCoordinator) -> tuple[int, int, RunPosition | None]:
        shared, own = Counter(), Counter(-1)
        with Checkpointer(tmp_path, coordinator, attempt=2) as checkpoints:
            checkpoints.track(shared=shared)
            checkpoints.track(per_rank=True, own=own)
            restored = checkpoints.restore(timeout=10)
            assert restored is not None
            assert restored.run == position(1, run_id="r0")
            assert restored.notes == ()
            return shared.value, own.value, restored.own

    assert run_ranks(3, first) == [None] * 3
    assert run_ranks(3, second) == [(7, rank, position(1, run_id=f"r{rank}")) for rank in range(3)]


def test_one_rank_that_cannot_write_fails_all(tmp_path: Path) -> None:
    """Every rank raises within seconds, naming the rank and its reason; nothing is left; the next save works."""

    def act(coordinator: ThreadCoordinator) -> str:
        layer = Broken() if coordinator.rank == 1 else FileLayer()
        checkpoints = Checkpointer(tmp_path, coordinator, attempt=1, layer=layer)
        checkpoints.track(a=Counter(1))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(1, position(1), block=True, timeout=10)
        coordinator.barrier("looked", 10)
        checkpoints._layer = FileLayer()
        checkpoints.save(2, position(2), block=True, timeout=10)
        checkpoints.close()
        return str(caught.value)

    texts = run_ranks(3, act, timeout=15)
    assert len(set(texts)) == 1
    assert "step 1 was not committed: rank 1 (pid" in texts[0]
    assert "Permission denied" in texts[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2.a1"]


def test_a_run_position_that_fails_fails_all(tmp_path: Path) -> None:
    """The history that cannot be drained on one rank is no less a reason than a disk."""

    def act(coordinator: ThreadCoordinator) -> None:
        def drain() -> RunPosition:
            if coordinator.rank == 1:
                raise DeadlineError("the aggregator did not answer")
            return position(1)

        with (
            pytest.raises(DeadlineError, match=r"rank 1 .*aggregator"),
            Checkpointer(tmp_path, coordinator, attempt=1) as checkpoints,
        ):
            checkpoints.save(1, drain, block=True, timeout=10)

    assert run_ranks(2, act) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_stored_fails_all(tmp_path: Path) -> None:
    """The rank with the bad state raises at once, by the name of the place; its peers learn of it."""

    class Odd(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"value": [1, threading.Lock()]}

    def act(coordinator: ThreadCoordinator) -> None:
        checkpoints = Checkpointer(tmp_path, coordinator, attempt=1)
        checkpoints.track(per_rank=True, own=Odd() if coordinator.rank == 1 else Counter())
        with pytest.raises(UsageError, match=r"'own\.value\.1' holds a _thread\.lock"):
            checkpoints.save(1, position(1), block=True, timeout=10)
        checkpoints.close()

    assert run_ranks(2, act) == [None, None]


def test_a_rank_that_does_not_save_is_named(tmp_path: Path) -> None:
    """Saving on some ranks only ends at the deadline with the missing ranks' names, not in a hang."""

    def act(coordinator: ThreadCoordinator) -> None:
        if coordinator.rank == 2:
            return
        checkpoints = Checkpointer(tmp_path, coordinator, attempt=1)
        checkpoints.track(a=Counter())
        with pytest.raises(PeerLostError, match=r"ranks \[2\]"):
            checkpoints.save(1, position(1), block=True, timeout=0.5)

    assert run_ranks(3, act, timeout=10) == [None] * 3
    assert committed(tmp_path) == []


def test_ranks_out_of_step_are_told(tmp_path: Path) -> None:
    """Ranks that save different steps get one clear error each."""

    def act(coordinator: ThreadCoordinator) -> None:
        checkpoints = Checkpointer(tmp_path, coordinator, attempt=1)
        with pytest.raises(CheckpointError, match="rank 0 step 5, rank 1 step 6"):
            checkpoints.save(5 + coordinator.rank, position(5), block=True, timeout=10)

    assert run_ranks(2, act) == [None, None]


def test_a_damaged_part_of_another_rank_is_agreed_upon(tmp_path: Path) -> None:
    """Rank 0 verifies every rank's files; all ranks fall back to the same older checkpoint."""

    def first(coordinator: ThreadCoordinator) -> None:
        counter = Counter()
        with Checkpointer(tmp_path, coordinator, attempt=1) as checkpoints:
            checkpoints.track(a=counter)
            for counter.value in (1, 2):
                checkpoints.save(counter.value, position(counter.value), block=True, timeout=10)

    def second(coordinator: ThreadCoordinator) -> tuple[int, int]:
        counter = Counter()
        checkpoints = Checkpointer(tmp_path, coordinator, attempt=2)
        checkpoints.track(a=counter)
        restored = checkpoints.restore(timeout=10)
        assert restored is not None
        assert "rank-1/state.json has another content" in restored.notes[0]
        return restored.step, counter.value

    assert run_ranks(2, first) == [None, None]
    state = tmp_path / "step-2.a1" / "rank-1" / "state.json"
    state.write_bytes(state.read_bytes().replace(b"rng", b"rgn"))
    assert run_ranks(2, second) == [(1, 1), (1, 1)]


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 3), (1, 2)])
def test_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    """Shared state loads whatever the world's size; a new rank's generators are the same each time, unlike any other's."""
    numbers: list[float] = []

    def first(coordinator: ThreadCoordinator) -> None:
        with Checkpointer(tmp_path, coordinator, attempt=1) as checkpoints:
            checkpoints.track(a=Counter(9))
            checkpoints.save(1, position(1), block=True, timeout=10)

    def second(coordinator: ThreadCoordinator) -> tuple[str, ...]:
        counter = Counter()
        with Checkpointer(tmp_path, coordinator, attempt=2, seed=3) as checkpoints:
            checkpoints.track(a=counter)
            restored = checkpoints.restore(timeout=10)
        assert restored is not None
        assert counter.value == 9
        assert (restored.own is None) == (coordinator.rank >= before)
        return restored.notes

    run_ranks(before, first)
    notes = run_ranks(after, second)
    assert all(f"made by {before} ranks; this job has {after}" in said[0] for said in notes)
    new = [rank for rank in range(after) if any(f"rank {rank} is new" in note for note in notes[rank])]
    assert new == list(range(before, after))
    from wbdist.checkpoint import rng

    for rank in (0, 1, 2, 0):
        rng.derive(3, 1, rank)
        numbers.append(random.random() + float(torch.rand(())))
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 3


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    """Missing and unexpected names are both listed, and nothing is loaded."""
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.track(model=torch.nn.Linear(2, 2), ema=Counter(4))
        checkpoints.save(1, position(1), timeout=10)
    average = Counter(1)
    checkpoints = Checkpointer(tmp_path, alone(), attempt=2)
    checkpoints.track(model=torch.nn.Linear(2, 2), average=average)
    with pytest.raises(StateMissingError, match=r"missing in the checkpoint \['average'\].*not tracked \['ema'\]"):
        checkpoints.restore(timeout=10)
    assert average.value == 1


def test_states_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    """Another shape of the model is an error that names the object, on every rank."""
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.track(model=torch.nn.Linear(2, 2))
        checkpoints.save(1, position(1), timeout=10)

    def act(coordinator: ThreadCoordinator) -> None:
        checkpoints = Checkpointer(tmp_path, coordinator, attempt=2)
        checkpoints.track(model=torch.nn.Linear(2, 3))
        with pytest.raises(
            StateMissingError, match=r"(?s)'model' in step-1\.a1/shared does not fit this job's Linear.*size mismatch"
        ):
            checkpoints.restore(timeout=10)

    assert run_ranks(2, act) == [None, None]


def test_bad_objects_are_refused() -> None:
    """Names and objects that cannot be tracked are refused with the reason."""
    checkpoints = Checkpointer("unused", alone(), attempt=1)
    model = torch.nn.Linear(1, 1)
    checkpoints.track(model=model)
    for bad, reason in (
        ({"model": Counter()}, "tracked already"),
        ({"again": model}, "same object"),
        ({"rng": Counter()}, "is taken"),
        ({"number": 3}, "needs state_dict"),
    ):
        with pytest.raises(UsageError, match=reason):
            checkpoints.track(**bad)
    for arguments in ({"attempt": 0}, {"attempt": 1, "keep_last": 0}):
        with pytest.raises(UsageError):
            Checkpointer("unused", alone(), **arguments)


def test_wrapped_modules_are_saved_without_their_wrapping(tmp_path: Path) -> None:
    """A DDP or compiled module is saved under the plain module's names, and restores into either."""
    plain = torch.nn.Linear(2, 2)
    wrapped = torch.nn.DataParallel(torch.compile(plain))
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.track(model=wrapped)
        checkpoints.save(1, position(1), timeout=10)
    other = torch.nn.Linear(2, 2)
    checkpoints = Checkpointer(tmp_path, alone(), attempt=2)
    checkpoints.track(model=other)
    checkpoints.restore(timeout=10)
    assert torch.equal(other.weight, plain.weight)
