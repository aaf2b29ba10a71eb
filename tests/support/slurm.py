"""A real Slurm on this machine: munged, slurmctld and two slurmd of one CPU each, all below one directory.

Two partitions share the nodes: jobs of `high` preempt those of `low`, which Slurm requeues. Needs root and Debian's
slurm-wlm and munge.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
SBIN = "/usr/sbin:/sbin"
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start when its credentials have expired: 120 s by default.
AuthInfo=socket={d}/m/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPidFile={d}/slurmctld.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdSpoolDir={d}/spool-%n
SlurmdPidFile={d}/slurmd-%n.pid
SlurmdLogFile={d}/slurmd-%n.log
StateSaveLocation={d}/state
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port1}-{port2}] CPUs=1 RealMemory=2000
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why there can be no Slurm here, '' when there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":" + SBIN) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} missing): apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "a Slurm of our own needs root (slurmd starts jobs as their users)"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the host name {socket.gethostname()!r} does not resolve: slurmd needs it"
    return ""


class Cluster:
    """Started by its constructor, ended by `end`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        port = random.SystemRandom().randrange(20000, 30000)
        self._processes: list[subprocess.Popen[bytes]] = []
        for name in ("state", "m", "spool-n1", "spool-n2"):
            (directory / name).mkdir()
        conf = directory / "slurm.conf"
        conf.write_text(CONF.format(host=socket.gethostname(), d=directory, port=port, port1=port + 1, port2=port + 2))
        self.environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":" + SBIN}
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-c")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            self.until(
                lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() in {"2", "2\n2"}, "idle nodes"
            )
        except BaseException:
            self.end()
            raise

    def _start_munge(self) -> None:
        munge = pwd.getpwnam("munge")
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (key, self.directory / "m"):
            os.chown(path, munge.pw_uid, munge.pw_gid)
        m = self.directory / "m"
        files = [
            f"--socket={m}/munge.sock",
            f"--pid-file={m}/munged.pid",
            f"--log-file={m}/munged.log",
            f"--seed-file={m}/seed",
        ]
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", *files, user="munge", group="munge", extra_groups=[]
        )
        self.until((m / "munge.sock").exists, "munged's socket")

    def _start(self, program: str, *arguments: str, **kwargs: Any) -> None:
        path = shutil.which(program, path=self.environment["PATH"])
        assert path is not None
        with (self.directory / f"{program}.out").open("ab") as log:
            process = subprocess.Popen([path, *arguments], env=self.environment, stdout=log, stderr=log, cwd="/", **kwargs)
        self._processes.append(process)

    def run(self, *command: str, check: bool = True) -> str:
        """What `command` printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; empty for a job that Slurm has forgotten."""
        text = self.run("scontrol", "show", "job", "-o", job, check=False)
        return dict(part.partition("=")[::2] for part in text.split() if "=" in part)

    def until(self, condition: Any, what: str, timeout: float = 60.0) -> Any:
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                logs = "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.out"))
                raise AssertionError(f"waited {timeout} s for {what}\n{logs}\n{self.run('squeue', check=False)}")
            time.sleep(0.1)
        return value

    def end(self) -> None:
        if len(self._processes) > 1:
            with suppress(subprocess.SubprocessError, AssertionError):
                self.run("scancel", "-u", "root", check=False)
                self.until(lambda: not self.run("squeue", "-h", check=False).strip(), "an empty queue", timeout=40)
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    # munged wants a path that nobody else can write to, all the way down.
    directory = tmp_path_factory.mktemp("slurm")
    for parent in (directory, *directory.parents[:-1]):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    cluster = Cluster(directory)
    yield cluster
    cluster.end()
