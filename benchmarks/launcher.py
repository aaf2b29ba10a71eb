"""`wbdist launch` against torchrun on one host: memory, recovery, exit codes, orphans.

    python benchmarks/launcher.py [--rounds 5]

Both run the same script on 2 gloo ranks; it is a job of nothing but all-reduces that exits 75 on SIGTERM. torchrun gets
the c10d rendezvous and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which torch 2.13 often does not recover at all. Medians of
the rounds, contenders interleaved. `wbdist launch` runs with --standby-after 0 and is killed when its standby process is
ready, whose memory is in "launcher MiB".
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from common.launchers import has_standby, until

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: stop.append(1))
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
flag = torch.zeros(1)
first = True
while True:
    flag[0] = len(stop)
    dist.all_reduce(flag)
    if first:
        Path(sys.argv[1], f"{rank}.{os.getpid()}").write_text(repr(time.time()))
        if "WBDIST_INTENT_DIR" in os.environ:  # as a job does after a commit: no pause before the restart
            from wbdist.launch import intent
            intent.write_progress(int(os.environ["WBDIST_RESTART"]))
        first = False
    if flag[0]:
        os._exit(75)
    time.sleep(0.01)
"""
COMMANDS = {
    "wbdist launch": ["-m", "wbdist", "launch", "--nproc", "2", "--standby-after", "0"],
    "without standby": ["-m", "wbdist", "launch", "--nproc", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"],
}


class Job:
    def __init__(self, contender: str, script: Path) -> None:
        self.marks = Path(tempfile.mkdtemp())
        self.began = time.time()
        self.process = subprocess.Popen(
            [sys.executable, *COMMANDS[contender], str(script), str(self.marks)],
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def steps(self) -> dict[int, tuple[int, float]]:
        """Newest first step by rank: (pid, when)."""
        found: dict[int, tuple[int, float]] = {}
        for path in self.marks.iterdir():
            text = path.read_text()
            if text:
                rank, pid = (int(part) for part in path.name.split("."))
                found[rank] = max(found.get(rank, (0, 0.0)), (pid, float(text)), key=lambda entry: entry[1])
        return found

    def wait_for_step(self, after: float) -> float:
        """Seconds from `after` until both ranks have made a step."""
        until(lambda: sum(when > after for _, when in self.steps().values()) == 2, "a step")
        return max(when for _, when in self.steps().values()) - after

    def ranks(self) -> list[int]:
        return [pid for _, (pid, _) in sorted(self.steps().items())]

    def end(self) -> None:
        alive = [psutil.Process(pid) for pid in self.ranks() if psutil.pid_exists(pid)]
        if self.process.poll() is None:
            alive += psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        for process in alive:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
        self.process.wait()


def memory(job: Job) -> float:
    """MiB of the launcher and its helpers, without the ranks: unique set size."""
    launcher = psutil.Process(job.process.pid)
    ranks = set(job.ranks())
    return sum(p.memory_full_info().uss for p in [launcher, *launcher.children()] if p.pid not in ranks) / 2**20


def recover(contender: str, script: Path) -> dict[str, float]:
    job = Job(contender, script)
    try:
        found = {"first step s": job.wait_for_step(job.began)}
        if contender == "wbdist launch":
            until(lambda: has_standby(job.process), "the standby")
        found["launcher MiB"] = memory(job)
        killed = time.time()
        os.kill(job.ranks()[1], signal.SIGKILL)
        found["kill -> step s"] = job.wait_for_step(killed)
    finally:
        job.end()
    return found


def stop(contender: str, script: Path, number: signal.Signals) -> str:
    """Exit code of the launcher, and how many ranks are alive 5 s after it was sent `number`."""
    job = Job(contender, script)
    try:
        job.wait_for_step(job.began)
        sent = time.monotonic()
        job.process.send_signal(number)
        code = job.process.wait(60)
        while time.monotonic() < sent + 5 and any(map(is_alive, job.ranks())):
            time.sleep(0.05)
        return f"exit {code}, {sum(map(is_alive, job.ranks()))} of 2 ranks left"
    finally:
        job.end()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "job.py"
        script.write_text(SCRIPT)
        values: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in COMMANDS}
        for _ in range(args.rounds):
            for name in COMMANDS:
                try:
                    found = recover(name, script)
                except TimeoutError:
                    found = {"hung": 1.0}
                for what, value in found.items():
                    values[name][what].append(value)
        for what in ("first step s", "kill -> step s", "launcher MiB", "hung"):
            cells = [f"{name} {statistics.median(v[what]):7.2f}" for name, v in values.items() if v[what]]
            if cells:
                print(f"{what:<16} {'   '.join(cells)}")
        again = {name: statistics.median(v["kill -> step s"]) for name, v in values.items() if v["kill -> step s"]}
        if len(again) == len(COMMANDS):
            print(f"kill -> step     {again['wbdist launch'] / again['torchrun']:.3f} of torchrun's")
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
            for name in ("wbdist launch", "torchrun"):
                print(f"{number.name:<16} {name}: {stop(name, script, number)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
