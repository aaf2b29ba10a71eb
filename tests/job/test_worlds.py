"""One job by four ranks, then two, then three: whole worlds are killed, the next one is of another size."""

from __future__ import annotations

import json

import pytest
from support.jobs import Jobs, the_run
from support.serving import Server
from support.waiting import until

from wbdist.checkpoint.manifest import committed


@pytest.mark.slow
def test_four_two_three(server: Server, jobs: Jobs) -> None:
    """Each sample is used once an epoch, in the one global order; each step is in the history once. SIGKILL of all processes in
    the middle of an epoch, twice."""
    directory = jobs.cwd / "ckpt"
    arguments = ("--name", "tested", "--checkpoint-dir", "ckpt", "--save-every", "2 steps", "--samples", "96", "--epochs", "3")
    for nproc, steps in ((4, 4), (2, 8)):
        job = jobs.start(*arguments, "--step-seconds", "0.2", nproc=nproc)
        until(
            lambda world=nproc, least=steps: [m for m in committed(directory) if m.world_size == world and m.step >= least],
            f"step {steps} by {nproc} ranks",
        )
        job.end()
    assert committed(directory)[0].world_size == 2
    last = jobs.start(*arguments, nproc=3)
    assert last.wait() == 0, last.output()
    run = the_run("tested")
    rows = [row["_step"] for row in run.scan_history(keys=["_step", "loss", "_samples"])]
    assert rows == list(range(len(rows)))
    assert len(run.attempts()) == 3
    audit = jobs.command("audit", "--json", f"tiny/{run.id}")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    epochs = json.loads(audit.stdout)["epochs"]
    assert len(epochs) == 3
    for epoch in epochs:
        assert epoch["doubled"] == epoch["missing"] == epoch["to_come"] == 0
        # What three ranks cannot share at an epoch's end is left out, as `tail="drop"` says.
        assert epoch["once"] + epoch["left_out"] == epoch["length"] == 96
        assert epoch["left_out"] < 12
