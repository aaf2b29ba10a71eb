"""Real jobs that are preempted, killed and started again, with a stopwatch beside them."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from support.jobs import Jobs, the_run
from support.journals import records_of
from support.serving import Server
from support.waiting import until

from wbdist.core.goodput import PHASES, goodput
from wbdist.errors import JournalCorruptError
from wbdist.run.journal import JournalReader, Kind, find_journals
from wbdist.run.local_timeline import local_phases

TICK = 0.05
"""Seconds; the kernel tells in hundredths when a process was started."""


def has_left(root: Path) -> bool:
    """Whether rank 0 of the newest attempt has written its last mark."""
    feeds = sorted(
        (path for path in find_journals(root) if path.name.startswith("feed0.")), key=lambda path: path.stat().st_mtime
    )
    try:
        marks = [data["phase"] for data in records_of(feeds[-1], Kind.PHASE)]
    except (JournalCorruptError, IndexError):
        return False
    return marks[-1:] == ["end"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_phases_add_up_to_what_a_stopwatch_says(server: Server, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that over a preemption, a killed rank 0, and a kill of everything at once with a pause before the next start, the
    phases add up to the time between the first command and the end, as it is seen from outside; offline, and the same on a
    server to which the journals are brought."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    root, checkpoints = jobs.cwd / "wandb", jobs.cwd / "ckpt"
    arguments = ("--name", "watched", "--checkpoint-dir", "ckpt", "--step-seconds", "0.4")

    def saved(step: int) -> None:
        until(
            lambda: [path for path in checkpoints.glob("step-*.a?") if int(path.name[5:].partition(".")[0]) >= step],
            f"step {step}",
            180,
        )

    before = time.monotonic()
    job = jobs.start(*arguments, launch_args=("--on-preempt", "relaunch"))
    after = time.monotonic()
    saved(5)
    job.process.send_signal(signal.SIGTERM)
    saved(15)
    job.ranks()[0].kill()
    saved(25)
    job.end()
    killed = time.monotonic()
    time.sleep(3.0)  # nobody has started it again yet
    paused = time.monotonic() - killed
    job = jobs.start(*arguments)
    going = time.monotonic()
    while job.process.poll() is None and not (len(list(checkpoints.glob("attempts/*.json"))) == 4 and has_left(root)):
        going = time.monotonic()
        time.sleep(0.01)
    done = time.monotonic()
    assert job.wait() == 0, job.output()

    (run_id,) = {json.loads((checkpoints / "job.json").read_text())["run_id"]}
    phases = local_phases(root, "tiny", "", run_id)
    told = goodput(phases.values())
    assert told is not None
    assert (list(phases), told.attempts) == ([1, 2, 3, 4], 4)
    assert going - after - TICK <= told.seconds <= done - before + TICK, f"{phases}"
    assert phases[4]["down"] >= paused
    assert [phases[number]["lost"] > 0 for number in (1, 2, 3, 4)] == [False, True, True, False]
    assert min(phases[number][phase] for number in (2, 3, 4) for phase in ("down", "startup", "restore", "train", "save")) > 0
    assert f"wbdist: {told}" in job.output()

    assert jobs.command("sync", "--base-url", server.url, str(root)).returncode == 0
    attempts = the_run("watched").attempts()
    for attempt in attempts:
        assert attempt.phases == pytest.approx(phases[attempt.attempt], abs=1e-3), attempt.attempt
        assert list(PHASES) == list(attempt.phases)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["per_rank", "shared", "rank_zero_only"])
def test_each_run_has_one_timeline(server: Server, jobs: Jobs, strategy: str) -> None:
    """Proves that under every strategy a run has the marks of one process: its own rank's, or rank 0's."""
    job = jobs.start("--name", "job", "--checkpoint-dir", "ckpt", "--strategy", strategy)
    assert job.wait() == 0, job.output()
    import wbdist

    runs = list(wbdist.Api().runs("tiny"))
    assert len(runs) == (2 if strategy == "per_rank" else 1)
    for run in runs:
        (attempt,) = run.attempts()
        assert attempt.phases is not None
        assert min(attempt.phases[name] for name in ("startup", "train", "save", "stop")) > 0
        numbers = [mark["n"] for mark in marks_of(jobs.cwd / "wandb", run.id)]
        assert numbers == list(range(len(numbers))), "by one process, each once"


def marks_of(root: Path, run_id: str) -> list[dict[str, object]]:
    found = []
    for path in find_journals(root):
        with JournalReader.open(path) as reader:
            while reader.header.run_id == run_id and (records := reader.read()):
                found += [record.data for record in records if record.kind is Kind.PHASE]
    return found
