"""A notice while a rank waits for data: real loaders with a worker that has none, real ranks under the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import until

from wbdist.checkpoint import manifest

RANK = Path(__file__).with_name("data_wait_rank.py")
BATCH = 2
PER_EPOCH = 8
"""Samples that a rank gets."""


def start(work: Path, blocked: int = 1, first: int = 0, grace: int = 100) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "wbdist", "launch", "--nproc", "2", "--grace", str(grace), "--max-restarts", "0"]
    return subprocess.Popen(
        [*launch, str(RANK), str(work), str(blocked), str(first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "WANDB_SILENT": "true"},
    )


def stopped(work: Path, blocked: int, first: int) -> None:
    """A job whose rank `blocked` gets no data after `first` samples is told to stop: all ranks leave with 75 after the step for
    which that rank still had a batch, and this step is saved."""
    last = first // BATCH
    job = start(work, blocked, first)
    in_collective = work / f"in-step-{last}.{1 - blocked}"
    try:
        for sign in [work / "blocked", in_collective] if last else [work / "blocked"]:
            until(lambda sign=sign: sign.exists() or job.poll() is not None, f"{sign.name}", 100)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=115)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 75, output
    assert "did not leave in time" not in output
    assert [found.step for found in manifest.committed(work / "ckpt")] == [last], output
    if last:
        assert [(work / f"steps.{rank}").read_text() for rank in range(2)] == [str(last)] * 2


def test_ranks_stop_together_while_one_has_no_data(tmp_path: Path) -> None:
    """Proves, with rank 1's worker stuck on the first sample of an epoch and rank 0 in the collective of the step before it,
    that a notice ends both after that step, with its checkpoint and 75, although the data never comes."""
    stopped(tmp_path, 1, PER_EPOCH)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("blocked", "first"), [(0, PER_EPOCH + 2 * BATCH), (1, 0)])
def test_the_next_attempt_ends_as_if_nothing_had_been(tmp_path: Path, blocked: int, first: int) -> None:
    """Proves the same for rank 0, in the middle of an epoch, and for a rank that never got any data; and that the attempt
    after it, which has data, ends with the weights of a job that was never interrupted."""
    whole = tmp_path / "whole"
    for work in (whole, tmp_path):
        work.mkdir(exist_ok=True)
        (whole / "gate").touch()
    assert start(whole).wait(100) == 0
    stopped(tmp_path, blocked, first)
    (tmp_path / "gate").touch()
    assert start(tmp_path).wait(100) == 0
    for rank in range(2):
        assert (tmp_path / f"weights.{rank}").read_text() == (whole / f"weights.{rank}").read_text()
