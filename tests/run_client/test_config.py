"""The config's rules."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
