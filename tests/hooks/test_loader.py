"""The loader: what was handed out counts, workers or not, and goes on from there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from wbdist.errors import UsageError
from wbdist.hooks.loader import ResumableLoader
from wbdist.hooks.sampler import FINGERPRINT_MODULUS, epoch_order, fingerprint

LENGTH = 50


class Noisy(Dataset[Any]):
    """Index, and a number that depends on every global generator: random augmentation."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, random.random() + float(np.random.random()) + float(torch.rand(()))


class Batched(Noisy):
    """A dataset that fetches a whole batch in one call."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, float]]:
        return [(index, float(torch.rand(()))) for index in indices]


Seen = list[tuple[list[int], list[float], int]]


def consume(loader: ResumableLoader, batches: int) -> Seen:
    """The next `batches` batches, over the ends of epochs."""
    seen: Seen = []
    while len(seen) < batches:
        for ids, noise in loader:
            assert ids.tolist() == loader.last_ids.tolist()
            seen.append((ids.tolist(), noise.tolist(), loader.fingerprint()))
            if len(seen) == batches:
                break
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy, Batched])
def test_resuming_anywhere_gives_the_same_batches(workers: int, dataset: Callable[[], Dataset[Any]]) -> None:
    """Stopped after any batch and gone on with in a new loader: same samples, same augmentation, prefetched ones not lost."""
    options: dict[str, Any] = {"num_workers": workers, "seed": 3, "seed_samples": True}
    whole = consume(ResumableLoader(dataset(), 8, **options), 14)  # past the end of the second epoch
    for stop in (1, 5, 6, 7, 13) if workers else range(1, 14):
        first = ResumableLoader(dataset(), 8, **options)
        assert consume(first, stop) == whole[:stop]
        second = ResumableLoader(dataset(), 8, **options)
        second.load_state_dict(first.state_dict())
        assert consume(second, 14 - stop) == whole[stop:], stop


def test_the_number_of_workers_changes_nothing() -> None:
    """With seeded samples, 0, 1 and 3 workers give the same batches, and the process's own generators do not notice."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = consume(ResumableLoader(Noisy(), 8, seed_samples=True), 8)
    after = (float(torch.rand(())), random.random(), float(np.random.random()))
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert after == (float(torch.rand(())), random.random(), float(np.random.random()))
    for workers in (1, 3):
        assert consume(ResumableLoader(Noisy(), 8, num_workers=workers), 8) == expected


def test_iterating_draws_nothing_from_the_global_generator() -> None:
    """A new iterator in the middle of an epoch must not move the generators that a checkpoint brought back."""
    before = torch.get_rng_state()
    consume(ResumableLoader(TensorDataset(torch.arange(LENGTH), torch.arange(LENGTH)), 8, num_workers=0), 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_prefetched_batches_do_not_count() -> None:
    """With workers far ahead, the position is where the loop is."""
    loader = ResumableLoader(Noisy(), 5, num_workers=2, prefetch_factor=4)
    for number, _ in enumerate(loader, 1):
        assert loader.consumed == 5 * number
        assert loader.state_dict()["consumed"] == (5 * number) % LENGTH
        assert list(loader.last_positions) == list(range(5 * number - 5, 5 * number))
        if number == 10:
            assert loader.epoch == 0
    assert (loader.epoch, loader.consumed) == (1, 0)


def test_fingerprints_do_not_depend_on_the_world() -> None:
    """Summed over the ranks, the fingerprint of a global batch is the same for 1, 2 and 4 ranks; other orders differ."""

    def totals(ranks: int, seed: int = 0) -> list[int]:
        loaders = [ResumableLoader(Noisy(), 8 // ranks, rank=rank, world_size=ranks, seed=seed) for rank in range(ranks)]
        return [sum(loader.fingerprint() for loader in loaders) % FINGERPRINT_MODULUS for _ in zip(*loaders, strict=True)]

    assert totals(1) == totals(2) == totals(4)
    assert len(set(totals(1)) | set(totals(1, seed=1))) == 12
    swapped = np.array([1, 0, 2])
    assert fingerprint(0, range(3), np.array([0, 1, 2])) != fingerprint(0, range(3), swapped)
    assert fingerprint(0, range(3), swapped) != fingerprint(1, range(3), swapped)
    assert all(0 <= total < 2**53 for total in totals(1))


def test_ranks_share_an_epoch() -> None:
    """Two ranks see disjoint halves of each global batch, in the global order."""
    loaders = [ResumableLoader(Noisy(), 5, rank=rank, world_size=2, seed=4) for rank in range(2)]
    ids = [sample for batch in zip(*loaders, strict=True) for ids, _ in batch for sample in ids.tolist()]
    assert ids == epoch_order(4, 0, LENGTH).tolist()
    assert len(loaders[0]) == 5


TRAINER = """
import os, signal, psutil, torch
from torch.utils.data import TensorDataset
from wbdist.hooks.loader import ResumableLoader
signal.alarm(60)
def notify(): [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGINT)]
os.register_at_fork(after_in_child=notify)
loader = ResumableLoader(TensorDataset(torch.arange(50)), 5, num_workers=2, persistent_workers=True)
for number, _ in enumerate(loader):
    workers = [process.pid for process in psutil.Process().children()]
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
print(number, *workers, flush=True)
signal.pause()
"""


def test_workers_survive_a_notice_and_die_with_the_trainer() -> None:
    """SIGTERM and SIGINT to workers change nothing, from their fork on; SIGKILL to their parent takes them along."""
    with subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        try:
            last, *workers = map(int, trainer.stdout.readline().split())  # ends with the trainer, whom its alarm ends
            assert last == 9
            assert len(workers) == 2
            assert all(psutil.pid_exists(worker) for worker in workers)
        finally:
            trainer.kill()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, "workers outlived their trainer"
        time.sleep(0.01)


def test_bad_use_is_refused() -> None:
    """Datasets without an order, a fingerprint before the first batch, and two loops at once are refused."""

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(UsageError, match="map-style"):
        ResumableLoader(Stream(), 1)
    loader = ResumableLoader(Noisy(), 5)
    with pytest.raises(UsageError, match="no batch"):
        loader.fingerprint()
    one, other = iter(loader), iter(loader)
    next(one)
    next(one)
    next(other)  # starts where the other loop is
    with pytest.raises(UsageError, match="one loop at a time"):
        next(one)
