"""Where a pool's workers log, and that nothing of it is lost with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.feeding import REPOSITORY
from support.journals import rows_of
from support.lingering import kill_all, processes_of
from support.waiting import until

import wbdist
from wbdist.distributed.pool import Pool
from wbdist.run import lifecycle
from wbdist.run.journal import JournalReader, find_journals
from wbdist.run.local_history import LocalRun


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    for run in lifecycle.active_runs():
        run.finish(1)
    kill_all(processes_of(tmp_path))


def rows_below(root: Path) -> list[dict[str, Any]]:
    """All rows of all journals, by step."""
    found = [row for path in find_journals(root) for row in rows_of(path)]
    return sorted(({key: row[key] for key in row if key not in {"_timestamp", "_runtime"}} for row in found), key=_step)


def _step(row: dict[str, Any]) -> int:
    return int(row["_step"])


def log_square(n: int) -> int:
    wbdist.log({"n": n})
    wbdist.log({"square": n * n}, commit=False)
    print(f"said {n}")
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return n * n


def test_workers_log_into_the_parents_run(tmp_path: Path) -> None:
    """Proves that on the server every row of the parent, and of every worker, killed ones included, is in the one run, each
    at a step of its own, with its task and worker; that console lines are labelled; that a worker's death says nothing of
    the run, whose config and end are the parent's."""
    run = wbdist.init(project="p", config={"lr": 0.1}, settings=wbdist.Settings(silent=True))
    lost = []
    with Pool(2, context="fork") as pool:
        results = pool.imap(log_square, range(12))
        for n in range(12):
            try:
                assert next(results) == n * n
                run.log({"progress": n})
            except wbdist.WorkerLostError as error:
                lost.append(error.task)
        with Pool(1, context="fork") as another:
            assert another.apply(log_square, (20,)) == 400
        pool.close()
        pool.join()
    assert lost == [7]
    assert wbdist.Api().run(f"p/{run.id}").state == "running"
    run.log({"last": 1})
    run.summary["best"] = 5
    run.finish()
    until(lambda: len(list(wbdist.Api().run(f"p/{run.id}").scan_history())) == 24 + 11 + 2 + 1, "the rows", 60)
    read = wbdist.Api().run(f"p/{run.id}")
    rows = list(read.scan_history())
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    logged = {row["n"]: row for row in rows if row.get("n") is not None}
    assert sorted(logged) == [*range(12), 20]
    assert [logged[n]["pool/task"] for n in range(12)] == list(range(12))
    assert {row["square"] for row in rows if row.get("square") is not None} == {n * n for n in logged if n != 7} | {49}
    assert "last" in rows[-1]
    assert (read.state, dict(read.config.items())["lr"]) == ("finished", 0.1)
    assert (read.summary["progress"], read.summary["best"]) == (11, 5)
    assert read.summary["n"] == [row["n"] for row in rows if row.get("n") is not None][-1], "workers' rows are in it, by step"


def fail_at_two(n: int) -> None:
    assert wbdist.run is not None
    wbdist.log({"loss": n})
    wbdist.log({"loss": n / 2})
    if n == 2:
        raise ValueError("two")


def test_runs_of_their_own() -> None:
    """Proves that with runs="task" each call has a run, and with runs="worker" each worker, in the parent's group, with its
    config, which task and worker it is, and the exit code that its end means."""
    run = wbdist.init(project="p", name="sweep", mode="offline", config={"lr": 0.1}, settings=wbdist.Settings(silent=True))
    with Pool(2, runs="task", context="fork") as pool, pytest.raises(ValueError, match="two"):
        pool.map(fail_at_two, range(3), chunksize=1)
    with Pool(1, runs="worker", context="fork") as pool:
        pool.map(fail_at_two, [5, 6])
    with Pool(1, init={"project": "p", "id": "alone", "mode": "offline"}, context="fork") as pool:
        pool.map(fail_at_two, [8])
    found = {}
    for path in find_journals("wandb"):
        with JournalReader.open(path) as reader:
            while reader.read():
                pass
            local = LocalRun(Path("wandb"), "p", "", reader.header.run_id).state()
            found[reader.header.run_id] = (local, reader.ended, rows_of(path))
    assert sorted(found) == sorted([run.id, "alone-t0", *(f"{run.id}-{end}" for end in ("t0", "t1", "t2", "w2"))])
    for task in range(3):
        local, ended, rows = found[f"{run.id}-t{task}"]
        assert (local.facts["display_name"], local.facts["group"], local.facts["job_type"]) == (
            f"sweep-t{task}",
            run.id,
            "task",
        )
        assert (local.config["lr"], local.config["pool"]["task"]) == (0.1, task)
        assert [row["loss"] for row in rows] == [task, task / 2]
        assert ended["exit_code"] == (1 if task == 2 else 0)
    local, ended, rows = found[f"{run.id}-w2"]
    assert [row["loss"] for row in rows] == [5, 2.5, 6, 3.0]
    assert (local.facts["job_type"], ended["exit_code"]) == ("worker", 0)
    assert found["alone-t0"][0].facts["group"] == "alone"


def epochs(n: int) -> None:
    for epoch in range(3):
        wbdist.log({f"loss{n}": epoch}, step=epoch)


def nested(n: int) -> list[int]:
    wbdist.log({"outer": n})
    with Pool(2, context="fork") as pool:
        return pool.map(log_square, [n, n + 1])


def own_run(n: int) -> None:
    """Opens a run of its own: an odd one is left open."""
    run = wbdist.init(project="q", mode="offline", settings={"silent": True})
    wbdist.log({"own": n})
    if n % 2 == 0:
        run.finish()


def log_number(n: int) -> str:
    wbdist.log({"n": n})
    assert wbdist.run is not None
    return wbdist.run.id


def test_a_run_that_a_task_opens_is_that_tasks_alone() -> None:
    """Proves that what follows a task that called `init`, left its run open, or called `finish`, logs into the parent's run:
    its rows went into the run that was left open, or it failed. A run that the initializer opens is the worker's."""
    with wbdist.init(project="p", mode="offline", settings={"silent": True}) as run:
        with wbdist.Pool(1, context="fork") as pool:
            for n, task in enumerate((own_run, log_number, log_number, own_run, log_number)):
                pool.apply(task, (n,))
            pool.apply(wbdist.finish)
            assert pool.apply(log_number, (6,)) == run.id
        with wbdist.Pool(1, own_run, (1,), context="fork") as pool:
            (other,) = set(pool.map(log_number, [7, 8]))
    assert other != run.id
    found: dict[str, list[dict[str, Any]]] = {}
    for path in find_journals("wandb"):
        with JournalReader.open(path) as reader:
            found.setdefault(reader.header.run_id, []).extend(rows_of(path))
    assert [row["n"] for row in sorted(found.pop(run.id), key=_step)] == [1, 2, 4, 6]
    assert sorted([row.get("own", row.get("n")) for row in rows] for rows in found.values()) == [[0], [1, 7, 8], [3]]


def test_explicit_steps_and_nested_pools(tmp_path: Path) -> None:
    """Proves that each task's explicit steps are kept, also when they begin anew, and that the rows of a pool in a pool's
    task are in the same run, with steps of the same counter."""
    run = wbdist.init(project="p", mode="offline", settings=wbdist.Settings(silent=True))
    with Pool(1, context="fork") as pool:
        pool.map(epochs, range(3))
    rows = rows_below(tmp_path / "wandb")
    assert [row["_step"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {(row["pool/task"], row["_step"]) for row in rows} == {(task, step) for task in range(3) for step in range(3)}
    with Pool(2, context="fork") as pool:
        assert pool.map(nested, [10, 20], chunksize=1) == [[100, 121], [400, 441]]
    run.log({"last": 1})
    run.finish()
    rows = rows_below(tmp_path / "wandb")[9:]
    steps = [row["_step"] for row in rows]
    assert steps == list(range(3, 3 + len(rows)))
    assert sorted(row["n"] for row in rows if "n" in row) == [10, 11, 20, 21]
    assert sorted(row["outer"] for row in rows if "outer" in row) == [10, 20]
    assert "last" in rows[-1]
    assert len({path.parent for path in find_journals(tmp_path / "wandb")}) == 1


PARENT = """
import os, sys, time, wbdist
def work(n):
    for i in range(1000):
        wbdist.log({"n": n, "i": i})
        with open(f"said{n}", "a") as file:
            file.write(f"{i}\\n")
        time.sleep(0.005)
@wbdist.main
def main():
    run = wbdist.init(project="p", id="one", settings=wbdist.Settings(silent=True))
    pool = wbdist.Pool(3)
    results = pool.map_async(work, range(3), chunksize=1)
    print(*pool.pids, flush=True)
    results.get()
"""


def test_killed_parent_leaves_neither_workers_nor_gaps(tmp_path: Path) -> None:
    """Proves for spawned workers that they end with a parent that is SIGKILLed, and that every row whose log had returned is
    on the server: the shipper brings the journals of all of them."""
    (tmp_path / "script.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, "script.py"], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path)
    said = [tmp_path / f"said{n}" for n in range(3)]
    until(lambda: all(path.exists() and path.stat().st_size > 20 for path in said), "the workers at work", 90)
    workers = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    workers = [worker for worker in workers if "shipper" not in " ".join(_command(worker))]
    assert not psutil.wait_procs([worker for worker in workers if "spawn_main" in " ".join(_command(worker))], 60)[1]
    promised = {(n, int(i)) for n in range(3) for i in said[n].read_text().split()}

    def arrived() -> bool:
        rows = list(wbdist.Api().run("p/one").scan_history())
        logged = [(row["n"], row["i"]) for row in rows]
        assert len(logged) == len(set(logged))
        return promised <= set(logged)

    until(arrived, "every row", 60)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


UNGUARDED = """
import sys, wbdist
if len(sys.argv) < 9:
    with wbdist.Pool(3) as pool:
        print(pool.map(abs, [1]))
"""


def test_unguarded_script_is_told_once(tmp_path: Path) -> None:
    """Proves that a pool in an unguarded script ends with one message that names the line, and with no more processes than
    it has workers."""
    for text, line in ((UNGUARDED, 4), ("import wbdist\nwbdist.Pool(3).map(abs, [1])\n", 2)):
        (tmp_path / "script.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "script.py"],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("is not under a main guard") == 1, done.stderr
        assert f"line {line} of" in done.stderr


def test_example(tmp_path: Path) -> None:
    """Proves that the example runs as it stands, and that all its rows are in one run's directory."""
    script = REPOSITORY / "examples" / "pool_search.py"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), "--mode", "offline"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "best loss" in done.stdout
    rows = rows_below(tmp_path / "wandb")
    assert sum("loss" in row for row in rows) == 24 * 20
    assert sum("best" in row for row in rows) == 24
    assert [row["_step"] for row in rows] == list(range(24 * 21))
