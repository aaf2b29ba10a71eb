"""Looks for what makes a preemption notice, a save or a restart fail, before it does, and says what to do about it.

Each check looks at one thing and returns its findings; none changes anything, and none waits longer than SECONDS for anybody.
A check that does not apply here (no Slurm, no cloud) finds nothing.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

import msgspec
import requests

SECONDS = 3.0
SKEW = 5.0
"""Seconds between two clocks that are worth a word: times of attempts are shown by them."""
SLOW_NAME = 0.5
"""Seconds for a name that are worth a word: a job of 8 ranks makes some 30 connections."""
SHARED = re.compile(r"nfs\d?|cifs|smb3|lustre|gpfs|beegfs|ceph|9p|fuse\..*")
"""File systems on which locks, renames or fsync may mean less than on a local disk."""
SHELLS = frozenset({"sh", "bash", "dash", "ash", "zsh"})
METADATA = "http://169.254.169.254"
STARTERS = frozenset({"launch", "Pool", "Process", "spawn", "start_processes", "ProcessPoolExecutor"})
"""Last names of calls that start processes which load the script again."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    check: str
    level: Literal["ok", "warning", "problem"]
    says: str
    fix: str = ""


def script(path: Path) -> list[Finding]:
    """A training script or batch script: signals, torchrun, and the `__main__` guard. Raises OSError when it cannot be read."""
    text = path.read_text(errors="replace")
    found = []
    if re.search(r"(?:signal\(|--signal[= ]\S*|\.)\s*(?:signal\.)?(?:SIG)?USR1\b", text):
        fix = "use SIGUSR2 (in Slurm --signal=USR2@170); wbdist launch passes a SIGUSR1 on as SIGTERM"
        found.append(Finding("SIGUSR1", "problem", f"{path.name} uses SIGUSR1, which NCCL may catch: the notice is lost", fix))
    # In a Python file the word stands in a docstring.
    if (
        path.suffix != ".py"
        and re.search(r"\b(?:torchrun|torch\.distributed\.(?:run|launch))\b", text)
        and "shutdown-timeout" not in text
    ):
        fix = "use wbdist launch (--grace is each rank's own), or set TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
        says = f"{path.name} uses torchrun: ranks of a node share 30 s after a signal, and its exit code is 1 whatever they say"
        found.append(Finding("torchrun", "warning", says, fix))
    if path.suffix != ".py" and re.search(r"--nnodes[= ]\d+:\d+", text) and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" not in text:
        fix = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all hosts"
        says = f"{path.name} lets hosts join while the job runs, which ends the job with torch 2.13's shared store"
        found.append(Finding("elastic", "problem", says, fix))
    if path.suffix == ".py":
        found += _guard(path, text)
    return found or [Finding("script", "ok", f"{path.name}: no SIGUSR1, no torchrun, processes are started under a guard")]


def _guard(path: Path, text: str) -> list[Finding]:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [Finding("script", "problem", f"{path.name} line {error.lineno}: {error.msg}", "mend the script")]
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            continue
        if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            continue
        for node in ast.walk(statement):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
            if name in STARTERS:
                line = getattr(node, "lineno", 0)
                says = f"{path.name} line {line} calls {name}() whenever the file is loaded, also by its own children"
                return [Finding("guard", "problem", says, 'put it under: if __name__ == "__main__":')]
    return []


def first_process(proc: Path = Path("/proc"), env: Mapping[str, str] | None = None) -> list[Finding]:
    """In a container: whether the process that gets the signals is a shell, which keeps them to itself."""
    env = os.environ if env is None else env
    if not (Path("/.dockerenv").exists() or "KUBERNETES_SERVICE_HOST" in env or env.get("container")):
        return []
    try:
        name = (proc / "1" / "comm").read_text().strip()
    except OSError:
        return []
    if name in SHELLS:
        fix = 'start the launcher itself: command: ["wbdist", "launch", ...], or exec in the script'
        return [Finding("PID 1", "problem", f"PID 1 of this container is {name}: it does not pass SIGTERM on", fix)]
    return [Finding("PID 1", "ok", f"PID 1 of this container is {name}")]


def directory(path: Path, mounts: Path = Path("/proc/mounts")) -> list[Finding]:
    """Where checkpoints or journals are to lie: the kind of file system, and whether it can be written."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    there = there.resolve()
    kind, at = "", Path()
    for line in mounts.read_text().splitlines():
        words = line.split()
        where = Path(words[1].replace("\\040", " "))
        if there.is_relative_to(where) and len(where.parts) >= len(at.parts):
            kind, at = words[2], where
    if not os.access(there, os.W_OK):
        return [Finding("directory", "problem", f"{there} cannot be written", "give the job a directory that it may write to")]
    if SHARED.fullmatch(kind):
        fix = "journals (WANDB_DIR) belong on a local disk; for checkpoints see that locks work (mount with lock, not nolock)"
        return [Finding("directory", "warning", f"{path} lies on {kind} ({at})", fix)]
    return [Finding("directory", "ok", f"{path} lies on {kind or 'an unknown file system'} and can be written")]


def slurm(env: Mapping[str, str] | None = None) -> list[Finding]:
    """What this Slurm does on a preemption; nothing where there is none."""
    env = os.environ if env is None else env
    if shutil.which("scontrol", path=env.get("PATH")) is None:
        return []
    config = _scontrol(env, "show", "config")
    if not config:
        return [Finding("Slurm", "warning", "the controller does not answer scontrol", "try again, or ask the administrator")]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in config.splitlines())}
    found = []
    wanted = env.get("SLURM_JOB_PARTITION", "")
    for line in _scontrol(env, "show", "partition", "-o", *([wanted] if wanted else [])).splitlines():
        partition = dict(word.partition("=")[::2] for word in line.split())
        mode, name = partition.get("PreemptMode", "OFF"), partition.get("PartitionName", "?")
        if mode != "OFF" and partition.get("GraceTime", "0") == "0":
            fix = f"ask for GraceTime=120 in partition {name}; until then save often: only periodic checkpoints count"
            says = f"partition {name} preempts ({mode}) with GraceTime 0: there is no time to save"
            found.append(Finding("GraceTime", "problem", says, fix))
        elif mode != "OFF":
            found.append(Finding("GraceTime", "ok", f"partition {name} gives {partition['GraceTime']} s before a preemption"))
    if facts.get("PreemptMode", "OFF") != "OFF" and "send_user_signal" not in str(facts.get("PreemptParameters")):
        says = (
            "--signal is not sent on a preemption (PreemptParameters lacks send_user_signal), only SIGTERM, and to steps alone"
        )
        found.append(
            Finding(
                "PreemptParameters",
                "warning",
                says,
                "run the launcher as a step: srun wbdist launch (wbdist submit slurm does)",
            )
        )
    if facts.get("JobRequeue") == "0":
        found.append(
            Finding(
                "JobRequeue",
                "warning",
                "jobs are not requeued by default here",
                "sbatch --requeue (wbdist submit slurm sets it)",
            )
        )
    return found


def _scontrol(env: Mapping[str, str], *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], env=dict(env), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def aws(env: Mapping[str, str] | None = None, vendor: Path = Path("/sys/class/dmi/id/sys_vendor")) -> list[Finding]:
    """On EC2: whether the metadata service, which gives the notice, can be heard from here."""
    env = os.environ if env is None else env
    base = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "")
    if not base:
        try:
            if "Amazon EC2" not in vendor.read_text():
                return []
        except OSError:
            return []
    session = requests.Session()
    session.trust_env = False  # a proxy cannot reach a link-local address
    try:
        answer = session.put(
            f"{base or METADATA}/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}, timeout=SECONDS
        )
        answer.raise_for_status()
    except requests.RequestException as error:
        change = "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2 --instance-id ..."
        fix = f"in a container: {change}, or use the host's network"
        says = f"this is EC2, but the metadata service gives no token ({type(error).__name__}): spot notices will not be heard"
        return [Finding("metadata", "problem", says, fix)]
    return [Finding("metadata", "ok", "the EC2 metadata service answers: spot notices will be heard")]


def clock(base_url: str | None) -> list[Finding]:
    """This machine's clock against the server's."""
    if not base_url:
        return []
    try:
        began = time.time()
        answer = requests.get(base_url, timeout=SECONDS)
        theirs = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (requests.RequestException, KeyError, ValueError) as error:
        fix = "runs are kept on disk meanwhile; wbdist sync ships them"
        return [Finding("server", "warning", f"{base_url} does not answer ({type(error).__name__})", fix)]
    skew = (began + time.time()) / 2 - theirs - 0.5  # the header has whole seconds
    if abs(skew) > SKEW:
        ahead = "ahead of" if skew > 0 else "behind"
        return [
            Finding("clock", "warning", f"this clock is {abs(skew):.0f} s {ahead} the server's", "synchronise it (chrony, NTP)")
        ]
    return [Finding("clock", "ok", f"this clock and that of {base_url} agree")]


def _name_of(address: str) -> object:
    return socket.getnameinfo((address, 0), 0)


def names(look_up: Callable[[str], object] = _name_of) -> list[Finding]:
    """How long it takes to find the name of a peer, which torch's stores do on the thread that answers all ranks."""
    mapped = "::ffff:127.0.0.1"
    worst = 0.0

    def ask() -> None:
        nonlocal worst
        for _ in range(10):  # a resolver that loses a query now and then is the usual case
            began = time.monotonic()
            with contextlib.suppress(OSError):
                look_up(mapped)
            worst = max(worst, time.monotonic() - began)

    asking = threading.Thread(target=ask, name="wbdist-doctor-names", daemon=True)
    asking.start()
    asking.join(SECONDS)
    if asking.is_alive() or worst > SLOW_NAME:
        took = f"over {SECONDS:.0f} s" if asking.is_alive() else f"{worst:.1f} s"
        says = f"looking up the name of {mapped} took {took}: torchrun's store does it at each connection, and all ranks wait"
        fix = f"echo '{mapped} localhost' >> /etc/hosts, and such a line (::ffff:ADDRESS NAME) for each host of the job"
        return [Finding("names", "warning", says, fix)]
    return [Finding("names", "ok", "the names of peers are found at once")]
