"""From the death of a rank to the first step of the next attempt, by phases, beside a bare torchrun restart in the same run.

    python benchmarks/recovery.py [--rounds 5] [--job]

Two gloo ranks of an empty job: nothing but all-reduces, so that what is measured is the restart. Rank 1 is killed with SIGKILL.
With --job the script is a `wbdist.job` that has committed a checkpoint (without a server), under both launchers. torchrun gets
the c10d rendezvous and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which torch 2.13 often does not recover at all. Medians of
the rounds, contenders interleaved; what is compared to is torchrun's median in the same rounds.

    noticed     the launcher has seen the death
    gone        the other rank's process is gone
    script      both new ranks run the script's first line
    group       both have imported torch and have a process group
    step        both have made their first step
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
from common.launchers import has_standby, until

BARE = """
import time
began = time.time()
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo")
grouped = time.time()
ones = torch.ones(1)
dist.all_reduce(ones)
stepped = time.time()
if "WBDIST_INTENT_DIR" in os.environ:  # as a job does after a commit: no pause before the restart
    from wbdist.launch import intent
    intent.write_progress(int(os.environ["WBDIST_RESTART"]))
Path(sys.argv[1], f"{dist.get_rank()}.{os.getpid()}").write_text(f"{began} {grouped} {stepped}")  # from now on it is killed
while True:
    dist.all_reduce(ones)
    time.sleep(0.01)
"""
JOB = """
import time
began = time.time()
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.utils.data import TensorDataset
import wbdist
os.chdir(sys.argv[1])
with wbdist.job(project="empty", checkpoint_dir="ckpt", save_every=1, mode="offline") as job:
    grouped = time.time()
    data = job.loader(TensorDataset(torch.arange(100_000)), 1)
    ones = torch.nn.Parameter(torch.ones(1))
    job.track(model=torch.nn.ParameterList([ones]), data=data)
    first = True
    for x, in job.steps(data, epochs=100):
        dist.all_reduce(ones.data)
        if first:
            stepped = time.time()
        elif not Path(sys.argv[1], f"{job.rank}.{os.getpid()}").exists() and job.step > 3:  # something is committed by now
            Path(sys.argv[1], f"{job.rank}.{os.getpid()}").write_text(f"{began} {grouped} {stepped}")
        first = False
        time.sleep(0.01)
"""
OURS = ["-m", "wbdist", "launch", "--nproc", "2"]
COMMANDS = {
    "warm": [*OURS, "--standby-after", "0"],
    "cold": OURS,
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"],
}
PHASES = ("noticed", "gone", "script", "group", "step")


class Job:
    def __init__(self, contender: str, script: Path) -> None:
        self.marks = Path(tempfile.mkdtemp())
        self.noticed: list[float] = []
        self.process = subprocess.Popen(
            [sys.executable, *COMMANDS[contender], str(script), str(self.marks)],
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "SIGKILL" in line or "exitcode: -9" in line:
                self.noticed.append(time.time())

    def marked(self, after: float) -> list[tuple[int, list[float]]]:
        """(pid, times) by rank, of those that made their first step after `after`."""
        found = []
        for path in sorted(self.marks.glob("[01].*")):
            times = [float(word) for word in path.read_text().split()]
            if len(times) == 3 and times[2] > after:
                found.append((int(path.name[2:]), times))
        return found

    def end(self) -> None:
        processes = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.kill()
        for process in processes:
            if process.is_running():
                process.kill()
        self.process.wait()


def recover(contender: str, script: Path) -> dict[str, float]:
    job = Job(contender, script)
    try:
        until(lambda: len(job.marked(0)) == 2, "the first attempt")
        if contender == "warm":
            until(lambda: has_standby(job.process), "the standby")
        survivor, victim = (pid for pid, _ in job.marked(0))
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        gone = [0.0]

        def survivor_is_gone() -> bool:
            if not psutil.pid_exists(survivor) or psutil.Process(survivor).status() == psutil.STATUS_ZOMBIE:
                gone[0] = time.time()
            return bool(gone[0])

        until(survivor_is_gone, "the other rank's end")
        until(lambda: len(job.marked(killed)) == 2, "the next attempt")
        began, grouped, stepped = (max(times) for times in zip(*(times for _, times in job.marked(killed)), strict=True))
        ends = dict(zip(PHASES, [*job.noticed[:1], gone[0], began, grouped, stepped], strict=False))
        if not job.noticed:
            ends = dict(zip(PHASES[1:], [gone[0], began, grouped, stepped], strict=True))
        return {name: at - killed for name, at in ends.items()}
    finally:
        job.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "script.py"
        script.write_text(JOB if args.job else BARE)
        values: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in COMMANDS}
        for _ in range(args.rounds):
            for name in COMMANDS:
                try:
                    found = recover(name, script)
                except TimeoutError as error:
                    print(f"{name}: hung waiting for {error}", flush=True)
                    continue
                print(f"  {name}: " + "  ".join(f"{phase} {seconds:.3f}" for phase, seconds in found.items()), flush=True)
                for phase, seconds in found.items():
                    values[name][phase].append(seconds)
    print(f"load {os.getloadavg()[0]:.1f}; seconds after the kill, medians of {args.rounds} rounds")
    for name, phases in values.items():
        print(f"{name:<9}", "  ".join(f"{phase} {statistics.median(phases[phase]):6.3f}" for phase in PHASES if phases[phase]))
    if values["torchrun"]["step"] and values["warm"]["step"]:
        ratio = statistics.median(values["warm"]["step"]) / statistics.median(values["torchrun"]["step"])
        print(f"kill -> first step, warm: {ratio:.3f} of torchrun's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
