"""The config's rules."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import wbdist
from wbdist.run.journal import Kind, Record

pytestmark = pytest.mark.usefixtures("offline")


@dataclass
class Optimizer:
    lr: float
    path: Path


def test_changing_a_value_needs_permission() -> None:
    """Proves ConfigError for a changed value, none for an equal one, and both ways to allow it."""
    run = wbdist.init(project="p", config={"lr": 0.1, "n": 1})
    run.config.lr = 0.1
    for change in (lambda: setattr(run.config, "lr", 0.2), lambda: run.config.update({"new": 1, "n": 1.0})):
        with pytest.raises(wbdist.ConfigError, match="allow_val_change"):
            change()
    assert run.config.as_dict() == {"lr": 0.1, "n": 1}  # all or nothing
    run.config.update({"lr": 0.2}, allow_val_change=True)
    assert run.config["lr"] == 0.2
    free = wbdist.init(project="p", config={"lr": 0.1}, allow_val_change=True)
    free.config.lr = 0.3
    assert free.config.lr == 0.3


def test_config_comes_in_many_forms() -> None:
    """Proves Namespaces, dataclasses, paths, dashes, include and exclude lists, and defaults that do not override."""
    args = argparse.Namespace(lr=0.1, where=Path("/x"))
    run = wbdist.init(project="p", config=args)
    run.config.update({"--batch-size": 3, "opt": Optimizer(0.5, Path("y"))})
    run.config.setdefaults({"lr": 9, "epochs": 2})
    assert run.config.as_dict() == {"lr": 0.1, "where": "/x", "batch-size": 3, "opt": {"lr": 0.5, "path": "y"}, "epochs": 2}
    assert "lr" in run.config
    assert run.config.get("nothing", 5) == 5
    with pytest.raises(AttributeError, match="it has: lr"):
        run.config.nothing  # noqa: B018
    chosen = wbdist.init(project="p", config={"a": 1, "b": 2}, config_exclude_keys=["a"])
    assert chosen.config.keys() == ["b"]
    chosen = wbdist.init(project="p", config={"a": 1, "b": 2}, config_include_keys=["a"])
    assert chosen.config.keys() == ["a"]


@pytest.mark.parametrize("bad", [{1: 2}, {"": 1}, "config.yaml", [1], 3])
def test_what_is_no_config_is_refused(bad: object) -> None:
    """Proves that other things than dicts and Namespaces, and keys that are no names, raise before a run is opened."""
    with pytest.raises(wbdist.UsageError):
        wbdist.init(project="p", config=bad)
    assert wbdist.run is None


def test_a_returned_dict_is_a_copy_and_changes_are_journaled(journals: Callable[[], list[list[Record]]]) -> None:
    """Proves that mutating what config gave out changes nothing unseen, and that every accepted change is in the journal."""
    run = wbdist.init(project="p", config={"net": {"width": 3}})
    run.config["net"]["width"] = 4
    assert run.config["net"] == {"width": 3}
    run.config["seed"] = 1
    run.finish()
    (records,) = journals()
    changes = [record.data["set"] for record in records if record.kind is Kind.CONFIG]
    assert changes[1:] == [{"net": {"width": 3}}, {"seed": 1}]


def test_a_change_inside_a_nested_value_is_told() -> None:
    """Proves that assigning into a nested dict changes nothing in the config and warns, while reading, copying and taking a
    copy apart are silent."""
    run = wbdist.init(project="p", config={"opt": {"name": "adam", "betas": {"one": 0.9}}}, settings={"quiet": True})
    with pytest.warns(UserWarning, match=r'config "opt.betas" was read as a copy: setting .one. in it'):
        run.config["opt"]["betas"]["one"] = 0.5
    assert run.config.opt == {"name": "adam", "betas": {"one": 0.9}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = run.config["opt"]
        assert taken.pop("name") == "adam"
        again = copy.deepcopy(run.config["opt"])
        again["name"] = "sgd"
        assert json.loads(json.dumps(pickle.loads(pickle.dumps(taken)))) == {"betas": {"one": 0.9}}
    assert run.config["opt"]["name"] == "adam"


def test_forms_of_a_config(tmp_path: Path) -> None:
    """Proves W&B's YAML form and a plain one, and objects like absl's FLAGS; and what is said of a file that is none."""
    given = tmp_path / "c.yaml"
    given.write_text("wandb_version: 1\nlr:\n  desc: rate\n  value: 0.1\nnet: {width: 3}\n")
    run = wbdist.init(project="p", mode="offline", config=str(given), settings={"quiet": True})
    assert run.config.as_dict() == {"lr": 0.1, "net": {"width": 3}}
    run.config.update(SimpleNamespace(flag_values_dict=lambda: {"seed": 3}))
    assert run.config.seed == 3
    for text, words in (("- 1\n", "mapping with names"), ("a: [", "cannot be read")):
        given.write_text(text)
        with pytest.raises(wbdist.UsageError, match=words):
            run.config.update(given)
    with pytest.raises(wbdist.UsageError, match="cannot be read"):
        run.config.update("missing.yaml")
