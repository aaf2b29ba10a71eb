"""Acceptance of seed S0, several runs in one process: one test a row, read back through the API."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.seeding import Seeds

import wbdist as wandb

pytestmark = pytest.mark.usefixtures("here")


def states(project: str) -> dict[str, str]:
    return {run.id: run.state for run in wandb.Api().runs(f"local/{project}")}


def test_create_new_keeps_others_alive(project: str) -> None:
    """Proves that a run made and finished beside another leaves it running, and that their rows do not mix."""
    a = wandb.init(reinit="create_new")
    a.log({"of": "a", "n": 0})
    b = wandb.init(reinit="create_new")
    b.log({"of": "b", "n": 0})
    b.finish()
    a.log({"of": "a", "n": 1})
    assert a.flush(20)
    assert states(project) == {a.id: "running", b.id: "finished"}
    a.log({"of": "a", "n": 2})
    a.finish()
    for run, rows in ((a, 3), (b, 1)):
        found = [(row["_step"], row["of"], row["n"]) for row in wandb.Api().run(run.path).scan_history()]
        assert found == [(n, "a" if run is a else "b", n) for n in range(rows)]


def test_wandb_run_is_not_switched() -> None:
    """Proves that `create_new` leaves `wandb.run` as it was, None or another run."""
    wandb.init(reinit="create_new")
    assert wandb.run is None
    first = wandb.init()
    wandb.init(reinit="create_new")
    assert wandb.run is first


def test_finish_previous_ends_all_active(project: str) -> None:
    """Proves that `finish_previous` finishes two `create_new` runs and the global one with exit code 0, on the server too."""
    before = [wandb.init(reinit="create_new"), wandb.init(reinit="create_new")]
    before.append(wandb.init(reinit="finish_previous", name="global"))
    before += [wandb.init(reinit="create_new"), wandb.init(reinit="create_new")]
    assert wandb.run is before[2]
    last = wandb.init(reinit="finish_previous")
    assert wandb.run is last
    assert states(project) == {**{run.id: "finished" for run in before}, last.id: "running"}
    assert {run.attempts()[0].exit_code for run in wandb.Api().runs(f"local/{project}")[0:5]} == {0}


def test_return_previous_makes_nothing(project: str, here: Path) -> None:
    """Proves identity with the newest open run, that the server has no further run, and the disk no further directory."""
    wandb.init()
    newest = wandb.init(reinit="create_new")
    directories = sorted((here / "wandb").iterdir())
    assert wandb.init(reinit="return_previous", name="ignored") is newest
    assert len(states(project)) == 2
    assert sorted((here / "wandb").iterdir()) == directories


@pytest.mark.parametrize("notebook", [False, True])
def test_defaults_per_environment(project: str, notebook: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the documents' defaults: a second init finishes the first in a script, and returns it in a notebook."""
    if notebook:
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))  # type: ignore[arg-type]
    first = wandb.init()
    second = wandb.init()
    assert (second is first) == notebook
    assert sorted(states(project).values()) == (["running"] if notebook else ["finished", "running"])


def test_explicit_finish_has_everything_on_the_server() -> None:
    """Proves that all rows, config and summary are in the API when `finish()` has returned."""
    run = wandb.init(config={"lr": 0.1})
    for i in range(1000):
        run.log({"i": i})
    run.summary["best"] = 7
    run.finish()
    found = wandb.Api().run(run.path)
    assert [row["i"] for row in found.scan_history()] == list(range(1000))
    assert (found.state, found.config, found.summary["best"]) == ("finished", {"lr": 0.1}, 7)


def test_integrations_with_create_new_are_told() -> None:
    """Proves that what logs to the global run, as trainers' integrations do, gets a clear error beside `create_new` runs."""

    def trainer() -> None:
        if wandb.run is None:
            wandb.config.update({"trainer": True})
        wandb.log({"loss": 1})

    run = wandb.init(reinit="create_new")
    with pytest.raises(wandb.UsageError, match=r"open only by reinit=\"create_new\".*run\.log"):
        wandb.log({"loss": 1})
    with pytest.raises(wandb.UsageError, match="create_new"):
        trainer()
    run.finish()
    with pytest.raises(wandb.UsageError, match=r"must call wbdist\.init\(\)"):
        wandb.log({"loss": 1})


def test_interleaved_logs_of_many_runs(seeds: Seeds, project: str) -> None:
    """Proves that 8 runs that 8 threads log to at once have each exactly its 1000 rows in order, as W&B's client reads them."""
    runs = [wandb.init(reinit="create_new", config={"k": k}) for k in range(8)]

    def work(turn: int) -> None:
        for i in range(turn, 1000 * 8, 8):
            runs[i % 8].log({"i": i // 8, "k": i % 8})

    # Thread `turn` logs to run `turn` only: rows of one run have an order to be held to.
    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        run.finish()
    found = seeds.runs("wandb", project)
    assert len(found) == 8
    for run in found:
        assert [(row["_step"], row["i"], row["k"]) for row in run["rows"]] == [(i, i, run["config"]["k"]) for i in range(1000)]
