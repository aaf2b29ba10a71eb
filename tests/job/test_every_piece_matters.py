"""The proof that a resumed job is the one that was never interrupted, and that it fails when any captured piece is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.whole_job import STEPS, Killed, attempt, live

from wbdist.checkpoint import commit, rng
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.manifest import Manifest, committed
from wbdist.errors import Error
from wbdist.job.accumulation import Group

KILLED_AFTER = 11


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="module")
def never(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Final state and history of the job that nothing interrupts."""
    directory = tmp_path_factory.mktemp("never")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        return attempt(directory), live(directory)


def resumed(directory: Path, patch: pytest.MonkeyPatch, killed_after: int = KILLED_AFTER, **said: Any) -> Any:
    """Final state and history of a job that died once; or why it could not go on."""
    directory.mkdir(exist_ok=True)
    patch.chdir(directory)
    with pytest.raises(Killed):
        attempt(directory, killed_after=killed_after, **said)
    try:
        return attempt(directory, **said), live(directory)
    except Error as error:
        return error


def test_a_resumed_job_is_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Any) -> None:
    """Weights, moments, schedules, loss scale, moving average, metric, data, generators and the run's history, bit by bit."""
    assert len(never[1]) == STEPS
    assert resumed(tmp_path, monkeypatch) == never
    # 4 lies between groups in the first epoch (7 batches by two: 2, 4, 6, 7); 8 falls into one, that ends with 9
    assert [manifest.step for manifest in committed(tmp_path / "ckpt")][-1] == 9


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [1, 4])
def test_killed_after_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Any, save_every: int) -> None:
    """Wherever in an epoch or a group, and however often it saves."""
    for step in range(1, STEPS):
        assert resumed(tmp_path / str(step), monkeypatch, step, save_every=save_every) == never, step


@pytest.mark.parametrize(
    "piece",
    [
        "scaler",
        "errors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("model", "optimizer", "scheduler", "average", "data")),
    ],
)
def test_without_a_tracked_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Any, piece: str) -> None:
    """The proof fails."""
    assert resumed(tmp_path, monkeypatch, without=piece) != never


@pytest.mark.parametrize("generator", ["numpy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("python", "torch"))])
def test_without_a_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: str) -> None:
    """Not captured: the restore fails, by name. (Not put back: checkpoint/test_bitwise_resume.py.)"""
    capture = rng.capture

    def partly() -> dict[str, Any]:
        return {name: state for name, state in capture().items() if name != generator}

    monkeypatch.setattr(rng, "capture", partly)
    assert f"random generators ['{generator}']" in str(resumed(tmp_path, monkeypatch))


def test_without_the_boundary_of_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Any) -> None:
    """Saved within a group, half a gradient is lost, and the proof fails."""
    save_within = property(lambda group: False)
    accumulating = Group.open

    from wbdist.job.handle import Job

    with monkeypatch.context() as patch:
        patch.setattr(Job, "accumulating", property(lambda job: accumulating.__get__(job._saves.group)))
        assert resumed(tmp_path / "same", patch) == never
        patch.setattr(Group, "open", save_within)
        assert resumed(tmp_path / "cut", patch) != never


def test_without_the_position_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Any) -> None:
    """A checkpoint that does not say where the run stood loses or repeats rows, and the proof fails."""
    save = Checkpointer.save

    def forgetful(self: Checkpointer, step: int, position: Any = None, **said: Any) -> Any:
        return save(self, step, None, **said)

    monkeypatch.setattr(Checkpointer, "save", forgetful)
    state, history = resumed(tmp_path, monkeypatch)
    assert state == never[0]
    assert history != never[1]


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        ({"config_hash": ""}, "does not hold the config"),
        ({"environment": {}}, "made in another environment: accelerator absent -> "),
        pytest.param({"config": {}}, "does not hold the config", marks=pytest.mark.slow),
        pytest.param({"config": {}, "config_hash": ""}, "does not hold the config", marks=pytest.mark.slow),
        pytest.param({"kinds": {}}, "'optimizer' is a thing of unknown class", marks=pytest.mark.slow),
        pytest.param({"shared": ("model",)}, "missing in the checkpoint", marks=pytest.mark.slow),
    ],
)
def test_without_a_part_of_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Any, dropped: dict[str, Any], said: str
) -> None:
    """The restore fails, and says what is missing."""
    monkeypatch.setattr(commit, "Manifest", lambda **fields: Manifest(**{**fields, **dropped}))
    outcome = resumed(tmp_path, monkeypatch)
    assert outcome != never
    assert said in str(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"runs": ()}, {"step": 2}, {"attempt": 2}])
def test_a_manifest_that_cannot_be_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Any, wrong: dict[str, Any]
) -> None:
    """Is damage: such checkpoints are put away, and what comes of the job is the same."""
    with monkeypatch.context() as patch:
        patch.setattr(commit, "Manifest", lambda **fields: Manifest(**{**fields, **wrong}))
        patch.chdir(tmp_path)
        with pytest.raises(Killed):
            attempt(tmp_path, killed_after=KILLED_AFTER)
    monkeypatch.chdir(tmp_path)
    assert (attempt(tmp_path), live(tmp_path)) == never
    assert sorted(path.name for path in (tmp_path / "ckpt" / "quarantine").iterdir()) == ["step-4.a1", "step-9.a1"]
