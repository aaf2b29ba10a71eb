"""A machine is lost with its disk; the job goes on from the copies of its checkpoints on another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import Machine, the_run
from support.s3 import BUCKET, S3Server
from support.serving import Server
from support.waiting import until

import wbdist
from wbdist.checkpoint.copies import Copies
from wbdist.errors import CommError


@pytest.mark.slow
def test_the_disk_is_gone(
    server: Server, machines: Callable[[str], Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL and an empty disk: the same run goes on from the newest copy, each sample once, nothing doubled or missing."""
    s3 = S3Server(tmp_path / "s3")
    try:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/jobs/tiny"
        arguments = ("--name", "tested", "--checkpoint-dir", "ckpt", "--checkpoint-copy", url, "--epochs", "2")
        first = machines("first")
        job = first.jobs.start(*arguments, "--step-seconds", "0.05", how="python", nproc=1)
        until(lambda: [m for m in Copies(url).scan()[0] if m.step >= 10], f"the copy of step 10; {job.output()[-2000:]}")
        first.lose()
        second = machines("second")
        job = second.jobs.start(*arguments, how="python", nproc=1)
        assert job.wait() == 0, job.output()
        run = the_run("tested")
        assert [row["_step"] for row in run.scan_history(keys=["_step", "loss"])] == list(range(40))
        assert len(run.attempts()) == 2
        assert run.attempts()[1].base_step >= 9
        audit = second.jobs.command("audit", f"tiny/{run.id}")
        assert audit.returncode == 0, audit.stdout
        assert Copies(url).scan()[0][0].step == 40
    finally:
        s3.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "nproc"), [("python", 1), ("launch", 2)])
def test_the_disk_is_gone_and_the_server_has_the_files(
    server: Server, machines: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch, how: str, nproc: int
) -> None:
    """The same with nothing but the run's own server: the id is all that the new machine is told."""
    monkeypatch.setenv("WANDB_RUN_ID", "lost1")
    arguments = ("--name", "tested", "--checkpoint-dir", "ckpt", "--checkpoint-copy", "run", "--epochs", "2")
    first = machines("first")
    job = first.jobs.start(*arguments, "--step-seconds", "0.1", how=how, nproc=nproc)
    until(
        lambda: any(int(name[5:].partition(".")[0]) >= 10 for name in kept_by_the_server()),
        f"step 10 on the server; {job.output()[-2000:]}",
    )
    first.lose()
    second = machines("second")
    job = second.jobs.start(*arguments, how=how, nproc=nproc)
    assert job.wait() == 0, job.output()
    assert "was fetched from the run's server" in job.output()
    run = the_run("tested")
    assert [row["_step"] for row in run.scan_history(keys=["_step", "loss"])] == list(range(40 // nproc))
    assert run.attempts()[1].base_step >= 9
    audit = second.jobs.command("audit", f"tiny/{run.id}")
    assert audit.returncode == 0, audit.stdout
    until(lambda: f"step-{40 // nproc}.a2" in kept_by_the_server(), "the last checkpoint on the server")


def kept_by_the_server() -> list[str]:
    """The checkpoints that the run has on the server."""
    found = []
    for number in range(20):
        try:
            found.append(wbdist.Api().artifact(f"tiny/checkpoint-lost1:v{number}").metadata["checkpoint"])
        except CommError:
            continue
    return found
