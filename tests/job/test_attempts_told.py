"""What a person is told about the lives of a job: on the terminal, by `wbdist attempts`, in the read API."""

from __future__ import annotations

import json
import re
import signal

import pytest
from support.jobs import Jobs, the_run
from support.serving import Server
from support.waiting import until

import wbdist


@pytest.mark.slow
def test_attempts_are_told(server: Server, jobs: Jobs) -> None:
    """Proves that after a preemption and a kill the table names each attempt's begin, end and loss, the JSON has the same, and
    the archived rows can be read under the attempt's own name."""
    job = jobs.start(
        "--name", "told", "--checkpoint-dir", "ckpt", "--step-seconds", "0.1", launch_args=("--on-preempt", "relaunch")
    )
    until(lambda: (run := the_run("told")) and run.lastHistoryStep >= 6, "7 steps")
    job.process.send_signal(signal.SIGTERM)
    until(lambda: len(the_run("told").attempts()) == 2, "the second attempt")
    at = the_run("told").lastHistoryStep + 1
    until(lambda: the_run("told").lastHistoryStep + 1 >= at + 7, "7 more steps")
    job.ranks()[1].kill()
    assert job.wait() == 0, job.output()

    run = the_run("told")
    path = "/".join(run.path)
    first, second, third = run.attempts()
    assert (first.began, first.ended) == ("first start", "preempted")
    assert (second.began, second.ended) == ("preempted by SIGTERM, state saved", "failed (70)")
    assert (third.began, third.ended) == ("rank 1 was killed by SIGKILL", "finished")
    assert (first.rows_archived, third.rows_archived) == (0, 0)
    assert (first.lost_seconds, third.lost_seconds) == (0.0, 0.0)
    assert 0 < second.rows_archived < second.rows
    assert second.ended_at is not None
    assert 0 < second.lost_seconds < second.ended_at - second.started_at

    shown = jobs.command("attempts", path)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert re.split(r"  +", lines[0]) == ["#", "began", "why", "took", "ended", "from step", "rows", "archived", "lost"]
    assert len({line.index(word) for line, word in zip(lines, ("ended", "preempted", "failed", "finished"), strict=False)}) == 1
    assert f"3 attempts, {second.lost_seconds:.1f} s of training done in vain, {second.rows_archived} rows archived" in lines[5]
    assert max(map(len, lines)) < 140

    told = json.loads(jobs.command("attempts", path, "--json").stdout)
    assert [one["rows_live"] for one in told] == [first.rows, second.rows_live, third.rows]
    assert told[1]["path"] == f"{path}:2"
    seen = wbdist.Api().run(told[1]["path"])
    assert [row["_step"] for row in seen.scan_history()] == list(range(first.rows + second.rows))
    assert jobs.command("attempts", f"{path}:2").stdout == shown.stdout

    missing = jobs.command("attempts", "tiny/nosuchrun")
    assert (missing.returncode, missing.stdout) == (70, "")
    assert "could not find run local/tiny/nosuchrun" in missing.stderr
