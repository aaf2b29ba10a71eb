"""`import wbdist as wandb`: W&B's names, each either real or refused by name."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wbdist as wandb
from wbdist.run import lifecycle

pytestmark = pytest.mark.usefixtures("offline")


def test_every_public_name_of_wandb_is_real_or_refused(script: Callable[..., Any]) -> None:
    """Proves that no name of W&B's module is silently nothing: it is there, or an AttributeError says what to use instead."""
    done = script(
        """
        import wandb
        print(*(name for name in {*wandb.__all__, *dir(wandb)} if not name.startswith("_")))
        """
    )
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split())
    assert len(names) > 60
    inner = {
        "agents", "analytics", "annotations", "data_types", "env", "helper", "jupyter", "patched", "proto", "termsetup",
        "trigger", "wandb", "wandb_agent", "wandb_lib", "wandb_sdk", "wandb_torch", "Config",
    }  # fmt: skip
    found = {name: _taken(name) for name in names - inner}
    refused = {name: error for name, error in found.items() if isinstance(error, AttributeError)}
    for name, error in refused.items():
        assert isinstance(error, wandb.UsageError), name
        assert f"wbdist has no `{name}`" in str(error)
    assert not {"init", "log", "finish", "save", "Api", "Settings", "login", "setup", "define_metric", "util"} & set(refused)
    with pytest.raises(AttributeError, match="out of scope"):
        wandb.keras  # noqa: B018
    with pytest.raises(AttributeError, match="public names are"):
        wandb.nonsense  # noqa: B018


def _taken(name: str) -> Any:
    try:
        return getattr(wandb, name)
    except AttributeError as error:
        return error


def test_generated_ids() -> None:
    """Proves that both of W&B's ways to an id give 8 characters of [a-z0-9], new ones after every `random.seed`."""
    made = set()
    for generate in (wandb.util.generate_id, wandb.sdk.lib.runid.generate_id) * 2:
        random.seed(1)
        made.add(generate())
    assert len(made) == 4
    assert all(re.fullmatch("[a-z0-9]{8}", run_id) for run_id in made)
    assert len(wandb.util.generate_id(32)) == 32


def test_errors_have_wandbs_family() -> None:
    """Proves that `except wandb.errors.CommError` and the like catch what they catch with W&B's SDK."""
    assert issubclass(wandb.errors.AuthenticationError, wandb.errors.CommError)
    assert issubclass(wandb.errors.UnsupportedError, wandb.errors.UsageError)
    for name in ("CommError", "UsageError", "AuthenticationError", "InitStartError", "Error"):
        assert issubclass(getattr(wandb.errors, name), wandb.Error)


def test_functions_of_the_module_are_the_global_runs() -> None:
    """Proves that a method of the run is a function of the module: it needs `init`, and then acts on the global run."""
    with pytest.raises(wandb.UsageError, match=r"wbdist\.init\(\) before wbdist\.save\(\)"):
        wandb.save()
    wandb.init(project="p")
    assert wandb.save() is True


def test_names_that_a_run_has_not() -> None:
    """Proves that a run refuses W&B's further names with what to do instead, and misspelt ones as any object does."""
    run = wandb.init(project="p")
    with pytest.raises(AttributeError, match=r"no `to_html`: open the page at `run\.url`"):
        run.to_html()
    with pytest.raises(AttributeError, match="no attribute 'lgo'"):
        run.lgo({"a": 1})
    assert (run.sweep_id, run.sweep_url, hasattr(run, "display")) == (None, None, False)


def test_teardown_ends_every_run() -> None:
    """Proves that `teardown` finishes the runs of the process and forgets `setup`."""
    wandb.setup(wandb.Settings(reinit="create_new"))
    runs = [wandb.init(project="p") for _ in range(3)]
    wandb.teardown()
    assert all(run.finished for run in runs)
    assert lifecycle.active_runs() == []
    assert wandb.init(project="p") is wandb.run


def test_terminal_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that termlog and its sisters print as our own lines do, once when asked, and not when silent."""
    wandb.termlog("one")
    for _ in range(2):
        wandb.termwarn("two", repeat=False)
    monkeypatch.setenv("WANDB_QUIET", "true")
    wandb.termlog("three")
    wandb.termerror("four", prefix=False)
    wandb.require("core")
    assert capsys.readouterr().err == "wbdist: one\nwbdist: two\nfour\n"


def test_login_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves that `login` says False where there is no key, and raises with W&B's `force`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb.login(host="http://wandb.example") is False
    with pytest.raises(wandb.AuthenticationError, match="wbdist login"):
        wandb.login(host="http://wandb.example", force=True)


def test_the_package_is_sent_by_name() -> None:
    """Proves that a function of a notebook, sent by value with the globals it uses, may use this package: it went by value."""
    import dill

    assert dill.loads(dill.dumps(wandb)) is wandb
