"""In every interpreter of a trial: SIGKILLs this process around the n-th call of a function, as the trial's plan says.

Python imports a module of this name at start-up when it finds one; the trials put this directory on PYTHONPATH. Functions are
replaced when their module has been imported, so the product knows nothing of it and its processes run as always. Each aim
hits once in a trial: who creates its file `aim-<id>.hit` dies.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import itertools
import json
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def role_of(command: list[str]) -> str:
    """What this process is in a trial; '' for what is never aimed at."""
    words = set(command)
    if "wbdist.run.shipper" in words:
        return "shipper"
    if "wbdist.distributed.aggregator" in words:
        return "aggregator"
    if "RANK" in os.environ:
        return "rank"
    if {"wbdist", "server"} <= words:
        return "server"
    return "launcher" if {"wbdist", "launch"} <= words else ""


def armed(function: Any, aim: dict[str, Any], directory: Path) -> Any:
    """`function`, deadly."""
    calls = itertools.count(1)
    hit = directory / f"aim-{aim['id']}.hit"

    def die() -> None:
        try:
            descriptor = os.open(hit, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return
        told = f"{aim['role']} {os.getpid()} {'after' if aim['after'] else 'before'} call {aim['call']} of {aim['function']}"
        os.write(descriptor, told.encode())
        os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(function)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        mine = next(calls) == aim["call"]
        if mine and not aim["after"]:
            die()
        result = function(*args, **kwargs)
        if mine:
            die()
        return result

    return deadly


def arm(module: Any, aims: list[dict[str, Any]], directory: Path) -> None:
    for aim in aims:
        *owners, name = aim["function"].partition(":")[2].split(".")
        owner = module
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, armed(getattr(owner, name), aim, directory))


class ArmingFinder(importlib.abc.MetaPathFinder):
    """Arms modules right after they were executed."""

    def __init__(self, aims: dict[str, list[dict[str, Any]]], directory: Path) -> None:
        self._aims, self._directory = aims, directory

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        aims = self._aims.pop(name, None)
        if aims is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute, directory = spec.loader.exec_module, self._directory

        def exec_module(module: Any) -> None:
            execute(module)
            arm(module, aims, directory)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def main(directory: Path) -> None:
    by_module: dict[str, list[dict[str, Any]]] = {}
    role = role_of(sys.orig_argv)
    for aim in json.loads((directory / "aims.json").read_bytes()):
        if aim["role"] == role:
            by_module.setdefault(aim["function"].partition(":")[0], []).append(aim)
    for name in [name for name in by_module if name in sys.modules]:
        arm(sys.modules[name], by_module.pop(name), directory)
    if by_module:
        sys.meta_path.insert(0, ArmingFinder(by_module, directory))


if "WBDIST_TRIAL_AIMS" in os.environ:
    main(Path(os.environ["WBDIST_TRIAL_AIMS"]))
