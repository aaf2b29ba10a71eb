"""Every signal to the launcher: right exit code, whole grace to the ranks, nothing left alive."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
from support.launching import Launch
from support.waiting import until

S = signal


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (S.SIGTERM, "SIGTERM"),
        (S.SIGINT, "SIGINT"),
        (S.SIGUSR2, "SIGUSR2"),
        (S.SIGHUP, "SIGTERM"),
        (S.SIGUSR1, "SIGTERM"),
    ],
)
def test_signal_reaches_every_rank_once_and_75_comes_back(launch: Launch, tmp_path: Path, sent: S.Signals, got: str) -> None:
    """Proves that ranks get the signal (or what a job can watch) once even when it is doubled, that their 75 is the launcher's,
    and that nothing is left."""
    job = launch("saves")
    job.pids()
    job.process.send_signal(sent)
    if sent != S.SIGINT:
        job.process.send_signal(sent)
    assert job.wait() == 75, job.output
    assert [(tmp_path / f"{rank}.0.got").read_text() for rank in range(2)] == [got, got]
    assert job.family() == []
    assert "run the same command to continue" in job.output


@pytest.mark.parametrize("mode", ["saves", "stubborn"])
def test_killed_launcher_leaves_nothing(launch: Launch, tmp_path: Path, mode: str) -> None:
    """Proves that after SIGKILL to the launcher ranks are asked first (a job saves), and that soon nothing is alive, not
    even ranks and helpers that ignore every signal."""
    job = launch(mode)
    job.pids()
    # The launcher, two ranks, a stubborn helper each; the sentinel has no environment.
    assert len(job.family()) == {"saves": 3, "stubborn": 5}[mode]
    job.process.kill()
    assert job.process.wait(60) == -S.SIGKILL
    until(lambda: job.family() == [], "everything to be gone", timeout=30)  # 3 s, and what a busy machine makes of them
    if mode == "saves":
        assert set((tmp_path / "0.0.got").read_text().split()) == {"SIGTERM"}


def test_launcher_and_sentinel_killed_together(launch: Launch) -> None:
    """Proves the second line of defence: without the sentinel too, ranks that do not ignore SIGTERM end with their parent."""
    job = launch("plain")
    job.pids()
    sentinel = next(p for p in psutil.Process(job.process.pid).children() if "sentinel" in " ".join(p.cmdline()))
    sentinel.kill()
    job.process.kill()
    job.process.wait(60)
    until(lambda: job.family() == [], "the ranks to be gone", timeout=60)


@pytest.mark.parametrize(("sent", "code"), [(S.SIGTERM, 143), (S.SIGINT, 130), (S.SIGUSR1, 138)])
def test_nothing_saved_is_said_by_the_code(launch: Launch, sent: S.Signals, code: int) -> None:
    """Proves that ranks without handlers end at once and silently, and that the code does not promise a checkpoint."""
    job = launch("plain")
    job.pids()
    began = time.monotonic()
    job.process.send_signal(sent)
    assert job.wait() == code, job.output
    assert time.monotonic() - began < 20  # the grace is 30
    assert "Traceback" not in job.output
    assert job.family() == []


def test_signal_while_the_ranks_start(launch: Launch) -> None:
    """Proves that Ctrl-C in the first milliseconds, before any script runs, is a clean stop as well."""
    for delay in (0.08, 0.14, 0.2):
        job = launch("plain", nproc=4)
        until(lambda: "starting" in job.output, "the launcher to be up")  # noqa: B023
        time.sleep(delay - 0.08)
        job.process.send_signal(S.SIGINT)
        assert job.wait() == 130, job.output
        assert "Traceback" not in job.output
        assert job.family() == []


def test_grace_is_the_ranks_own_and_then_over(launch: Launch) -> None:
    """Proves that ranks which do not leave have exactly the grace, and are then killed with their helpers."""
    job = launch("stubborn", options=("--grace", "1"))
    job.pids()
    began = time.monotonic()
    job.process.send_signal(S.SIGTERM)
    assert job.wait() == 143, job.output
    assert 1.0 <= time.monotonic() - began < 20
    assert "ranks 0, 1 did not leave in time" in job.output
    assert job.family() == []


def test_second_ctrl_c_kills_at_once(launch: Launch) -> None:
    """Proves that a person who insists does not wait for the grace."""
    job = launch("stubborn")
    job.pids()
    job.process.send_signal(S.SIGINT)
    until(lambda: "passed on" in job.output, "the first to be passed on")
    began = time.monotonic()
    job.process.send_signal(S.SIGINT)
    assert job.wait() == 130, job.output
    assert time.monotonic() - began < 20  # the grace is 30
    assert job.family() == []


def test_signal_between_two_attempts_ends_the_job(launch: Launch) -> None:
    """Proves that a stop during the pause before a restart is not lost and starts nothing more."""
    job = launch("codes", "1,1")
    until(lambda: "starting again in" in job.output, "the pause")
    job.process.send_signal(S.SIGTERM)
    assert job.wait() == 143, job.output
    assert job.output.count("starting rank_script.py") == 1


def test_nohup_is_respected(launch: Launch) -> None:
    """Proves that a launcher started with SIGHUP ignored keeps ignoring it."""
    job = launch("saves", preexec_fn=lambda: signal.signal(S.SIGHUP, S.SIG_IGN))
    job.pids()
    job.process.send_signal(S.SIGHUP)
    job.process.send_signal(S.SIGUSR2)
    assert job.wait() == 75
    assert "SIGHUP" not in job.output
