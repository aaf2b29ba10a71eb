"""The order of samples: complete, stable for ever, and the same from any position in any world."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import alone
from torchdata.stateful_dataloader import StatefulDataLoader

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.core.mixing import mix64
from wbdist.errors import UsageError
from wbdist.hooks.sampler import ResumableSampler, epoch_order


def world(length: int, batch: int, ranks: int, **options: object) -> list[ResumableSampler]:
    return [ResumableSampler(length, batch, rank=rank, world_size=ranks, **options) for rank in range(ranks)]  # type: ignore[arg-type]


def step(samplers: list[ResumableSampler]) -> list[int]:
    """One step of all ranks: the ids in global order."""
    batches = [sampler.advance() for sampler in samplers]
    assert len({batch.stop for batch in batches}) == 1
    positions = [position for batch in batches for position in batch.positions]
    assert positions == list(range(batches[0].start, batches[0].stop))
    return [sample for batch in batches for sample in batch.ids.tolist()]


def test_the_order_never_changes() -> None:
    """These numbers are the format: a job resumed with a later version must see them again."""
    assert mix64(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0, as published
    assert epoch_order(0, 0, 10).tolist() == sorted(range(10), key=lambda i: mix64(0, 0, i))
    assert epoch_order(42, 3, 12).tolist() == PINNED


PINNED = [0, 9, 1, 10, 8, 11, 5, 7, 3, 4, 2, 6]


@given(st.integers(0, 2**64), st.integers(0, 10**6), st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation(seed: int, epoch: int, length: int) -> None:
    """Every sample once, in an order that is the sort of the documented keys."""
    order = epoch_order(seed, epoch, length).tolist()
    assert sorted(order) == list(range(length))
    assert order == sorted(range(length), key=lambda i: (mix64(seed, epoch, i), i))


def test_epochs_and_seeds_differ() -> None:
    """Another epoch or another seed is another order, without anybody calling set_epoch."""
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(
    st.integers(24, 200),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=6),
    st.sampled_from(["drop", "pad"]),
)
@settings(max_examples=150, deadline=None)
def test_one_global_order_in_any_sequence_of_worlds(length: int, batch: int, worlds: list[tuple[int, int]], tail: str) -> None:
    """However often the world's size changes, the global order is the single rank's, and each sample comes once an epoch."""
    seen: dict[int, list[int]] = {}
    state = ResumableSampler(length, 1, seed=9).state_dict()
    largest = batch * max(ranks for ranks, _ in worlds)
    for ranks, steps in worlds:
        samplers = world(length, batch, ranks, seed=9, tail=tail)
        for sampler in samplers:
            sampler.load_state_dict(state)
        for _ in range(steps):
            if samplers[0].left == 0:
                for sampler in samplers:
                    sampler.next_epoch()
            epoch = samplers[0].epoch
            seen.setdefault(epoch, []).extend(step(samplers))
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states)
        state = states[0]
    for epoch, ids in seen.items():
        order = epoch_order(9, epoch, length).tolist()
        assert ids[:length] == order[: len(ids)]
        if tail == "pad":
            assert ids[length:] == (order * largest)[: max(0, len(ids) - length)]
        else:
            assert len(ids) == len(set(ids))
        if epoch < state["epoch"]:  # over
            assert len(ids) > length - largest
            assert tail == "drop" or set(ids) == set(range(length))


def test_four_two_three() -> None:
    """4 ranks, then 2, then 3, in the middle of an epoch: each sample exactly once, in the order of one rank."""
    length, batch = 4 * 6 * 3 + 2 * 6 * 2 + 3 * 6 * 4, 6
    ids: list[int] = []
    state = ResumableSampler(length, 1, seed=1).state_dict()
    for ranks, steps in ((4, 3), (2, 2), (3, 4)):
        samplers = world(length, batch, ranks, seed=1)
        for sampler in samplers:
            sampler.load_state_dict(state)
        for _ in range(steps):
            ids += step(samplers)
        state = samplers[0].state_dict()
    assert ids == epoch_order(1, 0, length).tolist()
    assert Counter(ids) == dict.fromkeys(range(length), 1)
    assert (state["epoch"], state["consumed"]) == (1, 0)


def test_tails() -> None:
    """`drop` leaves the ragged end out, `pad` fills it from the start of the order, also from less than one batch."""
    assert len(ResumableSampler(10, 4)) == 2
    assert len(ResumableSampler(10, 4, tail="pad")) == 3
    padded = [i for ids in ResumableSampler(10, 4, tail="pad", seed=3) for i in ids]
    order = epoch_order(3, 0, 10).tolist()
    assert padded == order + order[:2]
    tiny = world(3, 4, 2, tail="pad")
    order = epoch_order(0, 0, 3).tolist()
    assert step(tiny) == (order * 3)[:8]


def test_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    """Saved after an epoch's last step, the position is the next epoch's first, in whatever world it is loaded."""
    sampler = ResumableSampler(11, 4)
    sampler.advance()
    assert sampler.state_dict()["consumed"] == 4
    sampler.advance()
    assert (sampler.epoch, sampler.left) == (0, 0)
    state = sampler.state_dict()
    assert (state["epoch"], state["consumed"]) == (1, 0)
    with pytest.raises(UsageError, match="next_epoch"):
        sampler.advance()
    single = ResumableSampler(11, 1)
    single.load_state_dict(state)
    assert (single.epoch, single.left) == (1, 11)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"seed": 2}, "seed was 1 and is now 2"), ({"length": 99}, "number of samples was 64"), ({"shuffle": False}, "shuffle")],
)
def test_another_order_is_refused(change: dict[str, object], text: str) -> None:
    """A position in another seed's, dataset's or kind of order means nothing here."""
    arguments: dict[str, object] = {"length": 64, "batch_size": 4, "seed": 1}
    state = ResumableSampler(**arguments).state_dict()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=text):
        ResumableSampler(**{**arguments, **change}).load_state_dict(state)  # type: ignore[arg-type]


def test_bad_arguments_are_refused() -> None:
    """Arguments that leave no batch, or no sense, are refused with what is allowed."""
    for arguments in (
        {"length": 10, "batch_size": 4, "world_size": 3},
        {"length": 0, "batch_size": 1},
        {"length": 9, "batch_size": 0},
        {"length": 9, "batch_size": 1, "rank": 2, "world_size": 2},
        {"length": 9, "batch_size": 1, "tail": "wrap"},
    ):
        with pytest.raises(UsageError):
            ResumableSampler(**arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not a data position"):
        ResumableSampler(9, 1).load_state_dict({"epoch": 1})


@pytest.mark.parametrize("workers", [0, 2])
def test_in_torchdatas_loader(workers: int, tmp_path: Path) -> None:
    """Saved anywhere, also at the end of an epoch and with batches prefetched: it goes on where training was."""
    data = list(range(44))

    def make() -> tuple[ResumableSampler, StatefulDataLoader[int]]:
        sampler = ResumableSampler(len(data), 4, seed=3)
        return sampler, StatefulDataLoader(data, batch_sampler=sampler, num_workers=workers)  # type: ignore[arg-type]

    def go_on(sampler: ResumableSampler, loader: StatefulDataLoader[int], steps: int) -> list[int]:
        ids: list[int] = []
        while True:
            for batch in loader:
                ids += batch.tolist()
                steps -= 1
                if steps == 0:
                    return ids
            sampler.next_epoch()

    whole = go_on(*make(), 25)
    assert sorted(whole[:44]) == data
    for stop in (1, 5, 11, 12) if workers == 0 else (5, 11):
        sampler, loader = make()
        before = go_on(sampler, loader, stop)
        with Checkpointer(tmp_path / str(stop), alone(), attempt=1) as checkpoints:
            checkpoints.track(data=loader)
            checkpoints.save(stop)
        del loader, checkpoints
        sampler, loader = make()
        with Checkpointer(tmp_path / str(stop), alone(), attempt=2) as checkpoints:
            checkpoints.track(data=loader)
            assert checkpoints.restore() is not None
        assert before + go_on(sampler, loader, 25 - stop) == whole, stop


def test_torchdatas_state_in_another_world() -> None:
    """What 4 ranks' loaders saved, 2 ranks' go on from: each sample once, in the global order."""

    def ranks(count: int) -> list[StatefulDataLoader[int]]:
        samplers = [ResumableSampler(48, 3, rank=rank, world_size=count, seed=9) for rank in range(count)]
        return [StatefulDataLoader(range(48), batch_sampler=sampler) for sampler in samplers]  # type: ignore[arg-type]

    four, ids = ranks(4), []
    iterators = [iter(loader) for loader in four]
    for _ in range(3):
        ids += [i for iterator in iterators for i in next(iterator).tolist()]
    two = ranks(2)
    for loader in two:
        loader.load_state_dict(four[1].state_dict())
    for batches in zip(*two, strict=True):
        ids += [i for batch in batches for i in batch.tolist()]
    assert ids == epoch_order(9, 0, 48).tolist()
