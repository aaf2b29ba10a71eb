"""Whole jobs on several hosts under `wbdist launch`: what happens to a host leaves no trace in history, order and weights."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from support.jobs import SCRIPT, JobProcess, Jobs, comparable, the_run
from support.namespaces import ip
from support.ports import free_port
from support.serving import Server
from support.waiting import until

from wbdist.checkpoint import manifest

S = signal
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Hosts:
    """Launchers of one tiny job, each with one rank; a host may be a network namespace."""

    def __init__(self, jobs: Jobs, place: str, name: str) -> None:
        self._jobs, self._place = jobs, place
        self.checkpoints = jobs.cwd / f"ckpt-{name}"
        self._script = (
            "--name",
            name,
            "--checkpoint-dir",
            str(self.checkpoints),
            "--step-seconds",
            "0.15",
            "--save-every",
            "3",
        )
        self.all: list[JobProcess] = []

    def start(self, number: int, *within: str, options: tuple[str, ...] = (), **environment: str) -> JobProcess:
        command = [
            *within,
            *(sys.executable, "-m", "wbdist", "launch", "--nnodes", "2", "--rdzv-endpoint", self._place),
            *("--node-rank", str(number), *options, str(SCRIPT), *self._script),
        ]
        job = JobProcess(command, self._jobs.cwd, {**os.environ, "OMP_NUM_THREADS": "1", **environment})
        self._jobs.started.append(job)
        self.all[number:] = [job, *self.all[number + 1 :]]
        return job

    def committed(self, step: int) -> None:
        """Waits for a checkpoint of at least `step`."""

        def found() -> bool:
            return self.checkpoints.exists() and any(one.step >= step for one in manifest.committed(self.checkpoints))

        self.until(found, f"a checkpoint of step {step}")

    def until(self, condition: object, what: str) -> None:
        try:
            until(condition, what, 120)  # type: ignore[arg-type]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def codes(self) -> list[int]:
        codes = [job.wait(150) for job in self.all]
        assert [job.family() for job in self.all] == [[]] * len(codes)
        return codes

    def output(self) -> str:
        return "\n".join(f"--- node {number}\n{job.output()[-3000:]}" for number, job in enumerate(self.all))


def same_as_undisturbed(jobs: Jobs, name: str) -> None:
    """The history and the weights of run `name` are those of two ranks on one host that nobody disturbs; the audit agrees."""
    reference = jobs.start("--name", "reference", "--checkpoint-dir", "ckpt-reference", "--save-every", "3")
    assert reference.wait(120) == 0, reference.output()
    run, expected = the_run(name), until(lambda: the_run("reference"), "the reference")
    assert [row["_step"] for row in run.scan_history(keys=["_step", "loss"])] == list(range(40))
    assert comparable(run) == comparable(expected)
    assert run.summary["weights"] == expected.summary["weights"]
    audit = jobs.command("audit", f"tiny/{run.id}")
    assert audit.returncode == 0, audit.stdout


def test_killed_rank_stopped_host_lost_host(server: Server, jobs: Jobs) -> None:
    """Proves for one job on two hosts: SIGKILL of a rank of the second, SIGTERM to its launcher (all save, both leave with 75,
    the same commands go on), SIGKILL of a launcher that comes back; and at the end nothing of all that shows in the run."""
    hosts = Hosts(jobs, f"localhost:{free_port()}", "job")
    for number in (0, 1):
        hosts.start(number, options=("--keep-alive", "5"))
    hosts.committed(3)
    hosts.until(lambda: 1 in hosts.all[1].ranks(), "rank 1")
    hosts.all[1].ranks()[1].kill()
    hosts.committed(12)
    for job in hosts.all:
        assert "rank 1 was killed by SIGKILL; starting again" in job.output()
    hosts.all[1].process.send_signal(S.SIGTERM)
    assert hosts.codes() == [75, 75], hosts.output()
    assert all("state saved; run the same command to continue" in job.output() for job in hosts.all), hosts.output()

    for number in (0, 1):
        hosts.start(number, options=("--keep-alive", "5", "--standby-after", "0"))
    hosts.committed(max(one.step for one in manifest.committed(hosts.checkpoints)) + 3)
    hosts.all[1].process.kill()
    hosts.until(lambda: "node 1 (" in hosts.all[0].output() and "was lost" in hosts.all[0].output(), "the loss to be named")
    hosts.until(lambda: hosts.all[1].family() == [], "its ranks to be gone")
    hosts.start(1, options=("--keep-alive", "5"))
    assert hosts.codes() == [0, 0], hosts.output()
    same_as_undisturbed(jobs, "job")
    assert len(the_run("job").attempts()) == 4


def test_cut_network(server: Server, jobs: Jobs, two_hosts: list[tuple[str, str, str]]) -> None:
    """Proves that when two hosts cannot hear each other any more, both end their ranks and wait, and that the job goes on by
    itself once they can: one history, as if nothing had been."""
    hosts = Hosts(jobs, f"{two_hosts[0][1]}:29400", "job")
    for number, (namespace, _, interface) in enumerate(two_hosts):
        (jobs.cwd / namespace).mkdir()
        hosts.start(
            number,
            *("ip", "netns", "exec", namespace),
            options=("--keep-alive", "2"),
            GLOO_SOCKET_IFNAME=interface,
            WANDB_MODE="offline",
            WANDB_DIR=str(jobs.cwd / namespace),
        )
    hosts.committed(3)
    ip("-n", two_hosts[0][0], "link", "set", two_hosts[0][2], "down")
    hosts.until(lambda: "nothing was heard of it for" in hosts.all[0].output(), "node 0 to miss node 1")
    hosts.until(lambda: "nothing was heard of it for" in hosts.all[1].output(), "node 1 to miss node 0")
    hosts.until(lambda: not any(job.ranks() for job in hosts.all), "the ranks to be gone")
    ip("-n", two_hosts[0][0], "link", "set", two_hosts[0][2], "up")
    assert hosts.codes() == [0, 0], hosts.output()
    found = [str(path) for namespace, _, _ in two_hosts for path in Path(jobs.cwd / namespace / "wandb").glob("*run-*")]
    synced = jobs.command("sync", *found)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    same_as_undisturbed(jobs, "job")
