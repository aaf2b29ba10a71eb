"""A checkpoint alone suffices to have the history up to it: server away, machine lost, everything killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.jobs import JobProcess, Machine, comparable, runs_of_job, the_run
from support.serving import Server
from support.waiting import until

from wbdist.checkpoint.history import is_history
from wbdist.checkpoint.manifest import committed


def steps_done(name: str, strategy: str) -> int:
    return min((run.lastHistoryStep + 1 if run else 0) for run in runs_of_job(name, strategy))


def newest(directory: Path) -> int:
    return max((manifest.step for manifest in committed(directory)), default=0)


def travelling(directory: Path) -> set[int]:
    """The attempts whose history is in the newest checkpoint."""
    found = committed(directory)
    return {int(name.split("/a")[1][:6]) for name in found[0].files if is_history(name)} if found else set()


def start(machine: Machine, name: str, directory: Path, *args: str, **options: Any) -> JobProcess:
    return machine.jobs.start("--name", name, "--checkpoint-dir", str(directory), *args, **options)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["rank0", "per_rank"])
def test_the_tail_survives_the_machine(server: Server, machines: Any, tmp_path: Path, strategy: str) -> None:
    """Proves that history which no server had is not lost with the machine: twice the server is away at the checkpoint,
    everything is killed, the disk is gone, and the job goes on elsewhere with the checkpoint directory alone."""
    ckpt, slowly = tmp_path / "ckpt", ("--strategy", strategy, "--step-seconds", "0.05")
    a = machines("a")
    start(a, "tested", ckpt, *slowly)
    until(lambda: steps_done("tested", strategy) >= 3, "3 steps")
    server.kill()
    until(lambda: travelling(ckpt) == {1}, "a checkpoint that takes the first attempt's history along")
    a.lose()

    b = machines("b")  # the server is still away, so the first attempt's tail must travel on
    second = start(b, "tested", ckpt, *slowly)
    until(lambda: travelling(ckpt) == {1, 2}, "a checkpoint that takes both attempts' history along", timeout=90)
    assert "has not acknowledged the history" in second.output()
    b.lose()

    server.start()
    c = machines("c")
    third = start(c, "tested", ckpt, "--strategy", strategy)
    assert third.wait() == 0, third.output()
    assert start(c, "reference", tmp_path / "reference-ckpt", "--strategy", strategy).wait() == 0
    for tested, untouched in zip(runs_of_job("tested", strategy), runs_of_job("reference", strategy), strict=True):
        assert comparable(tested) == comparable(untouched)
        assert tested.summary["weights"] == untouched.summary["weights"]
        assert [attempt.attempt for attempt in tested.attempts()] == [1, 2, 3]
        assert tested.state == "finished"


@pytest.mark.slow
def test_the_old_disk_coming_back_changes_nothing(server: Server, machines: Any, tmp_path: Path) -> None:
    """Proves that the original journals may arrive beside their copies: the same lines, and the rest goes to the archive."""
    ckpt, a = tmp_path / "ckpt", machines("a")
    start(a, "tested", ckpt, "--step-seconds", "0.05")
    until(lambda: steps_done("tested", "rank0") >= 3, "3 steps")
    server.kill()
    until(lambda: travelling(ckpt) == {1}, "a checkpoint that takes the history along")
    at = newest(ckpt)
    until(lambda: newest(ckpt) > at, "rows beyond it")
    a.end()
    shutil.rmtree(max((p for p in ckpt.glob("step-*.a1")), key=lambda p: int(p.name[5:-3])))  # so that rows are lost
    at = newest(ckpt)
    server.start()
    b = machines("b")
    second = start(b, "tested", ckpt)
    assert second.wait() == 0, second.output()
    before = comparable(the_run("tested"))

    done = b.jobs.command("sync", str(a.disk / "wandb"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(the_run("tested")) == before
    first, last = the_run("tested").attempts()
    assert first.rows > first.rows_live == at
    assert last.rows == last.rows_live == 40 - at
    assert first.end == "lost"


@pytest.mark.slow
def test_nothing_travels_that_the_server_has(server: Server, machines: Any, tmp_path: Path) -> None:
    """Proves that checkpoints stay as small as they were while the server answers."""
    a = machines("a")
    job = start(a, "tested", tmp_path / "ckpt")
    assert job.wait() == 0, job.output()
    kept = [name for manifest in committed(tmp_path / "ckpt") for name in manifest.files if is_history(name)]
    assert kept == []


@pytest.mark.slow
def test_an_offline_job_is_whole_in_its_checkpoints(
    server: Server, machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that an offline job moved from machine to machine by its checkpoint directory alone has its whole history where it
    ends: one sync there, and the server shows what an uninterrupted run shows."""
    ckpt = tmp_path / "ckpt"
    with monkeypatch.context() as offline:
        offline.setenv("WANDB_MODE", "offline")
        for number, until in enumerate((10, 25)):
            machine = machines(f"m{number}")
            start(machine, "tested", ckpt, "--step-seconds", "0.05")
            until(lambda until=until: newest(ckpt) >= until, f"the checkpoint of step {until}")
            machine.lose()
        last = machines("last")
        job = start(last, "tested", ckpt)
        assert job.wait() == 0, job.output()
    synced = last.jobs.command("sync", str(last.disk / "wandb"))
    assert synced.returncode == 0, synced.stdout + synced.stderr
    assert start(last, "reference", tmp_path / "reference-ckpt").wait() == 0
    assert comparable(the_run("tested")) == comparable(the_run("reference"))
    assert len(the_run("tested").attempts()) == 3
