"""Acceptance of seed S1's question: the run is "crashed" in the UI, but still goes on here. A second of silence is enough."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from support.lingering import shippers_of
from support.seeding import Seeds
from support.waiting import until

import wbdist as wandb

SERVER_ARGUMENTS = ("--silence-timeout", "1")
pytestmark = pytest.mark.usefixtures("here")


def shipper_of(folder: Path) -> psutil.Process:
    """The one that is left: two may start at once, of which one sees the other's lock and leaves."""

    def alone() -> list[psutil.Process]:
        found = shippers_of(folder / "wandb")
        return found if len(found) == 1 else []

    return until(alone, "one shipper")[0]


def test_a_cut_connection_heals(here: Path) -> None:
    """Proves that a run whose sender stood still is `crashed`, and running and then finished once it goes on, each row once."""
    run = wandb.init()
    run.log({"i": 0})
    assert run.flush(20)
    shipper = shipper_of(here)
    shipper.send_signal(signal.SIGSTOP)
    try:
        until(lambda: wandb.Api().run(run.path).state == "crashed", "the run to be taken for dead")
        for i in range(1, 100):
            run.log({"i": i})
    finally:
        shipper.send_signal(signal.SIGCONT)
    until(lambda: wandb.Api().run(run.path).state == "running", "the run to be known alive")
    run.finish()
    found = wandb.Api().run(run.path)
    assert (found.state, [row["i"] for row in found.scan_history()]) == ("finished", list(range(100)))


def test_sync_of_an_online_directory_heals(seeds: Seeds, here: Path, project: str) -> None:
    """Proves that `sync` of an online run's directory, after the machine took writer and sender along, brings every row."""
    source = """
import os, signal, sys
import wandb
run = wandb.init(config={"lr": 0.1})
run.log({"i": 0})
assert run.flush(20)
print("READY", run.path, flush=True)
sys.stdin.read()
for i in range(1, 100):
    run.log({"i": i})
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = seeds.start("wbdist", source, here, WANDB_PROJECT=project)
    assert process.stdout is not None
    path = next(line for line in process.stdout if line.startswith("READY")).split()[1]
    shipper_of(here).kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    until(lambda: wandb.Api().run(path).state == "crashed", "the run to be taken for dead")
    assert [row["i"] for row in wandb.Api().run(path).scan_history()] == [0]
    (written,) = (here / "wandb").glob("run-*")
    for _ in range(2):
        done = seeds.command("wbdist", "sync", str(written), folder=here)
        assert done.returncode == 0, done.stdout
        found = wandb.Api().run(path)
        assert [row["i"] for row in found.scan_history()] == list(range(100))
        assert (found.state, found.config) == ("crashed", {"lr": 0.1})
