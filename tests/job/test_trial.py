"""A job that is a sweep's trial; one process, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import wbdist
from wbdist.run import anew
from wbdist.run.journal import JournalReader, find_journals


@pytest.mark.parametrize("strategy", ["auto", "per_rank"])
def test_it_goes_on_as_the_trials_own_run(strategy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a trial that is handed out again continues its run from the checkpoint, under the id that the sweep knows,
    also with a run a rank; and that its checkpoint is of its parameters, so that other ones are refused."""
    monkeypatch.chdir(tmp_path)
    Path("t1.yaml").write_text("lr: {value: 0.5}\n")
    for name, value in (("MODE", "offline"), ("RUN_ID", "t1"), ("SWEEP_ID", "sw1"), ("SWEEP_PARAM_PATH", "t1.yaml")):
        monkeypatch.setenv(f"WANDB_{name}", value)

    def job() -> wbdist.Job:
        return wbdist.job(project="p", checkpoint_dir="ckpt", notices="off", strategy=strategy, config={"lr": 9.0, "wd": 1})

    def train(job: wbdist.Job, epochs: int) -> list[int]:
        data = job.loader(TensorDataset(torch.arange(8.0)), batch_size=4)
        job.track(data=data)
        return [job.step for _ in job.steps(data, epochs=epochs)]

    with job() as first:
        assert (first.run.id, first.run.sweep_id, first.config.lr, first.config.wd) == ("t1", "sw1", 0.5, 1)
        assert train(first, 1) == [0, 1]
    with job() as again:
        assert (again.run.id, again.attempt, again.run.starting_step, again.run.resumed) == ("t1", 2, 2, True)
        assert train(again, 2) == [2, 3]
    Path("t1.yaml").write_text("lr: {value: 0.25}\n")
    with pytest.raises(wbdist.ConfigError, match=r"lr.*0\.5.*0\.25"), job() as other:
        train(other, 3)
    found = set()
    for path in find_journals(tmp_path / "wandb"):
        with JournalReader.open(path) as reader:
            found.add(reader.header.run_id)
    assert found == {"t1"}


@pytest.mark.parametrize("why", ["trial", "restart", "by hand"])
def test_a_job_that_saves_nothing_begins_anew_when_it_is_started_again(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that a job without checkpoints whose run has an id is the run's next attempt from step 0 when its sweep or its
    launcher starts it again, where what it logged used to go into the archive; and that by hand it is refused, with why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RUN_ID", "t1")
    if why == "trial":
        monkeypatch.setenv("WANDB_SWEEP_ID", "sw1")
    for life in (1, 2):
        monkeypatch.setattr(anew, "_begun", set())  # as in a new process
        if life == 2 and why == "restart":
            launched = {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "TORCHELASTIC_RESTART_COUNT": "1",
            }
            for name, value in launched.items():
                monkeypatch.setenv(name, value)
        if life == 2 and why == "by hand":
            with (
                pytest.raises(
                    wbdist.Error, match=r"'t1' exists already.*choose another, or use a wbdist.job with a checkpoint_dir"
                ),
                wbdist.job(project="p", notices="off"),
            ):
                raise AssertionError("it began")
        else:
            with wbdist.job(project="p", notices="off") as job:
                job.log({"life": life})
                assert (job.attempt, job.run.starting_step) == (life, 0)
    headers = []
    for path in find_journals(tmp_path / "wandb"):
        with JournalReader.open(path) as reader:
            headers.append((reader.header.run_id, reader.header.attempt, reader.header.cause))
    assert sorted(headers) == [("t1", 1, "start"), *([("t1", 2, "restart")] if why != "by hand" else [])]
