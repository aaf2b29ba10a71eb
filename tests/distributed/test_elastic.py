"""Elastic launchers: a host is lost, a host comes, and the job is one job."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from support.agents import Agents
from support.feeding import PROGRAMS
from support.jobs import Jobs
from support.serving import Server
from support.waiting import until

import wbdist
from wbdist.checkpoint import manifest
from wbdist.checkpoint.manifest import Manifest
from wbdist.hooks.ledger import Order


def newest(directory: Path) -> Manifest | None:
    found = manifest.committed(directory) if directory.exists() else []
    return max(found, key=lambda one: one.step, default=None)


def moving_on(directory: Path, world: int) -> None:
    """Waits until `world` ranks have committed two checkpoints one after the other."""

    def step() -> int | None:
        found = newest(directory)
        return None if found is None or found.world_size != world else found.step

    first = until(step, f"a checkpoint of {world} ranks", 300)
    until(lambda: (step() or 0) > first, f"another checkpoint of {world} ranks", 100)


def replayed(rows: list[dict[str, Any]], order: Order) -> list[float]:
    """The weights that a single process ends with when it takes the steps of this ledger."""
    import torch
    from distributed.programs import elastic_job

    x, y = elastic_job.samples()
    net = elastic_job.start()
    opt = torch.optim.SGD(net.parameters(), lr=elastic_job.RATE, momentum=elastic_job.MOMENTUM)
    for row in rows:
        stop = int(row["_consumed"])
        ids = torch.from_numpy(order.ids(int(row["epoch"]))[stop - int(row["_batch"]) : stop])
        elastic_job.step(net, opt, x[ids], y[ids])
    return [*net.weight.flatten().tolist(), *net.bias.tolist()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["rank0", "per_rank"])
@pytest.mark.parametrize("launcher", ["torchrun", "wbdist"])
def test_four_hosts_then_three_then_four(launcher: str, strategy: str, server: Server, jobs: Jobs) -> None:
    """Proves that SIGKILL of a host (agent and rank) leaves three that go on, that a new host joins while they train, and that
    all that is one job: each step once in one history, each sample once an epoch (`wbdist audit`), weights as of a single
    process that takes the same samples in this order, the hosts that stay keep their runs, the new one takes the lost one's."""
    agents = Agents(jobs, "127.0.0.1", "3:4", PROGRAMS / "elastic_job.py", strategy, launcher=launcher)
    checkpoints = jobs.cwd / "ckpt"
    try:
        for host in "abcd":
            agents.start(host)
        moving_on(checkpoints, 4)
        agents.kill("c")
        moving_on(checkpoints, 3)
        agents.start("e")
        moving_on(checkpoints, 4)
        (jobs.cwd / "hurry").touch()
        assert [agent.wait(300) for agent in agents.of_host.values()] == [0] * 4
    except AssertionError as error:
        raise AssertionError(f"{error}\n{agents.output()}") from error

    runs = {run.config.get("host", "all"): run for run in wbdist.Api().runs("elastic")}
    keys = ["_step", "loss", "world", "epoch", "_consumed", "_batch"]
    rows = {host: list(run.scan_history(keys=keys)) for host, run in runs.items()}
    whole = max(rows.values(), key=len)
    worlds = [(world, len(list(steps))) for world, steps in groupby(int(row["world"]) for row in whole)]
    assert [world for world, _ in worlds] == [4, 3, 4], worlds
    before, without, _ = (steps for _, steps in worlds)
    steps = list(range(len(whole)))
    if strategy == "rank0":
        assert len(runs) == 1
        assert [int(row["_step"]) for row in whole] == steps
    else:
        assert {host: run.id[-3:] for host, run in runs.items() if host != "e"}.keys() == {"a", "b", "d"}
        assert len({run.id[-3:] for run in runs.values()} & {"-r0", "-r1", "-r2", "-r3"}) == 4
        for host in "abd":
            assert [int(row["_step"]) for row in rows[host]] == steps
        assert [int(row["_step"]) for row in rows["e"]] == steps[:before] + steps[before + without :]
    audited = jobs.command("audit", "--json", *(f"elastic/{run.id}" for run in runs.values()))
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert [epoch["doubled"] + epoch["missing"] for epoch in json.loads(audited.stdout)["epochs"]] == [0, 0, 0]
    told = next(iter(next(iter(runs.values())).scan_history(keys=["_step", "_data"])))["_data"]
    for run in runs.values():
        assert run.summary["weights"] == pytest.approx(replayed(whole, Order.parse(told)), rel=1e-9)
