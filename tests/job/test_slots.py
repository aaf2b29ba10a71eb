"""Stable slots: which run a rank continues when the ranks are numbered anew."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.agents import Agents
from support.jobs import SCRIPT, JobProcess, Jobs
from support.journals import rows_of
from support.ports import free_port
from support.ranks import ThreadCoordinator, run_ranks
from support.serving import Server
from support.training import position

import wbdist
from wbdist.checkpoint.manifest import Manifest
from wbdist.errors import CheckpointError
from wbdist.job.plan import position_of
from wbdist.job.slots import FILE, Slot, assign, take
from wbdist.run.journal import JournalReader, find_journals


def test_who_stays_keeps_the_slot() -> None:
    """Proves 4 -> 3 -> 4: survivors are numbered anew and keep their slots, who comes takes the one that was left."""
    hosts = ["a/0", "b/0", "c/0", "d/0"]
    known = dict(enumerate(hosts))
    assert assign({}, hosts) == [0, 1, 2, 3]
    assert assign(known, ["a/0", "c/0", "d/0"]) == [0, 2, 3]
    assert assign(known, ["d/0", "c/0", "a/0"]) == [3, 2, 0], "however the launcher numbers them"
    assert assign(known, ["a/0", "c/0", "d/0", "e/0"]) == [0, 2, 3, 1]
    assert assign(known, ["w/0", "x/0", "y/0", "z/0"]) == [0, 1, 2, 3], "a requeue on other machines"
    assert assign(known, [*hosts, "e/0"]) == [0, 1, 2, 3, 4]
    assert assign({0: "a/0", 1: "a/0"}, ["a/0", "a/0"]) == [0, 1], "two agents on one host"
    assert assign(known, ["d/0", "c/0"], trial=True) == [3, 0], "a sweep sees slot 0's run alone"
    assert assign(known, ["b/0", "a/0"], trial=True) == [1, 0]


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), max_size=8))
def test_slots_are_never_shared(worlds: list[list[int]]) -> None:
    """Proves for any sequence of worlds that no two ranks get one run, and that a place which stays keeps its slot."""
    known: dict[int, str] = {}
    before: dict[str, int] = {}
    for world in worlds:
        places = [f"h{host}/{world[:number].count(host)}" for number, host in enumerate(world)]
        slots = assign(known, places)
        assert len(set(slots)) == len(slots)
        for place, slot in zip(places, slots, strict=True):
            assert before.get(place, slot) == slot
        before = dict(zip(places, slots, strict=True))
        known |= dict(zip(slots, places, strict=True))


def manifest(step: int, *slots: int) -> Manifest:
    runs = tuple(position(step, run_id=f"r1-r{slot}") for slot in slots)
    rest: dict[str, Any] = {"shared": (), "per_rank": (), "files": {}, "created": 0.0}
    rest |= {"environment": {}, "kinds": {}, "config_hash": ""}
    return Manifest(version=1, step=step, attempt=1, world_size=len(slots), runs=runs, **rest)


def test_a_run_that_comes_back_goes_on_where_it_left(tmp_path: Path) -> None:
    """Proves the exchange: what is kept of a run that an attempt goes on without, and rank 0's error everywhere."""

    def world(places: list[str], chosen: Manifest | None) -> list[Slot]:
        return run_ranks(len(places), lambda peers: take(peers, tmp_path, places[peers.rank], chosen, 20))

    assert [slot.number for slot in world(["a/0", "b/0", "c/0"], None)] == [0, 1, 2]
    assert [slot.number for slot in world(["a/0", "c/0"], manifest(5, 0, 1, 2))] == [0, 2]
    back = world(["a/0", "c/0", "b/0"], later := manifest(9, 0, 2))
    assert [slot.number for slot in back] == [0, 2, 1]
    found = [position_of(later, f"r1-r{slot.number}", slot.number, slot.parked) for slot in back]
    assert [each.watermark.step + 1 for each in found if each is not None] == [9, 9, 5]
    (tmp_path / FILE).write_text("{")
    assert all(isinstance(outcome, CheckpointError) for outcome in run_ranks(2, refused(tmp_path)))


def refused(directory: Path) -> Any:
    def rank(peers: ThreadCoordinator) -> Slot:
        return take(peers, directory, "a/0", None, 20)

    return rank


def started(jobs: Jobs, hosts: str, *args: str) -> list[JobProcess]:
    """A rank on each host, numbered in this order."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(hosts))}
    for rank, host in enumerate(hosts):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WANDB_HOST": host}
        jobs.started.append(JobProcess([sys.executable, str(SCRIPT), *args], jobs.cwd, {**os.environ, **meet, **place}))
    return jobs.started[-len(hosts) :]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_then_two_then_three_hosts(server: Server, jobs: Jobs) -> None:
    """Proves that each run keeps its host though the ranks are numbered anew, has each step once, and that the run of a host
    that is gone goes on on a new one where it stood, with the history it had."""
    args = ("--name", "job", "--checkpoint-dir", "ckpt", "--strategy", "per_rank", "--samples", "48", "--epochs")
    for epochs, hosts in enumerate(["abc", "ca", "dca"], start=1):  # 4 steps, 6 steps, 4 steps
        ranks = started(jobs, hosts, *args, str(epochs))
        assert [rank.wait(110) for rank in ranks] == [0] * len(hosts), "".join(rank.output() for rank in ranks)
    runs = {run.config["host"]: run for run in wbdist.Api().runs("tiny")}
    assert {host: run.id[-3:] for host, run in runs.items()} == {"a": "-r0", "d": "-r1", "c": "-r2"}
    steps = {host: [row["_step"] for row in run.scan_history(keys=["_step", "loss"])] for host, run in runs.items()}
    assert steps == {"a": list(range(14)), "c": list(range(14)), "d": [*range(4), *range(10, 14)]}
    assert {run.state for run in runs.values()} == {"finished"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["rank0", "per_rank"])
def test_two_hosts(strategy: str, jobs: Jobs, two_hosts: list[tuple[str, str, str]]) -> None:
    """Proves that ranks on two hosts, which share nothing but a network and the checkpoint directory, are one job: the
    rendezvous, the aggregator's feeds and the saves go over the wire between them."""
    args = ("--name", "job", "--checkpoint-dir", "ckpt", "--strategy", strategy, "--epochs", "2")
    agents = Agents(jobs, two_hosts[0][1], "2", SCRIPT, *args)
    for namespace, address, interface in two_hosts:
        (jobs.cwd / namespace).mkdir()
        agents.start(
            namespace,
            *("ip", "netns", "exec", namespace),
            local=address,
            GLOO_SOCKET_IFNAME=interface,
            WANDB_MODE="offline",
            WANDB_DIR=str(jobs.cwd / namespace),
        )
    for namespace, _, _ in two_hosts:
        assert agents.of_host[namespace].wait(120) == 0, agents.output()
    found: dict[str, list[int]] = {}
    for path in [path for namespace, _, _ in two_hosts for path in find_journals(jobs.cwd / namespace / "wandb")]:
        with JournalReader.open(path) as reader:
            header = reader.header
        if header.role == "run":
            found[header.run_id] = [row["_step"] for row in rows_of(path) if "loss" in row]
    assert len(found) == (1 if strategy == "rank0" else 2)
    assert all(steps == list(range(20)) for steps in found.values()), found
