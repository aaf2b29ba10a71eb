"""W&B's own agent, unmodified, starts jobs of several ranks that use wbdist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.feeding import REPOSITORY
from support.sweeping import SweepServer

import wbdist

pytest.importorskip("wandb")

TRAIN = """
import json, os, signal, torch, wbdist

trial = os.environ["WANDB_RUN_ID"]
with wbdist.job(checkpoint_dir=f"ckpt/{trial}", save_every=1, config={"lr": 9.0, "net": {"width": 2, "deep": 1}}) as job:
    print("CONFIG", json.dumps([trial, job.attempt, job.rank, job.config.as_dict()]), flush=True)
    model = torch.nn.Linear(1, job.config.net["width"])
    opt = torch.optim.SGD(model.parameters(), lr=job.config.lr)
    model = job.ddp(model)
    data = job.loader([torch.tensor([float(i)]) for i in range(16)], batch_size=1)
    job.track(model=model, opt=opt, data=data)
    for batch in job.steps(data, epochs=1):
        loss = model(batch).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        job.log({"lr": job.config.lr, "ranks": 1}, reduce={"ranks": "sum"})
        if (trial, job.attempt, job.rank, job.step) == ("t1", 1, 1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_trials_of_two_ranks_and_one_that_is_requeued(
    server: Any, sdk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves with W&B's agent and torchrun that every rank of every trial has its parameters, that each trial is one run of the
    sweep, also for W&B's client, and that one whose rank was killed and which is handed out again goes on where it stood."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "train.py").write_text(TRAIN)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    half, quarter = {"lr": 0.5, "net": {"width": 4}}, {"lr": 0.25}
    trials = [("t1", half), ("t1", half), ("t2", quarter)]
    with SweepServer(server, "p", "sw1", ["${env}", sys.executable, *ranks, "${program}"], trials) as sweeps:
        monkeypatch.setenv("WANDB_BASE_URL", sweeps.url)
        monkeypatch.setenv("WANDB_API_KEY", server.key)
        own = {
            "PYTHONPATH": str(REPOSITORY),
            "WANDB_CONFIG_DIR": str(tmp_path / "c"),
            "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "agent", "local/p/sw1"],
            cwd=work,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        found = [json.loads(line.removeprefix("CONFIG ")) for line in done.stdout.splitlines() if line.startswith("CONFIG ")]
        first, second = {"lr": 0.5, "net": {"width": 4, "deep": 1}}, {"lr": 0.25, "net": {"width": 2, "deep": 1}}
        lives = [("t1", 1, first), ("t1", 2, first), ("t2", 1, second)]
        assert sorted(found, key=lambda one: one[:3]) == [[i, n, rank, config] for i, n, config in lives for rank in (0, 1)], (
            said
        )
        assert sweeps.sweeps_of_runs == {("t1", "sw1"), ("t2", "sw1")}
        for run, lr in zip(wbdist.Api().runs("p", filters={"sweep": "sw1"}), (0.5, 0.25), strict=True):
            rows = [(row["_step"], row["lr"], row["ranks"]) for row in run.scan_history()]
            assert rows == [(step, lr, 2) for step in range(8)], (run.id, rows)
            assert (run.state, len(run.attempts())) == ("finished", 2 if run.id == "t1" else 1)
    read = "[run.sweep_name, run.sweep, [each.id for each in api.runs('local/p', include_sweeps=True)]]"
    assert sdk.read(f"(lambda run: {read})(api.run('local/p/t1'))") == ["sw1", None, ["t1", "t2"]]
