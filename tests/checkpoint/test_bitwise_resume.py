"""A resumed training equals one that was never interrupted, bit by bit; and every captured piece is needed for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ranks import alone
from support.training import Training

from wbdist.checkpoint import restore as restoring
from wbdist.checkpoint import rng
from wbdist.checkpoint.manifest import committed

STEPS = 20  # past the end of the first epoch, which has 12 batches


def uninterrupted(directory: Path) -> dict[str, Any]:
    training = Training(alone(), directory)
    training.train(STEPS)
    return training.everything()


def interrupted_at(step: int, directory: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A training that dies one step after saving at `step`, and a second attempt that ends it."""
    first = Training(alone(), directory)
    first.track(*without)
    first.train(min(step + 1, STEPS), save_at=(step,))
    first.checkpoints.close()
    second = Training(alone(), directory, attempt=2)
    second.track(*without)
    assert second.restore().step == step
    second.losses = first.losses[:step]
    second.train(STEPS)
    second.checkpoints.close()
    return second.everything()


def test_every_step_resumes_bitwise(tmp_path: Path) -> None:
    """Whichever step was saved last: losses, weights, moments, schedule, data position and every generator are equal."""
    expected = uninterrupted(tmp_path / "never")
    for step in range(1, STEPS):
        assert interrupted_at(step, tmp_path / str(step)) == expected, f"saved at step {step}"


@pytest.mark.parametrize("piece", ["model", "optimizer", "scheduler", "average", "data"])
def test_every_tracked_piece_matters(tmp_path: Path, piece: str) -> None:
    """Leaving any one object out of the checkpoint makes the resumed training differ: the comparison can fail."""
    assert interrupted_at(8, tmp_path / "cut", (piece,)) != uninterrupted(tmp_path / "never")


@pytest.mark.parametrize("generator", ["python", "numpy", "torch"])
def test_every_generator_matters(tmp_path: Path, generator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving any one random generator as it was makes the resumed training differ."""
    restore = rng.restore

    def restore_without(state: dict[str, Any]) -> list[str]:
        return restore({**state, generator: rng.capture()[generator]})

    monkeypatch.setattr(restoring.rng, "restore", restore_without)
    assert interrupted_at(8, tmp_path / "cut") != uninterrupted(tmp_path / "never")


def test_many_saves_and_attempts(tmp_path: Path) -> None:
    """Five attempts that each save every step and die change nothing, and leave the newest checkpoints only."""
    losses: list[float] = []
    for attempt in range(1, 6):
        training = Training(alone(), tmp_path / "cut", attempt=attempt)
        training.track()
        restored = training.restore()
        training.losses = losses[: training.step]
        training.train(4 * attempt, save_at=tuple(range(1, 4 * attempt)))
        losses = training.losses
        training.checkpoints.close()
        assert (restored is None) == (attempt == 1)
    assert training.everything() == uninterrupted(tmp_path / "never")
    # the two newest, and the one the last attempt was restored from
    assert [m.name for m in committed(tmp_path / "cut")] == ["step-19.a5", "step-18.a5", "step-15.a4"]
