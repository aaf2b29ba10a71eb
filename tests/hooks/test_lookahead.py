"""Batches held ahead: a wait for data can be ended, and nothing is lost, doubled or raised too early by it."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from wbdist.hooks.loader import ResumableLoader
from wbdist.hooks.lookahead import Arrival, LookAhead

LENGTH = 26
BATCH = 4
PER_EPOCH = LENGTH // BATCH


class Gated(Dataset[torch.Tensor]):
    """The sample in place `blocked` of the first epoch is not there until the gate opens; `broken` raises."""

    def __init__(self, blocked: int = -1, broken: int = -1) -> None:
        self.blocked, self.broken = blocked, broken
        self.gate = multiprocessing.Event()

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.blocked:
            assert self.gate.wait(60)
        if index == self.broken:
            raise ValueError("a broken sample")
        return torch.tensor(index + 1000 * int(torch.randint(100, ())))


def loader(data: Gated, **options: Any) -> ResumableLoader:
    return ResumableLoader(data, BATCH, seed=5, shuffle=False, seed_samples=True, **options)


def test_two_are_held_and_a_wait_is_ended_when_told() -> None:
    """Proves what `wait` waits for: the next batch and the one behind it; that it asks while nothing comes; that what comes
    late comes in order; and that what is not held ahead is not waited for."""
    handed: list[int] = []
    came = iter([1, None, None, 2, 3, None])

    def arriving() -> Iterator[Arrival | None]:
        for number in came:
            yield None if number is None else ((lambda number=number: handed.append(number)), number)

    asked: list[bool] = []

    def told() -> bool:
        asked.append(len(asked) >= 2)
        return asked[-1]

    ends: list[int] = []
    batches = LookAhead(arriving(), lambda: ends.append(1), 1)
    batches.wait(told)
    assert (len(asked), handed) == (3, [])
    assert next(batches) == 1
    batches.wait(lambda: False)
    assert next(came, "over") is None
    assert [*batches] == [2, 3]
    assert (handed, ends) == ([1, 2, 3], [1])
    LookAhead(iter(()), lambda: None, 0).wait(lambda: pytest.fail("asked"))


@pytest.mark.parametrize(
    ("ahead_by", "options"),
    [(1, {"num_workers": 2}), (3, {"num_workers": 1, "persistent_workers": True}), (1, {"num_workers": 0})],
)
def test_epochs_give_what_single_epochs_give(ahead_by: int, options: dict[str, Any]) -> None:
    """Proves that three epochs with batches held ahead are the batches, fingerprints and positions of three plain ones, that
    the position counts what was handed out alone, and that one can go on from any of the places around an epoch's end."""
    plain = loader(Gated(), num_workers=0)
    expected = [(data.tolist(), plain.fingerprint(), plain.epoch, plain.state_dict()) for _ in range(3) for data in plain]
    ahead = loader(Gated(), **options)
    batches, seen = ahead.epochs(3, ahead=ahead_by), []
    batches.wait(lambda: False)
    for data in batches:
        seen.append((data.tolist(), ahead.fingerprint(), ahead.epoch, ahead.state_dict()))
        batches.wait(lambda: False)
    assert seen == expected
    assert (ahead.epoch, ahead.consumed, ahead.state_dict()) == (3, 0, plain.state_dict())
    for place in (PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1):
        again = loader(Gated(), **options)
        again.load_state_dict(expected[place - 1][3])
        rest = again.epochs(2, ahead=ahead_by)
        rest.wait(lambda: False)
        assert [data.tolist() for data in rest] == [entry[0] for entry in expected[place : 2 * PER_EPOCH]]


@pytest.mark.parametrize("pinned", [False, True])
def test_a_worker_that_waits_is_waited_for_and_can_be_left(pinned: bool) -> None:
    """Proves on real workers that a batch which does not come ends neither the wait (until told) nor the loader: the batch in
    hand is handed out, and when the data is there at last, every batch follows once."""
    data = Gated(blocked=2 * BATCH)
    ahead = loader(data, num_workers=2, pin_memory=pinned)
    batches = ahead.epochs(1)
    batches.wait(lambda: False)
    first = next(batches)
    looks = iter(range(3))
    batches.wait(lambda: next(looks, None) is None)
    assert next(looks, None) is None
    assert (first % 1000).tolist() == [0, 1, 2, 3]
    assert (next(batches) % 1000).tolist() == [4, 5, 6, 7]
    assert ahead.consumed == 2 * BATCH
    data.gate.set()
    rest = [index for batch in batches for index in (batch % 1000).tolist()]
    assert rest == list(range(2 * BATCH, PER_EPOCH * BATCH))


def test_a_broken_sample_is_raised_in_its_turn() -> None:
    """Proves that the error of a batch held ahead comes when that batch is asked for, not a step earlier."""
    ahead = loader(Gated(broken=BATCH), num_workers=1)
    batches = ahead.epochs(1)
    batches.wait(lambda: False)
    next(batches)
    batches.wait(lambda: False)
    with pytest.raises(ValueError, match="a broken sample"):
        next(batches)
    assert ahead.consumed == BATCH


LEAVES = """
import torch
from torch.utils.data import TensorDataset
from wbdist.hooks.loader import ResumableLoader
data = ResumableLoader(TensorDataset(torch.arange(40)), 4, num_workers=1, persistent_workers=True)
batches = data.epochs(1)
next(iter(data)), next(batches)
"""


def test_workers_do_not_keep_a_process_from_its_end() -> None:
    """Proves that a script ends while its loaders have living workers, which ignore the SIGTERM of multiprocessing."""
    assert subprocess.run([sys.executable, "-c", LEAVES], timeout=100, check=False).returncode == 0
