"""Two jobs of one run on different machines: one goes on, the other is told and stops for good."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.jobs import JobProcess, Machine, comparable, runs_of_job, the_run
from support.journals import read_all
from support.serving import Server
from support.waiting import until

from wbdist.checkpoint.claim import attempts as attempts_of
from wbdist.checkpoint.manifest import committed
from wbdist.run.journal import JournalReader, Kind, find_journals
from wbdist.server.store import open_store

STEPS = 40
ENDLESS = ("--epochs", "1000", "--step-seconds", "0.3")
"""However long the other job takes to start on a busy machine, this one still trains."""


def start(machine: Machine, name: str, directory: Path, *args: str, **options: Any) -> JobProcess:
    return machine.jobs.start("--name", name, "--checkpoint-dir", str(directory), *args, **options)


def steps_logged(machine: Machine, nonce: str) -> list[int]:
    """The steps in the run's journal of that incarnation: none when it was told to stop before its first."""
    for path in find_journals(machine.disk / "wandb"):
        with JournalReader.open(path) as reader:
            header = reader.header
        if header.nonce == nonce and header.role == "run":
            return [record.step for record in read_all(path) if record.kind is Kind.ROW and record.step is not None]
    raise AssertionError(f"no journal of {nonce} on {machine.disk}")


def history_starts(name: str, strategy: str, at: int) -> bool:
    return all(run is not None and run.lastHistoryStep + 1 >= at for run in runs_of_job(name, strategy))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["rank0", "per_rank"])
def test_a_job_that_is_taken_over_stops_and_saves_nothing_more(
    server: Server, machines: Any, tmp_path: Path, strategy: str
) -> None:
    """Proves that the old job, still training when a requeued one begins elsewhere, stops on all ranks by itself with 69,
    is not started again, commits nothing once it knows, and that its rows are kept and not shown."""
    a, b = machines("a"), machines("b")
    old = start(a, "tested", tmp_path / "ckpt", "--strategy", strategy, *ENDLESS)
    until(lambda: any(m.step == 5 for m in committed(tmp_path / "ckpt")), "a checkpoint")
    shutil.copytree(tmp_path / "ckpt", tmp_path / "elsewhere")
    until(lambda: history_starts("tested", strategy, 8), "rows beyond the checkpoint")
    new = start(b, "tested", tmp_path / "elsewhere", "--strategy", strategy)
    assert old.wait() == 69, old.output()
    said = old.output()
    assert "attempt 2 of run" in said
    assert "has taken over from attempt 1" in said
    assert said.count("starting tiny_job.py") == 1
    assert "Traceback" not in said
    assert old.family() == []
    assert len(attempts_of(tmp_path / "ckpt")) == 1
    assert new.wait() == 0, new.output()

    assert start(b, "reference", tmp_path / "reference-ckpt", "--strategy", strategy).wait() == 0
    for run, untouched in zip(runs_of_job("tested", strategy), runs_of_job("reference", strategy), strict=True):
        assert comparable(run) == comparable(untouched)
        assert run.state == "finished"
        first, second = run.attempts()
        assert first.rows_live == 5
        assert first.rows >= 8
        assert second.rows == second.rows_live == STEPS - 5


@pytest.mark.slow
def test_of_a_double_requeue_one_wins(server: Server, machines: Any, tmp_path: Path) -> None:
    """Proves that of two jobs which begin the very same attempt on different machines exactly one goes on, whichever it is;
    what the other logged is in the archive under its own name."""
    a, b = machines("a"), machines("b")
    before = start(a, "tested", tmp_path / "ckpt", "--step-seconds", "0.05")
    until(lambda: history_starts("tested", "rank0", 8), "8 steps")
    before.process.send_signal(signal.SIGTERM)
    assert before.wait() == 75
    at = committed(tmp_path / "ckpt")[0].step
    shutil.copytree(tmp_path / "ckpt", tmp_path / "elsewhere")
    directories = [tmp_path / "ckpt", tmp_path / "elsewhere"]
    pair = [start(m, "tested", d, "--step-seconds", "0.2") for m, d in zip((a, b), directories, strict=True)]
    codes = [job.wait() for job in pair]
    assert sorted(codes) == [0, 69], "\n".join(job.output() for job in pair)
    loser = codes.index(69)
    assert "another job holds attempt 2 of run" in pair[loser].output()
    assert pair[loser].output().count("starting tiny_job.py") == 1
    assert start(a, "reference", tmp_path / "reference-ckpt").wait() == 0
    run = the_run("tested")
    assert comparable(run) == comparable(the_run("reference"))
    assert [attempt.rows_live for attempt in run.attempts()] == [at, STEPS - at]
    until(lambda: not a.shippers() and not b.shippers(), "the shippers to have sent everything")

    nonces = [attempts_of(directory)[1].nonce for directory in directories]
    server.stop()
    store = open_store(f"sqlite:///{server.data_dir / 'wbdist.db'}")
    row = store.get_run("local", "tiny", run.id)
    assert row is not None
    kept = store.history(row.pk, attempt=2, nonce=nonces[loser])
    store.close()
    assert [line["_step"] for line in kept] == steps_logged((a, b)[loser], nonces[loser])


def test_a_plain_script_is_told_too(server: Server, machines: Any, tmp_path: Path) -> None:
    """Proves that without a launcher, too, the process says why it stops, once, and ends with 69."""
    a, b = machines("a"), machines("b")
    old = start(a, "tested", tmp_path / "ckpt", *ENDLESS, how="python", nproc=1)
    until(lambda: any(m.step == 5 for m in committed(tmp_path / "ckpt")), "a checkpoint")
    shutil.copytree(tmp_path / "ckpt", tmp_path / "elsewhere")
    assert start(b, "tested", tmp_path / "elsewhere", how="python", nproc=1).wait() == 0
    assert old.wait() == 69, old.output()
    assert old.output().count("this job must stop") == 1
    assert "Traceback" not in old.output()
