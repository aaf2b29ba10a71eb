"""A way to run the tiny job under any launcher, with nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from support.lingering import kill_all, shippers_of

import wbdist

SCRIPT = Path(__file__).parents[1] / "job" / "tiny_job.py"


class JobProcess:
    """One started command and everything it starts."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.log = cwd / f"out-{time.monotonic_ns()}.log"
        self.mark = f"wbdist-test-{time.monotonic_ns()}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env={**env, "WBDIST_TEST_MARK": self.mark}, stdout=log, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Every live process that inherited this job's environment mark, but the shipper, which outlives jobs on purpose."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("WBDIST_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    command = " ".join(process.cmdline())
                    if "wbdist.run.shipper" not in command and "wbdist server" not in command:
                        found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes themselves, by rank."""
        ranks = {}
        for process in self.family():
            try:
                rank = process.environ().get("RANK")
                command = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if (
                rank is not None
                and "aggregator" not in command
                and "resource_tracker" not in command
                and "torch.distributed.run" not in command
            ):
                ranks[int(rank)] = process
        return ranks

    def wait(self, timeout: float = 200.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end within {timeout} s:\n{self.output()[-4000:]}") from None

    def end(self) -> None:
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)


class Jobs:
    """Starts tiny jobs; ends them all when the test ends."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.started: list[JobProcess] = []

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs `wbdist <args>` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "wbdist", *args], cwd=self.cwd, capture_output=True, text=True, timeout=200, check=False
        )

    def start(self, *args: str, how: str = "launch", nproc: int = 2, launch_args: tuple[str, ...] = ()) -> JobProcess:
        # Under a launcher the script's own --nproc says nothing, and torchrun would take it for an abbreviation of its own.
        script = [str(SCRIPT), *(["--nproc", str(nproc)] if how == "python" else []), *args]
        command = {
            "launch": [sys.executable, "-m", "wbdist", "launch", "--nproc", str(nproc), *launch_args, *script],
            "torchrun": [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(nproc),
                *script,
            ],
            "python": [sys.executable, *script],
        }[how]
        job = JobProcess(command, self.cwd, dict(os.environ))
        self.started.append(job)
        return job


class Machine:
    """A directory that stands for one machine's disk, the jobs on it, and the shipper that they start."""

    def __init__(self, disk: Path) -> None:
        disk.mkdir()
        self.disk = disk
        self.jobs = Jobs(disk)

    def end(self) -> None:
        """Everything on it dies at once, by SIGKILL."""
        for job in self.jobs.started:
            job.end()
        kill_all(self.shippers())

    def shippers(self) -> list[psutil.Process]:
        return shippers_of(self.disk)

    def lose(self) -> None:
        self.end()
        shutil.rmtree(self.disk)


def the_run(name: str, project: str = "tiny") -> Any:
    """The one run of that display name, or None while the server does not have it."""
    found = list(wbdist.Api().runs(project, filters={"display_name": name}))
    assert len(found) <= 1, f"{len(found)} runs are called {name!r}"
    return found[0] if found else None


def runs_of_job(name: str, strategy: str) -> list[Any]:
    """The one run of a job of two ranks, or each rank's; None for what the server does not have yet."""
    return [the_run(each) for each in ([f"{name}-rank0", f"{name}-rank1"] if strategy == "per_rank" else [name])]


def comparable(run: Any) -> list[list[tuple[str, str]]]:
    """A run's history without wall-clock columns; repr shows every bit and tells 1 from 1.0."""
    return [sorted((k, repr(v)) for k, v in row.items() if k not in {"_timestamp", "_runtime"}) for row in run.scan_history()]
