"""Acceptance of seed S2, resuming: one test a row, read back through the API. Two directories are two machines here."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from support.seeding import Seeds, shown
from support.waiting import until

import wbdist as wandb
from wbdist.errors import FencedError
from wbdist.run import stopping

EPOCHS = """
import os, signal
import wandb
run = wandb.init(resume=True, notes={notes!r})
print("AT", run.id, run.resumed, wandb.run.step, flush=True)
for epoch in range(wandb.run.step, {until}):
    wandb.log({{"loss": 1 / (epoch + 1), "epoch": epoch}})
{end}
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def run_epochs(seeds: Seeds, folder: Path, project: str, until: int, end: str = "", notes: str | None = None) -> list[str]:
    """What the script said of where it begins: id, resumed, step."""
    process = seeds.start("wbdist", EPOCHS.format(until=until, end=end, notes=notes), folder, WANDB_PROJECT=project)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if end == KILL else 0), said
    return said.split("AT ")[1].split()[:3]


def test_resume_true_and_the_keras_idiom(seeds: Seeds, here: Path, project: str) -> None:
    """Proves that `initial_epoch=wandb.run.step` is right before anything is logged: a script killed after 50 epochs and again
    after 70 goes on where it stood; the API has one run with every epoch once. The file of the id is there until success."""
    file = here / "wandb" / "wandb-resume.json"
    run_id, resumed, step = run_epochs(seeds, here, project, 50, KILL)
    assert (resumed, step, json.loads(file.read_text())["run_id"]) == ("False", "0", run_id)
    assert run_epochs(seeds, here, project, 70, KILL) == [run_id, "True", "50"]
    assert run_epochs(seeds, here, project, 100) == [run_id, "True", "70"]
    assert not file.exists()
    (run,) = wandb.Api().runs(f"local/{project}")
    assert (run.id, run.state) == (run_id, "finished")
    assert shown(f"{project}/{run_id}", "epoch") == [(i, i) for i in range(100)]


def test_another_directory_is_another_run(seeds: Seeds, here: Path, project: str) -> None:
    """Proves that `resume=True` finds nothing in another directory, and makes a run of its own there."""
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    first = run_epochs(seeds, here, project, 5, KILL)[0]
    run_id, resumed, step = run_epochs(seeds, elsewhere, project, 5)
    assert (run_id != first, resumed, step) == (True, "False", "0")
    assert len(wandb.Api().runs(f"local/{project}")) == 2


@pytest.mark.usefixtures("here")
def test_id_with_resume_must(project: str) -> None:
    """Proves both branches of `must`: an existing run goes on, a missing one is an error that makes nothing."""
    with pytest.raises(wandb.UsageError, match="does not exist"):
        wandb.init(id="gone", resume="must")
    assert len(wandb.Api().runs(f"local/{project}")) == 0
    with wandb.init(id="mine") as run:
        run.log({"epoch": 0})
    with wandb.init(id="mine", resume="must") as run:
        assert (run.resumed, run.step) == (True, 1)
        run.log({"epoch": 1})
    assert shown(f"{project}/mine", "epoch") == [(0, 0), (1, 1)]


@pytest.mark.usefixtures("here")
def test_resume_allow_never_and_by_id(project: str) -> None:
    """Proves `allow` for a new id and a known one, `never` for a known one, and `resume=<run id>`."""
    run_id = wandb.util.generate_id()
    for expected in (False, True):
        with wandb.init(id=run_id, resume="allow") as run:
            assert run.resumed == expected
            run.log({"epoch": run.step})
    with pytest.raises(wandb.UsageError, match="never"):
        wandb.init(id=run_id, resume="never")
    with wandb.init(resume=run_id) as run:
        assert (run.id, run.step, run.resumed) == (run_id, 2, True)
        run.log({"epoch": 2})
    assert shown(f"{project}/{run_id}", "epoch") == [(i, i) for i in range(3)]


@pytest.mark.usefixtures("here")
def test_by_environment_alone(project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves WANDB_RUN_ID with WANDB_RESUME, as a scheduler sets them."""
    monkeypatch.setenv("WANDB_RUN_ID", "by-env")
    monkeypatch.setenv("WANDB_RESUME", "must")
    with pytest.raises(wandb.UsageError, match="does not exist"):
        wandb.init()
    monkeypatch.setenv("WANDB_RESUME", "allow")
    for step in range(3):
        with wandb.init() as run:
            assert (run.id, run.step) == ("by-env", step)
            run.log({"epoch": step})
    assert shown(f"{project}/by-env", "epoch") == [(i, i) for i in range(3)]


@pytest.mark.usefixtures("here")
def test_rules_of_ids(project: str) -> None:
    """Proves that 64 characters are the most, and that what is no word character becomes a dash, for resuming, too."""
    with pytest.raises(wandb.UsageError, match="64"):
        wandb.init(id="x" * 65)
    with wandb.init(id="a b/c") as run:
        run.log({"epoch": 0})
    with wandb.init(id="a b/c", resume="must") as run:
        run.log({"epoch": 1})
    with wandb.init(id="x" * 64) as longest:
        longest.log({"epoch": 0})
    assert {run.id for run in wandb.Api().runs(f"local/{project}")} == {"a-b-c", "x" * 64}
    assert shown(f"{project}/a-b-c", "epoch") == [(0, 0), (1, 1)]


@pytest.mark.usefixtures("here")
def test_notes_are_overwritten_when_given(seeds: Seeds, project: str) -> None:
    """Proves that a note made in the UI stays on resuming, and is replaced when init says another."""
    wandb.init(id="noted", notes="first").finish()
    seeds.read("wandb", f"(lambda r: [setattr(r, 'notes', 'in the UI'), r.update()])(api.run('local/{project}/noted'))")
    wandb.init(id="noted", resume="must").finish()
    assert wandb.Api().run(f"{project}/noted").notes == "in the UI"
    wandb.init(id="noted", resume="must", notes="second").finish()
    assert wandb.Api().run(f"{project}/noted").notes == "second"


def test_two_machines_with_one_id(
    seeds: Seeds, here: Path, project: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that rows of two writers of one id never interleave: the later one has the run, the earlier one is archived and
    told so while it runs."""
    monkeypatch.setattr(stopping, "INTERVAL", 0.05)
    monkeypatch.setenv("WANDB_SILENT", "false")
    run = wandb.init(id="shared")
    for i in range(5):
        run.log({"epoch": i, "of": "first"})
    assert run.flush(20)
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    source = """
import wandb
run = wandb.init(id="shared", resume="must")
for i in range(5, 10):
    run.log({"epoch": i, "of": "second"})
run.finish()
"""
    seeds.run("wbdist", source, elsewhere, WANDB_PROJECT=project)
    for i in range(5, 30):
        run.log({"epoch": i, "of": "zombie"})
    until(lambda: "what this one logs is kept in the archive" in capsys.readouterr().err, "the one that lost to be told")
    with pytest.raises(FencedError, match="attempt 2 of run shared has taken over"):
        run.finish()
    found = wandb.Api().run(f"{project}/shared")
    assert [(row["epoch"], row["of"]) for row in found.scan_history()] == [
        (i, "first" if i < 5 else "second") for i in range(10)
    ]
    archived = list(found.scan_history(attempt=1))
    assert [(row["epoch"], row["of"]) for row in archived] == [(i, "first" if i < 5 else "zombie") for i in range(30)]
    assert [attempt.rows for attempt in found.attempts()] == [30, 5]


@pytest.mark.parametrize(("ending", "code"), [("run.finish()", 69), ("with run: 1 / 0", 1), ("", 0)])
def test_how_a_script_ends_whose_run_another_one_has(seeds: Seeds, here: Path, project: str, ending: str, code: int) -> None:
    """Proves that it trains to its end, then says who has the run, and ends with 69: unless it has failed by itself, or leaves
    the finishing to the interpreter, which ends with the script's own code."""
    source = f"""
import wandb
run = wandb.init(id="shared")
run.log({{"epoch": 0}})
assert run.flush(20)
print("READY", flush=True)
input()
run.log({{"epoch": 1}})
{ending}
"""
    process = seeds.start("wbdist", source, here, WANDB_PROJECT=project, WANDB_SILENT="false")
    assert process.stdout is not None
    assert any("READY" in line for line in process.stdout)
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    seeds.run("wbdist", "import wandb\nwandb.init(id='shared', resume='must').finish()\n", elsewhere, WANDB_PROJECT=project)
    said, _ = process.communicate("\n", timeout=60)
    assert process.returncode == code, said
    assert "attempt 2 of run shared has taken over" in said
    assert "what this one logs is kept in the archive" in said
    assert ("Traceback" in said) == (code == 1)


@pytest.mark.usefixtures("here")
def test_history_over_three_segments(seeds: Seeds, project: str) -> None:
    """Proves that steps go on over segments that ended well, badly and by an exception, as W&B's client reads them."""
    with wandb.init(id="long") as run:
        for i in range(10):
            run.log({"epoch": i})
    for first, code in ((10, 1), (20, 0)):
        run = wandb.init(id="long", resume="must")
        for i in range(first, first + 10):
            run.log({"epoch": i}, step=i)
        run.finish(code)
    (found,) = seeds.runs("wandb", project)
    assert [(row["_step"], row["epoch"]) for row in found["rows"]] == [(i, i) for i in range(30)]
    assert found["state"] == "finished"
