"""A script that a sweep's agent started: its parameters, its run's id and its sweep, by the environment and a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import wbdist
from wbdist.distributed.pool_runs import Runs
from wbdist.run import machine
from wbdist.settings import resolve


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`started(run_id, parameters)` sets what W&B's agent sets, with a file as it writes it."""

    def start(run_id: str, parameters: dict[str, Any], sweep: str = "sw1") -> Path:
        path = tmp_path / "wandb" / f"sweep-{sweep}" / f"config-{run_id}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = {key: {"value": value} for key, value in parameters.items()}
        path.write_text("wandb_version: 1" + ("\n\n" + yaml.safe_dump(written) if written else ""))
        for name, value in (("RUN_ID", run_id), ("SWEEP_ID", sweep), ("SWEEP_PARAM_PATH", str(path.relative_to(tmp_path)))):
            monkeypatch.setenv(f"WANDB_{name}", value)
        return path

    return start


@pytest.mark.usefixtures("offline")
def test_parameters_win_and_stay(started: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that the sweep's parameters lie over the script's config, dicts key by key, whatever the script excludes, and that
    a script that sets them otherwise is told so, once a key, and goes on."""
    started("t1", {"lr": 0.5, "net": {"width": 16}, "wd": 1e-05})
    with wbdist.init(config={"lr": 1.0, "net": {"width": 8, "deep": False}, "seed": 3}, config_exclude_keys=["lr"]) as run:
        wanted = {"lr": 0.5, "net": {"width": 16, "deep": False}, "wd": 1e-05, "seed": 3}
        assert run.config.as_dict() == wanted
        capsys.readouterr()
        run.config.update({"lr": 9, "seed": 3})
        run.config.lr = 10
        run.config.net = {"width": 9}
        run.config.setdefaults({"lr": 2, "new": 1})
        assert run.config.as_dict() == {**wanted, "new": 1}
        lr, net = [line for line in capsys.readouterr().err.splitlines() if "sw1" in line]
        assert lr == 'wbdist: run t1: config key "lr" stays 0.5, as sweep sw1 decided; 9 is ignored'
        assert "{'width': 9} is ignored" in net
        with pytest.raises(wbdist.ConfigError, match="seed"):
            run.config.seed = 4
    assert (run.id, run.sweep_id, run.sweep_url) == ("t1", "sw1", None)


@pytest.mark.usefixtures("offline")
def test_what_the_agent_decides_is_not_the_scripts(
    started: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that a script with an id and project of its own does not put all trials into one run, or into another project than
    the sweep's, and is told so; what the agent does not say stays the script's."""
    started("t2", {})
    monkeypatch.setenv("WANDB_PROJECT", "sweeps")
    with wbdist.init(project="mine", entity="me", id="always", name="kept", settings={"quiet": True}) as run:
        assert (run.id, run.name, run.path) == ("t2", "kept", "me/sweeps/t2")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "agent" in line]
    assert line == "wbdist: a trial of sweep sw1 is what its agent says: project='mine', id='always' ignored"
    for number in ("RANK", "SLURM_PROCID"):
        environment = {number: "1", "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "t"}
        assert resolve(None, {"run_id": "mine"}, environment, as_trial=True).run_id == "t"
    assert capsys.readouterr().err == "", "rank 0 says it for all"
    assert wbdist.Api(overrides={"project": "other"}).settings.project == "other", "who reads is no trial"


@pytest.mark.usefixtures("offline")
def test_a_disabled_run_has_them_too(started: Any) -> None:
    """Proves that a trial tried out without tracking trains with its parameters."""
    started("t1", {"lr": 0.5})
    with wbdist.init(mode="disabled", config={"lr": 1.0}) as run:
        run.config.lr = 3
        assert run.config.lr == 0.5


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("init", [None, {"project": "p", "config": {"lr": 1.0}}])
def test_a_pools_own_runs_are_not_counted(started: Any, init: Any) -> None:
    """Proves that tasks of a trial train with its parameters, in runs that the sweep does not take for trials."""
    started("t1", {"lr": 0.5})
    with wbdist.init(project="p") as run:
        spec = Runs("task", None if init else run, init).plan.spec
    assert spec is not None
    assert (spec.sweep, spec.config["lr"], spec.locked) == ("", 0.5, {"lr": 0.5})


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "No such file"), ("lr: [1", "while parsing"), ("- 1", "must hold a mapping"), ("1: 2", "names as keys")],
)
def test_a_file_that_cannot_be_is_said(started: Any, text: str | None, problem: str, tmp_path: Path) -> None:
    """Proves that a trial without its parameters does not train with others, and that the error says whose file it is, where a
    relative path was looked for, and what to do."""
    path = started("t1", {})
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(wbdist.UsageError, match="WANDB_SWEEP_PARAM_PATH") as refused:
        wbdist.init()
    assert problem in str(refused.value)
    assert f"looked for in {tmp_path}" in str(refused.value)
    assert wbdist.run is None


@pytest.mark.usefixtures("offline")
def test_an_agent_in_a_notebook_begins_the_next_trial(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that where `init` returns the run that is open, as in notebooks, a trial never logs into the run of the one before
    and gets its own again, and that a run beside it may have an id of its own and is not the sweep's."""
    monkeypatch.setattr(machine, "in_notebook", lambda: True)
    runs = []
    for trial, lr in (("t1", 0.1), ("t2", 0.2)):
        started(trial, {"lr": lr})
        runs.append(wbdist.init(project="p", settings={"silent": True}))
        assert wbdist.init() is runs[-1]
        assert wbdist.config.lr == lr
    assert [(run.id, run.finished) for run in runs] == [("t1", True), ("t2", False)]
    with wbdist.init(id="eval", reinit="create_new", config={"lr": 7}, settings={"silent": True}) as beside:
        assert (beside.id, beside.sweep_id, beside.config.lr) == ("eval", None, 7)
    runs[-1].finish()


@pytest.mark.usefixtures("offline")
def test_a_sweeps_id_that_cannot_be_is_said() -> None:
    """Proves that an id with white space around it, which no sweep has, is refused before anything is opened."""
    with pytest.raises(wbdist.UsageError, match="white space"):
        wbdist.init(settings={"sweep_id": " a "})


def test_the_server_knows_whose_trial_it_is(started: Any, embedded: Path, script: Any) -> None:
    """Proves that a run is found by its sweep, at once and when it is synced later; that the run which the agent's server has
    reserved for the trial is no obstacle; and that a second one in the same process does not take its place."""
    del embedded
    api = wbdist.Api()
    api.create_run(run_id="t1", project="p", state="pending")
    started("t1", {"lr": 0.5})
    with wbdist.init(project="p", config={"lr": 1.0}) as run:
        assert [found.id for found in api.runs("p", filters={"sweep": "sw1"})] == ["t1"]
        run.log({"loss": 1.0})
    with pytest.raises(wbdist.UsageError, match="'t1' exists already"):
        wbdist.init(project="p")
    started("t2", {"lr": 0.25})
    with wbdist.init(project="p", mode="offline") as later:
        later.log({"loss": 2.0})
    done = script("from wbdist.cli import main; main()", "sync", later.sync_dir)
    assert done.returncode == 0, done.stderr
    runs = {run.id: run for run in api.runs("p", filters={"sweep": "sw1"})}
    assert {name: (run.sweep_name, run.config["lr"], run.lastHistoryStep) for name, run in runs.items()} == {
        "t1": ("sw1", 0.5, 0),
        "t2": ("sw1", 0.25, 0),
    }


TRAIN = """
    import os, sys, wbdist
    with wbdist.init(project="p", settings={"console": "off"}) as run:
        for step in range(int(sys.argv[1])):
            run.log({"lr": run.config.lr, "life": int(sys.argv[2])})
        if sys.argv[2] != "3":
            run.flush(30)
            os._exit(1)
"""


@pytest.mark.parametrize("mode", [pytest.param("online", marks=pytest.mark.slow), "offline"])
def test_a_trial_that_is_handed_out_again_begins_anew(started: Any, embedded: Path, script: Any, mode: str) -> None:
    """Proves W&B's rule for a trial that saved nothing: in the same run from step 0. What it had logged, or that it died before
    its first row, is in the archive, also where no server tells of it."""
    started("t1", {"lr": 0.5})
    for life, rows in enumerate((5, 0, 3), 1):
        done = script(TRAIN, str(rows), str(life), WBDIST_MODE=mode)
        assert done.returncode == (0 if life == 3 else 1), done.stderr
        assert ("what was logged is archived" in done.stderr) == (life > 1), done.stderr
    if mode == "offline":
        done = script("from wbdist.cli import main; main()", "sync", WBDIST_MODE="online")
        assert done.returncode == 0, done.stderr
    run = wbdist.Api().run("p/t1")
    assert [(row["_step"], row["life"]) for row in run.scan_history()] == [(0, 3), (1, 3), (2, 3)]
    assert (run.state, run.sweep_name) == ("finished", "sw1")
    assert [(one.attempt, one.rows) for one in run.attempts()] == [(1, 5), (2, 0), (3, 3)]
    del embedded
