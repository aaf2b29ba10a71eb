"""What still fits between a notice and the end."""

from __future__ import annotations

import random

import pytest

from wbdist.preemption.budget import LEAVE, SAFETY, UNMEASURED, Facts, SaveCosts, decide


def facts(left: float | None, save: float | None = None, *, saving: float | None = None, **more: object) -> Facts:
    deadline = None if left is None else 1000.0 + left
    return Facts(now=1000.0, deadline=deadline, save_seconds=save, saving=saving, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "act"),
    [
        (facts(None), "save"),
        (facts(None, 500.0, saving=0.0), "save"),
        (facts(120.0, 60.0), "save"),
        (facts(30.0, 60.0), "keep"),
        (facts(LEAVE + 10.0 * SAFETY + 0.1, 10.0), "save"),
        (facts(LEAVE + 10.0 * SAFETY - 0.1, 10.0), "keep"),
        (facts(20.0, 10.0, saving=0.0), "finish"),
        (facts(30.0, 10.0, saving=0.0), "save"),
        (facts(20.0, 10.0, saving=9.0), "save"),
        (facts(10.0, 10.0, saving=0.0), "keep"),
        (facts(10.0, 10.0, saving=9.0), "finish"),
        (facts(1.0, 10.0, saving=90.0), "keep"),
        (facts(LEAVE + UNMEASURED + 0.1), "save"),
        (facts(LEAVE + UNMEASURED - 0.1), "keep"),
        (facts(-5.0, 0.1), "keep"),
    ],
)
def test_a_save_that_cannot_commit_is_not_begun(own: Facts, act: str) -> None:
    """Proves the table: enough time, not enough, only enough for the save under way, unmeasured, too late."""
    plan = decide([own])
    assert plan.act == act
    assert bool(plan.because()) == (act != "save")
    if own.deadline is not None:
        assert 0 <= plan.timeout(60.0) <= min(60.0, max(0.0, own.deadline - own.now))


def test_all_ranks_conclude_the_same_from_the_worst_of_all() -> None:
    """Proves that the earliest deadline, the latest clock, the slowest save any cancellation count, in any order of ranks."""
    ranks = [
        facts(100.0, 2.0, committed=7),
        Facts(now=1003.0, deadline=None, save_seconds=9.0, cancelled=True),
        Facts(now=999.0, deadline=1050.0, approvable=True),
    ]
    plans = set()
    for seed in range(20):
        random.Random(seed).shuffle(ranks)
        plans.add(decide(ranks))
    (plan,) = plans
    assert plan.left == 1050.0 - 1003.0
    assert plan.needed == 9.0 * SAFETY
    assert (plan.cancelled, plan.approvable, plan.committed) == (True, True, 7)


def test_what_saves_usually_take_counts() -> None:
    """Proves that one slow save decides nothing, that several do, and that nothing is believed before the first."""
    costs = SaveCosts()
    assert costs.seconds is None
    for seconds in (1.0, 8.0, 1.0):
        costs.add(seconds)
    assert costs.seconds == 1.0
    for _ in range(3):
        costs.add(8.0)
    assert costs.seconds == 8.0
