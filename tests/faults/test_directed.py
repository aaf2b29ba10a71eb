"""Faults that chance would seldom find: zombies, rivals, an absent server, a full disk, a supervisor's sudden death."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.aftermath import kept_journals, step_of, verify
from support.processes import kill
from support.trial import Trial
from support.uninterrupted import References

Make = Callable[..., Trial]


def start(trial: Trial) -> None:
    trial.server.start()
    trial.launch()


def finish(trial: Trial, references: References) -> None:
    """Lets the job run to its end, and judges it."""
    trial.finish()
    verify(trial, references.get(trial.plan))


@pytest.mark.slow
def test_an_aggregator_that_wakes_up_late_spoils_nothing(trial: Make, references: References) -> None:
    """Proves that an aggregator of the attempt before, stopped and woken up while the next attempt works, puts its rows into
    the archive only, and leaves."""
    job = trial()
    job.more = ["--save-every", "45 steps"]  # a save would wait for the stopped one
    start(job)
    job.until(lambda: job.reached(12), "step 12")
    (zombie,) = job.family().aggregators
    os.kill(zombie, signal.SIGSTOP)
    behind = max(map(step_of, _rows(job, attempt=1)), default=-1)
    job.until(lambda: job.reached(behind + 3) and job.reached(behind + 3, rank=1), "rows that it has not seen")
    for pid in job.family().ranks.values():
        kill(pid)
    job.until(lambda: job.reached(0, attempt=2), "the next attempt to log")
    os.kill(zombie, signal.SIGCONT)
    job.until(lambda: zombie not in job.family().aggregators, "the old aggregator to leave", 20.0)
    assert max(map(step_of, _rows(job, attempt=1))) > behind, "it wrote rows after it woke up"
    finish(job, references)


@pytest.mark.slow
def test_a_shipper_that_wakes_up_late_spoils_nothing(trial: Make, references: References) -> None:
    """Proves that a shipper stopped in one attempt and woken up in the next delivers both, each row once."""
    job = trial()
    start(job)
    job.until(lambda: job.reached(12), "step 12")
    (zombie,) = job.family().shippers
    os.kill(zombie, signal.SIGSTOP)
    for pid in job.family().ranks.values():
        kill(pid)
    job.until(lambda: job.reached(10, attempt=2), "the next attempt to log")
    os.kill(zombie, signal.SIGCONT)
    finish(job, references)


@pytest.mark.slow
def test_a_rank_that_wakes_up_late_is_fenced(trial: Make, references: References) -> None:
    """Proves that where file locks do not hold (another host, a network disk) a training process of the attempt before that
    wakes up is told so and leaves with 69: of its rows 0 are shown and all are in the archive, and it commits no checkpoint."""
    job = trial(job="torch", world_size=1)
    job.server.start()
    command = job.command()
    alone = [command[0], *command[command.index(str(job.script)) :]]
    old = subprocess.Popen(
        alone, cwd=job.directory, env=job.environment, stdout=(job.directory / "old.log").open("wb"), stderr=subprocess.STDOUT
    )
    try:
        job.until(lambda: job.reached(12), "step 12")
        os.kill(old.pid, signal.SIGSTOP)
        (job.checkpoints / ".lock").unlink()
        job.launch()
        job.until(lambda: job.reached(16, attempt=2), "the next attempt at work")
        os.kill(old.pid, signal.SIGCONT)
        assert old.wait(30) != 0
        told = (job.directory / "old.log").read_text()
        assert "attempt 2 has taken over" in told, told
        # An uncaught error is Python's 1; a supervisor is told 69, in the verdict.
        assert max(map(step_of, _rows(job, attempt=1))) > 12
    finally:
        kill(old.pid)
        old.wait(10)
    finish(job, references)


def _rows(job: Trial, attempt: int) -> list[tuple[tuple[str, str], ...]]:
    return [row for kept in kept_journals(job.directory) if kept.header.attempt == attempt for row in kept.rows]


def test_of_two_launchers_at_once_one_runs(trial: Make, references: References) -> None:
    """Proves that of a doubly started job exactly one runs, and that the other is told who does, and ends with 69."""
    job = trial(world_size=1)
    job.server.start()
    job.environment_extra["WBDIST_CLAIM_TIMEOUT"] = "2"
    first, second = job.start_command(), job.start_command()
    job.until(lambda: first.poll() is not None or second.poll() is not None, "one of them to give up", 60.0)
    lost, won = (first, second) if first.poll() is not None else (second, first)
    assert lost.returncode == 69, job.output()
    assert won.poll() is None
    assert "is in use by pid" in job.output()
    job.hurry()
    assert won.wait(60) == 0, job.output()
    assert len(list((job.checkpoints / "attempts").iterdir())) == 1
    verify(job, references.get(job.plan))


@pytest.mark.slow
@pytest.mark.parametrize("shipper", ["stays", "killed"])
def test_a_server_away_from_before_the_start_until_after_the_end(trial: Make, references: References, shipper: str) -> None:
    """Proves that a job which never saw its server, with two attempts in between, is all there once the server is back: by the
    shipper, or by `wbdist sync` when that was killed too."""
    job = trial()
    job.server.start()
    job.server.kill()
    job.launch()
    job.until(lambda: job.reached(12), "step 12")
    kill(job.family().ranks[1])
    job.finish()
    assert "training goes on" in job.output()
    if shipper == "killed":
        job.sync_needed = True
        for pid in job.family().shippers:
            kill(pid)
    job.server.start()
    verify(job, references.get(job.plan))


@pytest.mark.slow
def test_the_launchers_sudden_death_leaves_nobody_and_costs_nothing(trial: Make, references: References) -> None:
    """Proves that 5 s after a SIGKILL of the launcher no process of the job is left, and that the same command goes on."""
    job = trial()
    start(job)
    job.until(lambda: job.reached(12), "step 12")
    launcher = job.family().launcher
    assert launcher is not None
    kill(launcher)
    died = time.monotonic()
    while job.survivors():
        assert time.monotonic() - died < 5.0, job.survivors()
        time.sleep(0.05)
    finish(job, references)
    assert job.codes == [-signal.SIGKILL, 0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB where the trial will be."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = tmp_path / "trial"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_job_until_there_is_space(
    small_disk: Path, tmp_path: Path, trial: Make, references: References
) -> None:
    """Proves that a full disk under the journal ends the job with 70 and a message that says what is full and what is safe,
    also when it is started again on the full disk; and that with space it continues and nothing was lost."""
    job = trial(job="torch", world_size=1, mode="offline", steps=120, arguments=("--padding", "20000"))
    job.acks, job.max_restarts = tmp_path, 0
    job.more = ["--acks", str(tmp_path), "--checkpoint-dir", str(tmp_path / "ckpt")]
    first = job.start_command()
    job.until(lambda: job.reached(12), "step 12")
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert first.wait(60) == 70
    assert "no space is left on the disk for the journal" in job.output()
    assert "everything logged before it is safe" in job.output()
    told = job.output().count("DiskFullError: no space is left on the disk for the journal")
    second = job.start_command()
    assert second.wait(60) == 70
    assert job.output().count("DiskFullError: no space is left on the disk for the journal") > told, job.output()
    (small_disk / "filler").unlink()
    job.launch()
    finish(job, references)
