"""Metrics of torchmetrics, whose own state_dict is empty, go on bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import ThreadCoordinator, alone, run_ranks
from support.training import position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.manifest import committed
from wbdist.errors import StateMissingError, UsageError

pytestmark = pytest.mark.slow  # torchmetrics takes seconds to import


class Kinds:
    """A running mean (weighted by the number of updates), a list of values, a collection whose metrics share a state, one
    metric within another."""

    def __init__(self) -> None:
        import torchmetrics
        from torchmetrics import classification

        class Running(torchmetrics.Metric):
            full_state_update = False

            def __init__(self) -> None:
                super().__init__()
                self.add_state("level", torch.zeros(()), dist_reduce_fx="mean")

            def update(self, values: torch.Tensor) -> None:
                self.level = self.level + values.mean()

            def compute(self) -> torch.Tensor:
                return self.level

        self.metrics: dict[str, Any] = {
            "running": Running(),
            "values": torchmetrics.CatMetric(),
            "both": torchmetrics.MetricCollection(
                [classification.BinaryPrecision(), classification.BinaryRecall(), torchmetrics.MeanSquaredError()]
            ),
            "extremes": torchmetrics.MinMaxMetric(torchmetrics.MeanMetric()),
            "window": torchmetrics.wrappers.Running(torchmetrics.SumMetric(), window=3),
        }

    def feed(self, steps: range, seed: int = 0) -> None:
        for step in steps:
            chance = torch.Generator().manual_seed(1000 * seed + step)
            guess, truth = torch.rand(8, generator=chance), torch.randint(2, (8,), generator=chance)
            self.metrics["running"](guess)
            self.metrics["values"].update(guess)
            self.metrics["both"].update(guess, truth)
            self.metrics["extremes"](guess)
            self.metrics["window"].update(guess)

    def told(self) -> Any:
        both = self.metrics["both"].compute()
        lone = {name: self.metrics[name].compute() for name in ("running", "values", "window")}
        found = {**both, **lone, **self.metrics["extremes"].compute()}
        return {name: value.numpy().tobytes() for name, value in found.items()}


def test_metrics_go_on(tmp_path: Path) -> None:
    """On each of two ranks, from its own values: saved after three updates, and four more."""

    def whole(rank: int) -> Any:
        kinds = Kinds()
        kinds.feed(range(7), rank)
        return kinds.told()

    def first(ranks: ThreadCoordinator) -> None:
        kinds = Kinds()
        with Checkpointer(tmp_path, ranks, attempt=1) as checkpoints:
            checkpoints.track(**kinds.metrics)
            kinds.feed(range(3), ranks.rank)
            checkpoints.save(3, position(3), block=True, timeout=60)

    def second(ranks: ThreadCoordinator) -> Any:
        kinds = Kinds()
        kinds.feed(range(90, 92))  # what a sanity check leaves behind
        checkpoints = Checkpointer(tmp_path, ranks, attempt=2)
        checkpoints.track(**kinds.metrics)
        checkpoints.restore(timeout=60)
        kinds.feed(range(3, 7), ranks.rank)
        return kinds.told()

    Kinds()  # imported once, not by two threads
    assert run_ranks(2, first, 90) == [None, None]
    assert committed(tmp_path)[0].shared == ()
    assert run_ranks(2, second, 90) == [whole(0), whole(1)] != [whole(1), whole(0)]

    def third(ranks: ThreadCoordinator) -> Any:
        checkpoints = Checkpointer(tmp_path, ranks, attempt=3)
        checkpoints.track(**Kinds().metrics)
        restored = checkpoints.restore(timeout=60)
        assert restored is not None
        return restored.notes

    (notes,) = run_ranks(1, third, 90)
    assert "what ranks 1 to 1 held for themselves is not used: ['both', 'extremes', 'running', 'values', 'window']" in notes


def test_other_metrics_are_refused(tmp_path: Path) -> None:
    """Another metric under the name, or the same one twice."""
    import torchmetrics

    mean = torchmetrics.MeanMetric()
    with Checkpointer(tmp_path, alone(), attempt=1) as checkpoints:
        checkpoints.track(metric=mean)
        with pytest.raises(UsageError, match="same object"):
            checkpoints.track(again=mean)
        checkpoints.save(1, position(1), block=True, timeout=20)
    checkpoints = Checkpointer(tmp_path, alone(), attempt=2)
    checkpoints.track(metric=torchmetrics.CatMetric())
    with pytest.raises(StateMissingError, match=r"holds the metrics .*mean_value.*, this job has .*value"):
        checkpoints.restore(timeout=20)
