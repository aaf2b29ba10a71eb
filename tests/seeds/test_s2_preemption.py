"""Acceptance of seed S2's preemption, without the sweeps' queue: one test a row. Two seconds of silence are enough here."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lingering import kill_all, shippers_of
from support.seeding import CLIENTS, Client, Seeds, other
from support.waiting import until

import wbdist as wandb

SERVER_ARGUMENTS = ("--silence-timeout", "2")

LOST = """
import time
import wandb
for name in ("marked", "unmarked"):
    run = wandb.init(id=name, reinit="create_new")
    run.log({"a": 1})
    if name == "marked":
        run.mark_preempting()
print("READY", flush=True)
time.sleep(60)
"""
ENDS = """
import wandb
for code in (0, 3):
    run = wandb.init(id=f"code{code}")
    run.log({"a": 1})
    wandb.mark_preempting()
    run.finish(exit_code=code)
"""


@pytest.mark.usefixtures("here")
def test_mark_preempting_is_immediate() -> None:
    """Proves that the server knows when the call returns, ahead of ten thousand rows that are on their way."""
    run = wandb.init()
    for i in range(10_000):
        run.log({"i": i, **{f"metric{k}": i * k for k in range(10)}})
    assert run.mark_preempting(timeout=20)
    assert wandb.Api().run(run.path).state == "preempting"
    run.finish()
    found = wandb.Api().run(run.path)
    assert (found.state, found.lastHistoryStep) == ("finished", 9_999)


@pytest.mark.parametrize("client", CLIENTS)
def test_how_it_ends_decides(seeds: Seeds, client: Client) -> None:
    """Proves that a run marked with the documents' line and exiting with 0 is finished, and with another code preempted."""
    project = f"ends-{client}"
    seeds.run(client, ENDS, seeds.place(project), WANDB_PROJECT=project)
    found = dict(seeds.read(other(client), f"[[r.id, r.state] for r in api.runs('local/{project}')]"))
    assert found == {"code0": "finished", "code3": "preempted"}


def test_silent_death(seeds: Seeds, here: Path, project: str) -> None:
    """Proves that a machine that is lost with everything on it leaves a marked run preempted, and an unmarked one crashed."""
    process = seeds.start("wbdist", LOST, here, WANDB_PROJECT=project)
    assert process.stdout is not None
    assert any("READY" in line for line in process.stdout)

    def states() -> dict[str, str]:
        return {run.id: run.state for run in wandb.Api().runs(f"local/{project}")}

    until(lambda: states() == {"marked": "preempting", "unmarked": "running"}, "both runs to be known")
    kill_all(shippers_of(here / "wandb"))
    seeds.kill(process)
    until(lambda: states() == {"marked": "preempted", "unmarked": "crashed"}, "the silence to be noticed")
    with wandb.init(id="marked", resume="allow") as run:
        assert (run.resumed, run.step) == (True, 1)
        run.log({"a": 2})
    assert [row["a"] for row in wandb.Api().run(f"{project}/marked").scan_history()] == [1, 2]
    assert states()["marked"] == "finished"
