"""`wbdist chaos` with whole jobs, as a user rehearses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wbdist.checkpoint.manifest import committed

JOB = Path(__file__).parents[1] / "job" / "tiny_job.py"


def chaos(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_MODE": "offline"}
    return subprocess.run(
        [sys.executable, "-m", "wbdist", "chaos", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["aws", "gcp", "azure", "slurm", "kubernetes", "pbs", "lsf"])
def test_job_on_a_machine_that_is_taken_away(where: str, tmp_path: Path) -> None:
    """Proves the whole way: a supervised job of two ranks hears the provider's notice, both stop and save, exit code 75."""
    launch = [sys.executable, "-m", "wbdist", "launch", "--nproc", "2", str(JOB)]
    job = [*launch, "--checkpoint-dir", "ckpt", "--epochs", "100000", "--step-seconds", "0.01", "--save-every", "1000 steps"]
    ended = chaos(tmp_path, where, "--after", "12s", "--lead", "90s", "--", *job)
    assert ended.returncode == 75, ended.stderr[-3000:]
    assert "to spare (exit code 75)" in ended.stderr
    assert committed(tmp_path / "ckpt")[0].reason == "preemption"


@pytest.mark.slow
def test_cancelled_job_is_saved_and_not_to_be_started_again(tmp_path: Path) -> None:
    """Proves scancel from a job's view: saved, and not the exit code that asks for a requeue."""
    # A stop at a step that is saved anyway, as every fifth is by default, would be no other save.
    job = [sys.executable, str(JOB), "--nproc", "1", "--checkpoint-dir", "ckpt", "--epochs", "100000", "--step-seconds", "0.01"]
    job += ["--save-every", "1000 steps"]
    ended = chaos(tmp_path, "slurm", "--ending", "cancel", "--after", "12s", "--lead", "60s", "--", *job)
    assert ended.returncode == 143, ended.stderr[-3000:]
    assert committed(tmp_path / "ckpt")[0].reason == "preemption"


def test_machine_that_goes_takes_everything_along(tmp_path: Path) -> None:
    """Proves the end of a rehearsal: a command that ignores the signal, and its detached child, are killed at the deadline
    (137); one that leaves passes its exit code on."""
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True); "
        "open('child', 'w').write(str(child.pid)); time.sleep(300)"
    )
    ended = chaos(tmp_path, "signal", "--after", "1.5s", "--lead", "0.5s", "--", sys.executable, "-c", stubborn)
    assert ended.returncode == 137, ended.stderr
    assert "the machine is gone" in ended.stderr
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"
    obedient = "import signal, sys, time; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75)); time.sleep(300)"
    ended = chaos(tmp_path, "signal", "--signal", "USR2", "--after", "1.5s", "--", sys.executable, "-c", obedient)
    assert ended.returncode == 75, ended.stderr
    ended = chaos(tmp_path, "signal", "--after", "soon", "--", "true")
    assert ended.returncode == 2
    assert "no duration" in ended.stderr
