"""What a job makes of a notice: one rank, one process, offline; many ranks are in tests/preemption."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.waiting import until
from torch import nn
from torch.utils.data import TensorDataset

import wbdist
from wbdist.checkpoint.manifest import committed
from wbdist.job import Preempted
from wbdist.preemption.notice import Notice
from wbdist.preemption.rehearsal.azure import AzureMetadata
from wbdist.preemption.rehearsal.service import Answer, Request
from wbdist.run.handle import Run
from wbdist.run.journal import JournalReader, Kind, find_journals


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time a run is marked preempting."""
    found: list[bool] = []
    real = Run.mark_preempting
    monkeypatch.setattr(Run, "mark_preempting", lambda run, *rest: found.append(True) or real(run, *rest))
    return found


def train(at_step: int | None, act: Callable[[Any], None], *, save_every: int | None = None, notices: str = "off") -> int:
    """A job that calls `act(job)` within step `at_step`, None for all; steps done when it ended by itself."""
    with wbdist.job(project="p", checkpoint_dir="ckpt", save_every=save_every, notices=notices) as job:
        loader = job.loader(TensorDataset(torch.arange(40, dtype=torch.float32)), batch_size=4)
        job.track(net=nn.Linear(1, 1), data=loader)
        for _ in job.steps(loader, epochs=1):
            if at_step in {None, job.step}:
                act(job)
    return job.step


def told(left: float | None = None, **more: Any) -> Callable[[Any], None]:
    deadline = None if left is None else time.time() + left
    return lambda job: job._hub.tell(Notice("test", "the machine goes", time.monotonic(), deadline, **more))


def saved() -> list[tuple[int, str]]:
    return [(manifest.step, manifest.reason) for manifest in committed(Path("ckpt"))]


def samples() -> dict[str, float]:
    (journal,) = find_journals("wandb")
    with JournalReader.open(journal) as reader:
        records = [record for record in reader.read() if record.kind == Kind.STATS]
    return {name: value for record in records for name, value in record.data.items() if name.startswith("wbdist.preemption")}


def test_notice_with_time_is_a_save_and_its_facts_are_kept(marked: list[bool]) -> None:
    """Proves the ordinary case: marked, saved after the step, 75; lead, stop, save and spare seconds are in the run; the next
    life goes on from there."""
    with pytest.raises(Preempted) as left:
        train(3, told(100.0))
    assert left.value.code == 75
    assert saved() == [(4, "preemption")]
    assert marked == [True]
    facts = samples()
    assert set(facts) == {f"wbdist.preemption.{name}_s" for name in ("lead", "stop", "save", "spare")}
    assert 0 < facts["wbdist.preemption.spare_s"] < facts["wbdist.preemption.lead_s"] <= 100
    assert train(-1, told()) == 10


def test_notice_too_late_leaves_the_last_checkpoint(marked: list[bool]) -> None:
    """Proves that nothing is begun that cannot be committed: the run is marked, the older checkpoint stands, 75; and that
    without any checkpoint the exit code says so."""

    def late(job: Any) -> None:
        until(lambda: saved()[0][0] == 6, "the commit of step 6")
        told(1.0)(job)

    with pytest.raises(Preempted) as left:
        train(6, late, save_every=3)
    assert (left.value.code, saved()[0]) == (75, (6, "interval"))
    assert "does not fit" in left.value.reason
    assert "the checkpoint of step 6 stands" in left.value.reason
    assert marked == [True]
    Path("ckpt").rename("away")
    with pytest.raises(Preempted) as left:
        train(2, told(1.0))
    assert (left.value.code, saved()) == (143, [])
    assert "no checkpoint to go on from" in left.value.reason


def test_cancelled_job_saves_and_is_not_started_again(marked: list[bool]) -> None:
    """Proves that a person's cancellation is no preemption: saved, not marked, and not the code that asks for a requeue."""
    with pytest.raises(Preempted) as left:
        train(3, told(100.0, cancelled=True))
    assert (left.value.code, saved(), marked) == (143, [(4, "preemption")], [])


def test_advice_is_a_checkpoint_and_the_job_goes_on(marked: list[bool]) -> None:
    """Proves that advice makes one checkpoint at the next boundary, each time it is given, and that a notice after it stops."""
    assert train(2, told(advice=True)) == 10
    assert (3, "advice") in saved()
    assert marked == []
    Path("ckpt").rename("first")

    def act(job: Any) -> None:
        if job.step == 6:
            told(100.0)(job)
        elif job.step in {2, 4}:
            told(advice=True)(job)

    with pytest.raises(Preempted):
        train(None, act)
    assert saved() == [(7, "preemption"), (5, "advice")]


def test_evaluation_is_left_early(marked: list[bool]) -> None:
    """Proves should_stop: within a step the evaluation ends, and the boundary saves; after the loop, leaving the job does."""
    seen: list[int] = []

    def evaluate(job: Any) -> None:
        for batch in range(100):
            if job.should_stop():
                return
            assert job.notice is None
            seen.append(batch)
            if batch == 4:
                told(100.0)(job)
                assert job.notice.reason == "the machine goes"

    with pytest.raises(Preempted):
        train(3, evaluate)
    assert seen == list(range(5))
    assert saved() == [(4, "preemption")]
    with pytest.raises(Preempted) as left, wbdist.job(project="p", checkpoint_dir="ckpt", notices="off") as job:
        loader = job.loader(TensorDataset(torch.arange(40, dtype=torch.float32)), batch_size=4)
        job.track(net=nn.Linear(1, 1), data=loader)
        for _ in job.steps(loader, epochs=1):
            pass
        evaluate(job)
    assert left.value.code == 75
    assert seen == [*range(5), *range(5)]
    assert marked == [True, True]


def test_azure_is_told_to_go_ahead_after_the_commit() -> None:
    """Proves that an event is approved once, and only with the checkpoint committed and the run finished."""
    at_approval: list[list[tuple[int, str]]] = []

    class Watching(AzureMetadata):
        def _approve(self, request: Request) -> Answer:
            at_approval.append(saved())
            return super()._approve(request)

    with Watching() as service, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WBDIST_AZURE_METADATA", service.url)

        def act(job: Any) -> None:
            service.schedule("Preempt", 100)
            until(lambda: job.notice, "the notice")

        with pytest.raises(Preempted) as left:
            train(3, act, notices="azure")
        assert left.value.code == 75
        assert at_approval == [[(4, "preemption")]]
