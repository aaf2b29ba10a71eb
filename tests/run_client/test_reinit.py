"""Several runs in one process: reinit, the global run, and what init refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wbdist
from wbdist.run import lifecycle

pytestmark = pytest.mark.usefixtures("offline")


def test_create_new_leaves_the_global_run_alone() -> None:
    """Proves that create_new adds a run, never touches `wbdist.run`, and that runs do not mix."""
    lone = wbdist.init(project="p", reinit="create_new")
    assert wbdist.run is None
    first = wbdist.init(project="p", reinit="finish_previous")
    assert lone.finished
    assert wbdist.run is first
    second = wbdist.init(project="p", reinit="create_new")
    assert wbdist.run is first
    second.log({"b": 1})
    second.finish()
    wbdist.log({"a": 1})
    assert (dict(first.summary.items()), dict(second.summary.items())) == ({"a": 1}, {"b": 1})
    assert not first.finished


def test_finish_previous_is_the_default_and_ends_all() -> None:
    """Proves that in a script every open run, created anyhow, is finished with 0 before the new one is opened."""
    before = [wbdist.init(project="p", reinit="create_new") for _ in range(2)]
    before.append(wbdist.init(project="p", reinit="create_new"))
    last = wbdist.init(project="p")
    assert all(run.finished for run in before)
    assert wbdist.run is last
    assert lifecycle.active_runs() == [last]


def test_return_previous_returns_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves object identity, that ignored arguments are said, and that no extra directory appears."""
    wbdist.init(project="p", reinit="create_new")
    newest = wbdist.init(project="p", reinit="create_new")
    directories = sorted((tmp_path / "wandb").iterdir())
    assert wbdist.init(project="other", name="x", reinit="return_previous") is newest
    assert "ignored" in capsys.readouterr().err
    assert sorted((tmp_path / "wandb").iterdir()) == directories
    assert wbdist.run is None


@pytest.mark.parametrize("how", ["setup", "settings", "environment", "dict"])
def test_reinit_can_come_from_anywhere(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that `setup()`, `settings=` and WANDB_REINIT mean the same as the argument, and that the argument wins."""
    first = wbdist.init(project="p")
    settings: Any = None
    if how == "setup":
        wbdist.setup(wbdist.Settings(reinit="create_new"))
    elif how == "environment":
        monkeypatch.setenv("WANDB_REINIT", "create_new")
    else:
        settings = wbdist.Settings(reinit="create_new") if how == "settings" else {"reinit": "create_new"}
    wbdist.init(project="p", settings=settings)
    assert not first.finished
    assert wbdist.run is first
    wbdist.init(project="p", settings=settings, reinit="finish_previous")
    assert first.finished


def test_old_booleans_still_work() -> None:
    """Proves that `reinit=True` loops, as W&B's FAQ has them, give one finished run each."""
    with pytest.warns(DeprecationWarning, match="finish_previous"):
        run = wbdist.init(project="p", reinit=True)
    runs = [run]
    for i in range(3):
        runs.append(wbdist.init(project="p", reinit=True))
        wbdist.log({"metric": i})
    wbdist.finish()
    assert all(run.finished for run in runs)
    assert len({run.id for run in runs}) == 4


def test_parent_and_child_runs_nest() -> None:
    """Proves the documented nested `with` idiom under a process-wide create_new."""
    wbdist.setup(wbdist.Settings(reinit="create_new"))
    with wbdist.init(project="p") as parent:
        with wbdist.init(project="p") as run:
            run.log({"train_loss": 0.42})
        assert run.finished
        parent.log({"eval_loss": 0.27})
    assert parent.finished


def test_one_id_is_open_once() -> None:
    """Proves that an id in use in this process is refused; after finish the run goes on only when that is asked for."""
    run = wbdist.init(project="p", id="one", reinit="create_new")
    with pytest.raises(wbdist.UsageError, match="'one' is in use"):
        wbdist.init(project="p", id="one", reinit="create_new")
    run.finish()
    with pytest.raises(wbdist.UsageError, match="'one' exists already"):
        wbdist.init(project="p", id="one", reinit="create_new")
    wbdist.init(project="p", id="one", reinit="create_new", resume="must").finish()


def test_module_functions_need_init() -> None:
    """Proves that every module-level use before init (and after the global run ended) says what to call."""
    wbdist.init(project="p", config={"lr": 0.1}).finish()
    assert wbdist.run is None
    for use in (
        lambda: wbdist.log({"a": 1}),
        lambda: wbdist.config.lr,
        lambda: wbdist.config.update({"lr": 1}),
        lambda: wbdist.summary["a"],
        wbdist.mark_preempting,
    ):
        with pytest.raises(wbdist.UsageError, match=r"wbdist\.init\(\)"):
            use()
    wbdist.finish()


def test_the_modules_own_names_follow_the_global_run() -> None:
    """Proves that `wbdist.run`, `.config` and `.summary` are the global run's, though `wbdist.run` is a package too."""
    import wbdist.run.handle  # binds the package to the name, which must not win
    from wbdist.run.handle import Run

    run = wbdist.init(project="p", config={"lr": 0.1})
    assert isinstance(wbdist.run, Run)
    assert wbdist.config.lr == 0.1
    wbdist.log({"a": 1})
    assert wbdist.summary["a"] == 1
    wbdist.run.name = run.id
    assert wbdist.run.save() is True
    with pytest.raises(AttributeError, match="public names"):
        wbdist.nonsense  # noqa: B018


@pytest.mark.parametrize("argument", ["sync_tensorboard", "monitor_gym"])
def test_what_is_not_built_is_refused(argument: str) -> None:
    """Proves that arguments of W&B that this version does not have raise, and open no run."""
    with pytest.raises(wbdist.UsageError, match=f"{argument}=.*not built yet"):
        wbdist.init(project="p", **{argument: "x"})
    assert lifecycle.active_runs() == []
    wbdist.init(project="p", resume=False)


def test_disabled_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a disabled run takes every call, makes no file and prints nothing."""
    with wbdist.init(project="p", mode="disabled", config={"lr": 1}) as run:
        run.log({"a": 1})
        run.log({"n": {"b": 2}}, step=5)
        run.summary["c"] = 3
        run.commit_row()
        assert run.name == f"dummy-{run.id}"
        assert (run.disabled, run.flush(1), run.mark_preempting(), run.dir) == (True, True, True, "")
        assert run.summary["c"] == 3
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_start_method_is_taken_and_said_to_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that the FAQ's remedy `Settings(start_method="fork")` does not raise."""
    wbdist.init(project="p", settings=wbdist.Settings(start_method="fork"))
    assert "start_method" in capsys.readouterr().err


def test_offline_opens_no_socket(script: Callable[..., Any]) -> None:
    """Proves that an offline run keeps its rows and opens no socket and loads no HTTP library."""
    done = script(
        """
        import sys
        sys.addaudithook(lambda event, args: event.startswith("socket.") and sys.exit(f"socket used: {event}"))
        import wbdist
        run = wbdist.init(project="p", config={"epochs": 10})
        for i in range(100):
            wbdist.log({"accuracy": i})
        assert run.name is None and run.url is None
        wbdist.finish()
        assert "requests" not in sys.modules and "http.client" not in sys.modules
        """,
        WANDB_MODE="offline",
    )
    assert done.returncode == 0, done.stderr
    assert "wbdist sync" in done.stderr
