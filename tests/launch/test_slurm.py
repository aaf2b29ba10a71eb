"""The launcher under a real Slurm: what a preemption, a time limit and a cancellation do to a job of `wbdist submit slurm`."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.slurm import Cluster, slurm

from wbdist.cli import main
from wbdist.core.goodput import goodput
from wbdist.run.local_timeline import local_phases

assert slurm  # the fixture
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
JOB = Path(__file__).with_name("slurm_job.py")


def submit(cluster: Cluster, cwd: Path, script: Path, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """Submits what `wbdist submit slurm` renders; the job's number."""
    rendered = CliRunner().invoke(
        main, ["submit", "slurm", "--dry-run", "--name", "t", "--grace", "15", *options, str(script), *arguments]
    )
    assert rendered.exit_code == 0, rendered.output
    # The cluster's nodes are this machine under names that nobody resolves.
    (cwd / "job.sbatch").write_text(re.sub("(?m)^head=.*", "head=localhost", rendered.output))
    cluster.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return cluster.run("sbatch", "--parsable", "--chdir", str(cwd), str(cwd / "job.sbatch")).strip()


def state(cluster: Cluster, job: str) -> str:
    return cluster.facts(job).get("JobState", "")


def counted(cwd: Path, rank: str = "") -> list[list[str]]:
    path = cwd / f"counted{rank}"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def log(cwd: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in cwd.glob("t-*.log"))


def test_preempted_job_is_requeued_and_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    """Proves that a job preempted by partition priority saves within GraceTime, is queued again under its own number, and goes
    on where it was when the other job is done: nothing counted twice, nothing left out."""
    tmp_path.chmod(0o755)
    job = submit(slurm, tmp_path, JOB, "200")
    slurm.until(lambda: len(counted(tmp_path)) > 10, "the job to count")
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2")
    slurm.until(lambda: state(slurm, job) == "PENDING", "the job to be queued again")
    slurm.until(lambda: state(slurm, job) == "COMPLETED", "the job to complete", timeout=90)
    lines = counted(tmp_path)
    assert [int(number) for _, number in lines] == list(range(1, 201)), log(tmp_path)
    assert {restart for restart, _ in lines} == {"0", "1"}
    assert "SIGTERM" in (tmp_path / "told.0").read_text()
    assert f"Slurm job {job} is queued again" in log(tmp_path)


def test_job_on_two_nodes_is_requeued_once_and_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    """Proves the same for launchers on two nodes that are one job: both save, one asks for the requeue, and both go on where
    they were, numbered as srun numbers their nodes."""
    tmp_path.chmod(0o755)
    job = submit(slurm, tmp_path, JOB, "200", options=("--nodes", "2"))
    slurm.until(lambda: min(len(counted(tmp_path, rank)) for rank in (".0", ".1")) > 10, "the job to count")
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2")
    slurm.until(lambda: state(slurm, job) == "PENDING", "the job to be queued again")
    slurm.until(lambda: state(slurm, job) == "COMPLETED", "the job to complete", timeout=90)
    for rank in (".0", ".1"):
        lines = counted(tmp_path, rank)
        assert [int(number) for _, number in lines] == list(range(1, 201)), log(tmp_path)
        assert {restart for restart, _ in lines} == {"0", "1"}
    assert log(tmp_path).count(f"Slurm job {job} is queued again") == 1
    assert slurm.facts(job)["Restarts"] == "1"


def test_cancelled_job_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    """Proves that `scancel`, which looks like a preemption to the job, ends it for good."""
    job = submit(slurm, tmp_path, JOB, "100000")
    slurm.until(lambda: len(counted(tmp_path)) > 10, "the job to count")
    slurm.run("scancel", job)
    slurm.until(lambda: state(slurm, job) == "CANCELLED", "the job to be cancelled")
    slurm.until(lambda: f"Slurm job {job} was cancelled: not queued again" in log(tmp_path), "the launcher to say so")
    assert slurm.facts(job)["Restarts"] == "0"
    assert {restart for restart, _ in counted(tmp_path)} == {"0"}


def test_end_of_the_time_limit_is_a_notice(slurm: Cluster, tmp_path: Path) -> None:
    """Proves that a job which does not fit its time limit is told by --signal, saves, and goes on in another allocation."""
    job = submit(slurm, tmp_path, JOB, "100000", options=("--time", "2"))
    slurm.until(lambda: slurm.facts(job).get("Restarts") == "1", "the requeue", timeout=110)
    slurm.run("scancel", job)
    assert "SIGUSR2" in (tmp_path / "told.0").read_text()
    saved = int((tmp_path / "state").read_text())
    assert [int(number) for restart, number in counted(tmp_path) if restart == "0"] == list(range(1, saved + 1))


def test_preempted_training_goes_on_in_the_same_run(slurm: Cluster, tmp_path: Path) -> None:
    """Proves the whole of it with a job of two gloo ranks: one run, attempts 1 and 2, all steps once, over a preemption; and
    that the time in the queue is told as Slurm counts it."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    job = submit(slurm, tmp_path, script, options=("--nproc", "2", "--cpus", "1"))
    slurm.until((tmp_path / "step").exists, "training to begin", timeout=100)
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    slurm.until(lambda: slurm.facts(job).get("Restarts") == "1", "the requeue")
    (tmp_path / "enough").touch()
    slurm.until(lambda: state(slurm, job) == "COMPLETED", "the job to complete", timeout=110)
    ends = [json.loads(line) for line in (tmp_path / "ends").read_text().splitlines()]
    assert [end["attempt"] for end in ends] == [1, 2], log(tmp_path)
    assert len({end["run"] for end in ends}) == 1
    steps = [step for end in ends for step in end["steps"]]
    assert steps == list(range(len(steps)))
    first, second = local_phases(tmp_path / "wandb", "p", "", ends[0]["run"]).values()
    assert second["queued"] > 4, "Slurm starts a requeued job when its credential has expired, here after 5 s"
    assert (first["down"], second["lost"]) == (0, 0)
    assert f"wbdist: {goodput([first, second])}" in log(tmp_path)


TRAIN = """
import json, pathlib, torch, wbdist
from torch.utils.data import TensorDataset

model = torch.nn.Linear(4, 1)
steps = []
with wbdist.job(project="p", checkpoint_dir="ckpt", mode="offline") as job:
    net = job.ddp(model)
    data = job.loader(TensorDataset(torch.randn(64, 4)), batch_size=4)
    job.track(model=net, data=data)
    try:
        for (x,) in job.steps(data, epochs=10**6):
            net(x).sum().backward()
            steps.append(job.step)
            job.log({"loss": 0.0})
            pathlib.Path("step").touch()
            if job.attempt > 1 and job.step > 3 and len(steps) > 3:
                break
    finally:
        if job.rank == 0:
            with open("ends", "a") as file:
                file.write(json.dumps({"attempt": job.attempt, "run": job.run.id, "steps": steps}) + "\\n")
"""


TASK = """#!/bin/bash
#SBATCH --array=1-2
#SBATCH --output=task-%a.log
until [ -e go ]; do sleep 0.2; done
{python} - <<'PYTHON'
import json, os
from wbdist.preemption.slurm import SlurmJob
said = [os.environ["SLURM_JOB_ID"], SlurmJob().end(), SlurmJob().submitted()]
path = "task-" + os.environ["SLURM_ARRAY_TASK_ID"]
open(path + ".new", "w").write(json.dumps(said))
os.rename(path + ".new", path)
PYTHON
sleep 600
"""


def test_tasks_of_an_array_know_their_own_ends(slurm: Cluster, tmp_path: Path) -> None:
    """Proves that each task of a job array reads its own record, also the one whose number is the array's, by which Slurm shows
    all of them."""
    slurm.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "array.sbatch").write_text(TASK.format(python=sys.executable))
    options = ("--parsable", "--time", "30", "--chdir", str(tmp_path))
    array = slurm.run("sbatch", *options, str(tmp_path / "array.sbatch")).strip()
    tasks = [f"{array}_1", f"{array}_2"]
    slurm.until(lambda: all(state(slurm, task) == "RUNNING" for task in tasks), "both tasks")
    slurm.run("scontrol", "update", f"JobId={tasks[0]}", "TimeLimit=10")
    ends = [slurm.facts(task)["EndTime"] for task in tasks]
    (tmp_path / "go").touch()
    slurm.until(lambda: all((tmp_path / f"task-{task}").exists() for task in (1, 2)), "both to tell", timeout=110)
    told = [json.loads((tmp_path / f"task-{task}").read_text()) for task in (1, 2)]
    slurm.run("scancel", array)
    assert ends[0] < ends[1]
    assert array in {number for number, _, _ in told}
    assert [end for _, end, _ in told] == [datetime.fromisoformat(end).timestamp() for end in ends]
    assert all(end - 1900 < submitted < end for _, end, submitted in told)
