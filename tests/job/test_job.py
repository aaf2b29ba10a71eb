"""The main job, end to end: real ranks, real signals, a real server; read back through the server's API."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Jobs, comparable, the_run
from support.serving import Server
from support.waiting import until

import wbdist
from wbdist.checkpoint.manifest import committed

STEPS = 40  # 4 epochs x 80 samples / (2 ranks x 4)


def reference(jobs: Jobs, *args: str, nproc: int = 2) -> Any:
    """The same job, never interrupted."""
    assert jobs.start("--name", "reference", "--checkpoint-dir", "reference-ckpt", *args, nproc=nproc).wait() == 0
    return the_run("reference")


def steps_done(name: str) -> int:
    run = the_run(name)
    return 0 if run is None else run.lastHistoryStep + 1


@pytest.mark.parametrize(
    ("how", "nproc"), [("launch", 2), ("torchrun", 2), *(pytest.param("python", n, marks=pytest.mark.slow) for n in (1, 2))]
)
def test_one_script_runs_in_four_ways(server: Server, jobs: Jobs, how: str, nproc: int) -> None:
    """Proves that the unchanged script finishes with a full, single history under every launcher and under none."""
    job = jobs.start("--name", "job", "--checkpoint-dir", "ckpt", how=how, nproc=nproc)
    assert job.wait() == 0, job.output()
    run = the_run("job")
    steps = [row["_step"] for row in run.scan_history(keys=["_step", "loss", "_samples"])]
    assert steps == list(range(STEPS if nproc == 2 else 2 * STEPS))
    assert run.state == "finished"
    assert job.family() == []


def test_preempted_then_killed_equals_uninterrupted(server: Server, jobs: Jobs) -> None:
    """Proves the headline: after SIGTERM to the launcher and SIGKILL to a rank, nothing differs by a bit. And the time that it
    took is told: what became of each attempt, and of it all as long as the command ran, but for the interpreters' own end."""
    began = time.monotonic()
    job = jobs.start(
        "--name", "tested", "--checkpoint-dir", "ckpt", "--step-seconds", "0.05", launch_args=("--on-preempt", "relaunch")
    )
    until(lambda: steps_done("tested") >= 8, "8 steps of the first attempt")
    job.process.send_signal(signal.SIGTERM)
    until(
        lambda: (run := the_run("tested")) and len(run.attempts()) >= 2 and run.lastHistoryStep >= 20,
        "the second attempt at step 20",
    )
    job.ranks()[1].kill()
    assert job.wait() == 0, job.output()
    took = time.monotonic() - began

    tested, untouched = the_run("tested"), reference(jobs)
    assert len(tested.attempts()) == 3, job.output()
    assert comparable(tested) == comparable(untouched)
    assert tested.summary["weights"] == untouched.summary["weights"]
    assert tested.state == "finished"
    assert job.family() == []
    audit = jobs.command("audit", f"tiny/{tested.id}")
    assert (audit.returncode, audit.stderr) == (0, ""), audit.stdout

    first, second, third = (attempt.phases for attempt in tested.attempts())
    assert (first["down"], first["lost"], third["lost"]) == (0, 0, 0)
    assert second["lost"] > 0, "what the killed attempt did beyond its last checkpoint"
    assert all(phases[name] > 0 for phases in (first, second, third) for name in ("startup", "train", "save"))
    assert min(second["down"], third["down"], second["restore"], first["stop"], third["stop"]) > 0
    told = tested.goodput()
    assert 0 < told.phases["train"] < told.seconds < took
    assert f"wbdist: {told}" in job.output()
    assert str(told) in jobs.command("attempts", f"tiny/{tested.id}").stdout
    assert f"Exactly once: nothing doubled, nothing missing; all {STEPS} steps" in audit.stdout


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_every_rank_may_die(server: Server, jobs: Jobs, victim: int) -> None:
    """Proves that losing rank 0 (which owns aggregator, claim and manifest) is no worse than losing another."""
    job = jobs.start("--name", "tested", "--checkpoint-dir", "ckpt", "--step-seconds", "0.03")
    until(lambda: steps_done("tested") >= 12, "12 steps")
    job.ranks()[victim].kill()
    assert job.wait() == 0, job.output()
    assert comparable(the_run("tested")) == comparable(reference(jobs))


@pytest.mark.slow
def test_per_rank_runs_share_a_group(server: Server, jobs: Jobs) -> None:
    """Proves that strategy per_rank gives each rank its own full run, listed together by their group, also over a restart."""
    job = jobs.start("--name", "job", "--checkpoint-dir", "ckpt", "--strategy", "per_rank", "--step-seconds", "0.03")
    first = until(lambda: list(wbdist.Api().runs("tiny")), "the first run to be registered")[0]
    until(lambda: wbdist.Api().run(f"tiny/{first.id}").lastHistoryStep >= 12, "12 steps")
    job.ranks()[1].kill()
    assert job.wait() == 0, job.output()
    runs = list(wbdist.Api().runs("tiny", filters={"group": first.group}))
    assert first.group
    assert sorted(run.config["rank"] for run in runs) == [0, 1]
    for run in runs:
        assert [row["_step"] for row in run.scan_history(keys=["_step", "loss"])] == list(range(STEPS))
        assert run.state == "finished"
    assert jobs.command("audit", *(f"tiny/{run.id}" for run in runs)).returncode == 0
    half = jobs.command("audit", f"tiny/{runs[0].id}")
    assert half.returncode == 1
    assert "step 0 used other samples than positions 0 to 7 of epoch 0 hold" in half.stdout


def test_training_does_not_notice_a_dead_server(server: Server, jobs: Jobs) -> None:
    """Proves that a server killed in the middle costs nothing: training ends, and every row is there once it is back."""
    job = jobs.start("--name", "job", "--checkpoint-dir", "ckpt", "--step-seconds", "0.03")
    until(lambda: steps_done("job") >= 5, "5 steps")
    server.kill()
    until(
        lambda: (jobs.cwd / "ckpt").exists() and any(p.name.startswith("step-30") for p in (jobs.cwd / "ckpt").iterdir()),
        "step 30 while the server is away",
    )
    server.start()
    assert job.wait() == 0, job.output()
    until(lambda: the_run("job").state == "finished", "the run to be finished on the server")
    assert [row["_step"] for row in the_run("job").scan_history(keys=["_step", "loss"])] == list(range(STEPS))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_accumulated_gradients_survive(server: Server, jobs: Jobs) -> None:
    """Three batches to a step of the optimizer, reduced over two ranks once in three: a notice and a SIGKILL change no bit."""
    accumulate = ("--accumulate", "3")
    job = jobs.start(
        *("--name", "tested", "--checkpoint-dir", "ckpt", "--step-seconds", "0.05", "--save-every", "2 steps", *accumulate),
        launch_args=("--on-preempt", "relaunch"),
    )
    until(lambda: steps_done("tested") >= 7, "7 steps of the first attempt")
    job.process.send_signal(signal.SIGTERM)
    until(lambda: len(the_run("tested").attempts()) >= 2 and steps_done("tested") >= 22, "the second attempt at step 22")
    job.ranks()[1].kill()
    assert job.wait() == 0, job.output()
    tested, untouched = the_run("tested"), reference(jobs, *accumulate)
    assert len(tested.attempts()) == 3, job.output()
    assert comparable(tested) == comparable(untouched)
    assert tested.summary["weights"] == untouched.summary["weights"]
    boundaries = {10 * epoch + batch for epoch in range(4) for batch in (3, 6, 9, 10)}
    assert {manifest.step for manifest in committed(jobs.cwd / "ckpt")} <= boundaries


@pytest.mark.slow
def test_preempted_job_exits_75_and_the_same_command_continues(server: Server, jobs: Jobs) -> None:
    """Proves the contract with schedulers: 75 means 'saved, requeue me', and requeueing is running the same command. What
    saves cost each rank is read beside the history, which is equal."""
    args = ("--name", "job", "--checkpoint-dir", "ckpt", "--step-seconds", "0.05")
    job = jobs.start(*args)
    until(lambda: steps_done("job") >= 8, "8 steps")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output()
    until(lambda: the_run("job").state == "preempted", "the state preempted")
    assert jobs.start(*args).wait() == 0
    assert comparable(the_run("job")) == comparable(reference(jobs))
    measured = the_run("job").history(stream="system", pandas=False)
    for rank in range(2):
        name = f"system.checkpoint.disk.bytes/l:rank{rank}"
        assert sum(row.get(name, 0) > 0 for row in measured) >= 2, name


def test_ctrl_c_is_one_clean_stop(server: Server, jobs: Jobs) -> None:
    """Proves that Ctrl-C saves and leaves, without tracebacks and without orphans."""
    job = jobs.start("--name", "job", "--checkpoint-dir", "ckpt", "--step-seconds", "0.05")
    until(lambda: steps_done("job") >= 5, "5 steps")
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 75, job.output()
    assert "Traceback" not in job.output()
    until(lambda: job.family() == [], "every process to be gone")


@pytest.mark.slow
def test_a_stop_asked_for_on_the_server(server: Server, jobs: Jobs) -> None:
    """Proves that a job whose run is stopped through the API saves on all ranks, ends with 65 and is not started again."""
    job = jobs.start(
        *("--name", "job", "--checkpoint-dir", "ckpt", "--epochs", "1000", "--step-seconds", "0.1"),
        launch_args=("--on-preempt", "relaunch"),
    )
    until(lambda: steps_done("job") >= 5, "5 steps")
    the_run("job").stop()
    assert job.wait() == 65, job.output()
    assert job.output().count("starting tiny_job.py") == 1
    assert "Traceback" not in job.output()
    until(lambda: the_run("job").state == "killed", "the state killed")
    assert max(manifest.step for manifest in committed(jobs.cwd / "ckpt")) == the_run("job").lastHistoryStep + 1


@pytest.mark.slow
def test_second_job_on_one_directory_is_refused(server: Server, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a double requeue cannot interleave: the second job, supervised or a plain script, is told who
    holds the directory, and exits 69; the plain one without a traceback."""
    monkeypatch.setenv("WBDIST_CLAIM_TIMEOUT", "1")
    first = jobs.start("--name", "job", "--checkpoint-dir", "ckpt", "--step-seconds", "2")
    until(lambda: steps_done("job") >= 1, "the first job to train")
    second = jobs.start("--name", "job", "--checkpoint-dir", "ckpt")
    assert second.wait() == 69, second.output()
    assert "in use by pid" in second.output()
    plain = jobs.start("--name", "job", "--checkpoint-dir", "ckpt", how="python", nproc=1)
    assert plain.wait() == 69, plain.output()
    assert "in use by pid" in plain.output()
    assert "Traceback" not in plain.output()
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75


@pytest.mark.slow
def test_a_rank_that_dies_at_start_up_is_named(server: Server, jobs: Jobs) -> None:
    """Proves that the others are stopped and the message names the rank and shows its error."""
    job = jobs.start("--checkpoint-dir", "ckpt", "--die-at-start", "1", launch_args=("--max-restarts", "0"))
    assert job.wait(60) == 70, job.output()
    assert "rank 1" in job.output()
    assert "told to die at start-up" in job.output()
    assert job.family() == []


def test_unguarded_script_is_explained_once(tmp_path: Path, jobs: Jobs) -> None:
    """Proves that a script without the __main__ guard prints one message with the fix and starts no storm of processes."""
    script = tmp_path / "unguarded.py"
    script.write_text("import wbdist\n\ndef train():\n    print('training')\n\nwbdist.launch(train, nprocs=2)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 65, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count('if __name__ == "__main__":') == 1
    assert "Traceback" not in done.stderr
