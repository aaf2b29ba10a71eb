"""Acceptance of seed S1, the FAQ: one test a row, read back through the API."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.seeding import Seeds

import wbdist as wandb
from wbdist.errors import InitStartError
from wbdist.protocol.operations import Operation

pytestmark = pytest.mark.usefixtures("here")


def test_init_start_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a server that cannot start is that class, names the place, and is no error for a run that can do without."""
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WBDIST_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(wandb.errors.InitStartError, match=r"cannot be started in .*file/data"):
        wandb.Api()
    with pytest.raises(InitStartError):
        wandb.init(force=True)
    with wandb.init() as run:
        run.log({"a": 1})


def test_all_processes_init_with_a_group(seeds: Seeds, here: Path, project: str) -> None:
    """Proves approach 1 of the FAQ: four processes, each its own run, found together by group, with their job types."""
    source = """
import multiprocessing
import wandb
def work(rank):
    with wandb.init(group="ddp", job_type="main" if rank == 0 else "worker", name=f"rank{rank}") as run:
        for i in range(5):
            run.log({"rank": rank, "i": i})
if __name__ == "__main__":
    processes = [multiprocessing.get_context("spawn").Process(target=work, args=(rank,)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
"""
    seeds.run("wbdist", source, here, WANDB_PROJECT=project)
    found = {run.name: run for run in wandb.Api().runs(f"local/{project}", filters={"group": "ddp"})}
    assert {name: run.job_type for name, run in found.items()} == {
        "rank0": "main",
        "rank1": "worker",
        "rank2": "worker",
        "rank3": "worker",
    }
    for rank in range(4):
        rows = list(found[f"rank{rank}"].scan_history())
        assert [(row["rank"], row["i"]) for row in rows] == [(rank, i) for i in range(5)]


def test_one_process_with_a_queue(seeds: Seeds, here: Path, project: str) -> None:
    """Proves approach 2 of the FAQ: four workers send what they measure to the one process that has the run."""
    source = """
import multiprocessing
import wandb
def work(queue, rank):
    for i in range(25):
        queue.put({"rank": rank, "i": i})
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with wandb.init() as run:
        workers = [context.Process(target=work, args=(queue, rank)) for rank in range(4)]
        for worker in workers:
            worker.start()
        for _ in range(100):
            run.log(queue.get(timeout=60))
        for worker in workers:
            worker.join()
"""
    seeds.run("wbdist", source, here, WANDB_PROJECT=project)
    (run,) = wandb.Api().runs(f"local/{project}")
    rows = list(run.scan_history())
    assert [row["_step"] for row in rows] == list(range(100))
    for rank in range(4):
        assert [row["i"] for row in rows if row["rank"] == rank] == list(range(25))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_without_init_are_told(seeds: Seeds, here: Path, project: str, method: str) -> None:
    """Proves that `wandb.log` in a child that made no run raises at once, and that the parent's run is none the worse."""
    source = f"""
import multiprocessing
import wandb
def work(queue):
    try:
        wandb.log({{"of": "child"}})
    except Exception as error:
        queue.put((type(error).__name__, str(error)))
if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    queue = context.Queue()
    wandb.init()
    child = context.Process(target=work, args=(queue,))
    child.start()
    kind, text = queue.get(timeout=30)
    child.join(30)
    assert kind == "UsageError" and ("init()" in text), (kind, text)
    wandb.log({{"of": "parent"}})
"""
    seeds.run("wbdist", source, here, WANDB_PROJECT=project)
    (run,) = wandb.Api().runs(f"local/{project}")
    assert [row["of"] for row in run.scan_history()] == ["parent"]
    assert run.state == "finished"


@pytest.mark.parametrize("inside", [True, False])
def test_git_commit_remote_and_command(seeds: Seeds, here: Path, project: str, inside: bool) -> None:
    """Proves that the API has the checkout's HEAD and its remote without credentials, and the script; outside of one, none."""
    head = ""
    if inside:
        for command in (
            ["init", "-q"],
            ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty", "-m", "x"],
            ["remote", "add", "origin", "https://me:secret@example.org/repo.git"],
        ):
            subprocess.run(["git", *command], cwd=here, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, check=True, capture_output=True, text=True).stdout.strip()
    seeds.run("wbdist", 'import wandb\nwandb.init(config={"a": 1}).finish()\n', here, WANDB_PROJECT=project)
    api = wandb.Api()
    (run,) = api.runs(f"local/{project}")
    assert run.commit == head
    query = "query Facts($p: String!, $n: String!) { project(name: $p) { run(name: $n) { jobRepo jobProgram } } }"
    facts = api.execute(Operation("Facts", query, {"p": project, "n": run.id}))["project"]["run"]
    assert (facts["jobRepo"] or "") == ("https://example.org/repo.git" if inside else "")
    assert "script-" in facts["jobProgram"]
    assert "secret" not in json.dumps([run.rawconfig, run.summary_metrics, facts])


MODES = """
import os, sys
import wandb
sockets = []
sys.addaudithook(lambda event, arguments: sockets.append(event) if event == "socket.connect" else None)
run = wandb.init(config={"lr": 0.1})
run.log({"a": 1})
run.name = "mine"
run.notes, run.tags = "n", ["t"]
run.config.update({"b": 2})
run.summary["c"] = 3
run.define_metric("a", summary="max")
wandb.save()
run.mark_preempting()
repr(run), run.url, run.path, run.dir, run.step, run.id, run.project, run.resumed
wandb.finish()
print("FACTS", len(sockets), os.path.isdir("wandb"), run.offline, run.disabled)
"""


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_modes(seeds: Seeds, here: Path, project: str, mode: str) -> None:
    """Proves the three modes of one script: online is on the server, offline on the disk alone, disabled nowhere; and neither
    of the last two opens a connection."""
    said = seeds.run("wbdist", MODES, here, WANDB_PROJECT=project, WANDB_MODE=mode)
    sockets, directory, offline, disabled = said.split("FACTS ")[1].split()[:4]
    assert (int(sockets) > 0, directory) == (mode == "online", str(mode != "disabled"))
    assert (offline, disabled) == (str(mode == "offline"), str(mode == "disabled"))
    found = list(wandb.Api().runs(f"local/{project}"))
    assert [(run.name, run.config, run.state) for run in found] == (
        [("mine", {"lr": 0.1, "b": 2}, "finished")] if mode == "online" else []
    )
    if mode == "disabled":
        assert not [path for path in here.rglob("*") if path.suffix not in {".py", ".pyc"} and path.is_file()]
