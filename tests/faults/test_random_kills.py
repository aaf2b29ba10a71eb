"""Kills at random, as many as wanted: history, order of samples, weights, states and processes tell nobody that there were any.

A failure names its seed and keeps everything; `hunt.py` plays the plan again, or looks for new failures.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.aftermath import verify
from support.plans import AIMS, TORCH_AIMS, Kind, make_plan
from support.trial import FAULTS, FaultError, Trial
from support.uninterrupted import References

QUICK = (9, 10)
"""Seeds: 2 ranks with one run, and with a run each; online, with a server that comes and goes."""


def play(
    seed: int, job: Kind, directory: Path, references: References, *, world_size: int | None = None, strategy: str | None = None
) -> int:
    """The number of kills; raises FaultError."""
    plan = make_plan(seed, job=job, world_size=world_size, strategy=strategy)
    with Trial(directory / f"{job}-{seed}", plan) as trial:
        trial.run()
        verify(trial, references.get(plan))
    return trial.kills


@pytest.mark.timeout(900)
def test_twenty_kills(tmp_path: Path, references: References) -> None:
    """Proves the promise on 20 kills or more of ranks, aggregator, shipper, server and launcher, alone and at once."""
    kills = sum(play(seed, "light", tmp_path, references) for seed in QUICK)
    for seed in itertools.count(500):
        if kills >= 20:
            break
        kills += play(seed, "light", tmp_path, references)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("job", "least"), [("torch", 60), ("light", 150)])
def test_hundreds_of_kills(tmp_path: Path, references: References, job: Kind, least: int) -> None:
    """The same, 210 kills or more: 1, 2 and 4 ranks, both strategies, offline, and online with a server that comes and goes."""
    kills = 0
    failures = []
    for seed in itertools.count(600):
        try:
            kills += play(seed, job, tmp_path, references)
        except FaultError as error:
            failures.append(str(error))
        if kills >= least or len(failures) >= 3:
            break
    assert not failures, "\n\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", ["rank0", "per_rank"])
def test_eight_ranks(tmp_path: Path, references: References, strategy: str) -> None:
    """The same with 8 ranks, 24 kills or more a strategy: any producer, or the aggregator, at any moment."""
    kills = 0
    for seed in itertools.count(800):
        if kills >= 24:
            break
        kills += play(seed, "light", tmp_path, references, world_size=8, strategy=strategy)


def test_every_aim_points_at_something() -> None:
    """Proves that the functions which plans aim at exist: a renamed one would silently never be hit. (Their source is read
    rather than imported: some would load torch.)"""
    for _, function, _ in AIMS + TORCH_AIMS:
        module, _, names = function.partition(":")
        if module == "os":
            assert hasattr(os, names)
            continue
        spec = importlib.util.find_spec(module)
        assert spec is not None, function
        assert spec.origin is not None
        body: list[ast.stmt] = ast.parse(Path(spec.origin).read_text()).body
        for name in names.split("."):
            found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
            assert found, f"{function}: there is no {name}"
            body = found[-1].body


@pytest.mark.parametrize(("after", "printed"), [(False, "1\n"), (True, "1\n2\n")])
def test_an_aim_hits_the_call_it_names_and_only_once(tmp_path: Path, after: bool, printed: str) -> None:
    """Proves the weapon: the process dies by SIGKILL around its second call; the next one lives."""
    aim = {"id": 0, "role": "rank", "function": "victim:step", "call": 2, "after": after}
    (tmp_path / "aims.json").write_text(json.dumps([aim]))
    (tmp_path / "victim.py").write_text("def step(number):\n    print(number, flush=True)\n")
    program = "import victim\nfor number in (1, 2, 3): victim.step(number)"
    environment = {"PYTHONPATH": f"{FAULTS / 'aims'}:{tmp_path}", "RANK": "0", "WBDIST_TRIAL_AIMS": str(tmp_path)}
    command = [sys.executable, "-c", program]
    first, second = (subprocess.run(command, env=environment, capture_output=True, text=True, check=False) for _ in range(2))
    assert (first.returncode, first.stdout) == (-9, printed)
    assert (second.returncode, second.stdout) == (0, "1\n2\n3\n")
