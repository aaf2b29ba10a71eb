"""The sample ledger: what was used once is proven, and whatever was not is found and named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import arange
from torch.utils.data import TensorDataset

from wbdist.errors import UsageError
from wbdist.hooks.ledger import Order, audit
from wbdist.hooks.loader import ResumableLoader
from wbdist.hooks.sampler import FINGERPRINT_MODULUS

Row = dict[str, Any]


def trained(length: int, batch: int, worlds: list[tuple[int, int]], *, seed: int = 1, tail: str = "drop") -> list[list[Row]]:
    """The rows of each rank of a job that runs with `worlds`, (ranks, steps) one after the other; by rank, as per_rank logs."""
    rows: list[list[Row]] = [[] for _ in range(max(ranks for ranks, _ in worlds))]
    state, step = None, 0
    for ranks, steps in worlds:
        loaders = [
            ResumableLoader(TensorDataset(arange(length)), batch, rank=r, world_size=ranks, seed=seed, tail=tail)  # type: ignore[arg-type]
            for r in range(ranks)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        iterators = [iter(loader) for loader in loaders]
        for _ in range(steps):
            for rank, loader in enumerate(loaders):
                if next(iterators[rank], None) is None:
                    iterators[rank] = iter(loader)
                    next(iterators[rank])
                rows[rank].append({"_step": step, **loader.ledger()})
            step += 1
        state = loaders[0].state_dict()
    return rows


def orders(rows: list[Row]) -> dict[int, Order]:
    return {row["_step"]: Order.parse(row["_data"]) for row in rows if "_data" in row}


def joined(rows: list[list[Row]]) -> list[Row]:
    """One run, as the aggregator makes it."""
    by_step: dict[int, Row] = {}
    for row in (row for of_rank in rows for row in of_rank):
        held = by_step.setdefault(row["_step"], {**row, "_samples": 0})
        held["_samples"] = (held["_samples"] + row["_samples"]) % FINGERPRINT_MODULUS
    return list(by_step.values())


@given(
    length=st.integers(20, 90),
    batch=st.integers(1, 4),
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 12)), min_size=1, max_size=4),
    tail=st.sampled_from(["drop", "pad"]),
)
def test_whatever_the_worlds_it_is_exactly_once(length: int, batch: int, worlds: list[tuple[int, int]], tail: str) -> None:
    """Any sequence of world sizes, whole epochs or parts: proven, from one run or from the runs of all ranks."""
    rows = trained(length, batch, worlds, tail=tail)
    found = audit([joined(rows)], orders(rows[0]))
    assert found.problems == ()
    assert audit(rows, orders(rows[0])) == found
    for one in found.epochs:
        assert one.once + one.left_out + one.to_come == one.length


def test_four_two_three() -> None:
    """4 ranks, then 2, then 3, each stopped in the middle of an epoch: every sample once."""
    rows = trained(235, 5, [(4, 7), (2, 5), (3, 18)])
    found = audit([joined(rows)], orders(rows[0]))
    assert found.problems == ()
    assert [(one.epoch, one.once, one.to_come) for one in found.epochs] == [(0, 235, 0), (1, 225, 0)]
    assert found.epochs[1].left_out == 10


def one_run() -> list[Row]:
    return joined(trained(48, 4, [(2, 14)]))


def findings(rows: list[Row]) -> str:
    return "\n".join(audit([rows], orders(rows)).problems)


def test_faults_are_named() -> None:
    """A step replayed, a step lost, one that used other samples, an epoch left out: each is found, with its samples."""
    rows = one_run()
    assert findings(rows) == ""
    again = [row if row["_step"] < 3 else {**row, "_step": row["_step"] + 1} for row in rows]
    again.insert(3, {**rows[2], "_step": 3})
    assert "epoch 0: steps 2 and 3 both used positions 16 to 23 (samples " in findings(again)
    lost = [row for row in rows if row["_step"] != 7]
    assert findings(lost).startswith("epoch 1: no step used positions 8 to 15 (samples ")
    early = [row for row in rows if row["_step"] != 5]
    assert findings(early).startswith("epoch 0: no step used positions 40 to 47 (samples ")
    other = [{**row, "_samples": row["_samples"] ^ (row["_step"] == 4)} for row in rows]
    assert findings(other).startswith("step 4 used other samples than positions 32 to 39 of epoch 0 hold")
    swapped = [{**row, "_step": {1: 2, 2: 1}.get(row["_step"], row["_step"])} for row in rows]
    assert "step 2 used positions that come before those of step 1" in findings(sorted(swapped, key=lambda row: row["_step"]))
    skipped = [row for row in rows if row["epoch"] != 1]
    assert "no step of epoch 1 is in the history, but epoch 2 is" in findings(skipped)


def test_ranks_that_disagree_are_named() -> None:
    """Rows of ranks that were not at the same place are no proof."""
    rows = trained(48, 4, [(2, 6)])
    rows[1][3]["_consumed"] += 8
    found = audit(rows, orders(rows[0]))
    assert found.problems[0] == (
        "the ranks do not agree which samples step 3 used: (epoch, consumed, batch) are [(0, 32, 8), (0, 40, 8)]"
    )


def test_without_a_ledger_nothing_is_claimed() -> None:
    """No rows, or rows whose order is unknown, are an error, not a proof."""
    with pytest.raises(UsageError, match="no row of this history has a sample ledger"):
        audit([[]], {})
    with pytest.raises(UsageError, match="begins at step 0 without _data"):
        audit([one_run()], {})
    with pytest.raises(UsageError, match="not what a ResumableLoader writes"):
        Order.parse("seed=1")
