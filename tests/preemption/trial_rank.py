"""One rank of the stop trials: whole jobs, one after the other, each told to stop at a random moment, and each started again.

All ranks draw the same plan from (seed, trial). Every rank is a host of its own, so any of them may hear any source. For each
trial one line of JSON says where this rank stopped and where it went on.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import wbdist
from wbdist.hooks.loader import ResumableLoader
from wbdist.hooks.lookahead import Arrival
from wbdist.job import Preempted
from wbdist.preemption.aws import BASE_URL, AwsSource
from wbdist.preemption.file import FileSource
from wbdist.preemption.notice import Notice
from wbdist.preemption.rehearsal.aws import AwsMetadata
from wbdist.preemption.rehearsal.gcp import GcpMetadata

MOMENTS = ("train", "eval", "wait", "save", "commit", "starved")
"""`starved`: no more data comes to this rank, for good; as from a worker process (real ones are in test_data_waits.py)."""
SOURCES = ("SIGTERM", "SIGUSR2", "file", "aws", "gcp", "deadline")
AFTER_RESUME = 3
"""Steps of the second life."""

# Sources look often, so that a trial takes tenths of a second; nothing else is changed.
AwsSource.__init__.__defaults__ = (BASE_URL, 0.05)  # type: ignore[misc]
FileSource.__init__.__defaults__ = (0.05,)  # type: ignore[misc]


class Plan:
    """What befalls one trial."""

    def __init__(self, seed: int, trial: int, world: int) -> None:
        rng = random.Random(f"{seed}/{trial}/{world}")
        self.victims = {
            rank: (rng.choice(SOURCES), rng.choice(MOMENTS), rng.randrange(2, 12), rng.random() * 0.01)
            for rank in rng.sample(range(world), rng.choice([1, 1, 1, 2, world]))
        }
        """rank -> source, moment, not before which step, seconds later."""
        self.ahead = any(moment == "starved" for _, moment, _, _ in self.victims.values())
        """The ranks hold a batch ahead, as with workers."""
        self.advised = {rng.randrange(world): rng.randrange(0, 8)} if rng.random() < 0.3 else {}
        self.pace = [rng.choice([0.0, 0.0005, 0.002]) for _ in range(world)]
        self.save_every = rng.choice([2, 3, 5])
        self.eval_every = rng.choice([2, 3])
        self.eval_batches = rng.randrange(1, 6)


class Life:
    """The first life of one trial on this rank."""

    def __init__(self, plan: Plan, rank: int, directory: Path, services: ExitStack) -> None:
        self.plan, self.rank, self.directory = plan, rank, directory
        self.job: Any = None
        self._due = plan.victims.get(rank)
        source = self._due[0] if self._due else ""
        self._stop_file = directory.with_suffix(f".stop{rank}")
        self.notices = "off"
        if source == "file":
            self.notices = f"file={self._stop_file}"
        if source == "aws":
            self._aws = services.enter_context(AwsMetadata())
            os.environ["WBDIST_AWS_METADATA"] = self._aws.url
            self.notices = "aws"
        if source == "gcp":
            self._gcp = services.enter_context(GcpMetadata())
            os.environ["WBDIST_GCP_METADATA"] = self._gcp.url
            self.notices = "gcp=120"

    def at(self, moment: str) -> None:
        """The rank is at such a moment."""
        if self._due is None or self.job is None:
            return
        source, wanted, step, delay = self._due
        if moment == wanted != "starved" and self.job.step >= step:
            self._due = None
            threading.Timer(delay, self._tell, (source,)).start() if delay > 0.005 else self._tell(source)

    def starves(self, number: int) -> bool:
        """Whether batch `number` does not come; tells, when it is so."""
        if self._due is None or self._due[1] != "starved" or number <= self._due[2]:
            return False
        source, _, _, delay = self._due
        threading.Timer(delay, self._tell, (source,)).start()
        return True

    def _tell(self, source: str) -> None:
        tell: dict[str, Callable[[], object]] = {
            "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
            "SIGUSR2": lambda: os.kill(os.getpid(), signal.SIGUSR2),
            "file": self._stop_file.touch,
            "aws": self._interrupt_aws,
            "gcp": self._preempt_gcp,
            "deadline": lambda: self.job._hub.tell(Notice("test", "soon", time.monotonic(), time.time() + 60)),
        }
        tell[source]()

    def _interrupt_aws(self) -> None:
        self._aws.interrupt()

    def _preempt_gcp(self) -> None:
        self._gcp.preempt()

    def advise(self) -> None:
        if self.plan.advised.get(self.rank) == self.job.step:
            self.job._hub.tell(Notice("test", "maybe", time.monotonic(), advice=True))


class Waits(Dataset[torch.Tensor]):
    """Data that this rank sometimes has to wait for."""

    def __init__(self, life: Life | None) -> None:
        self._life = life

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._life is not None:
            self._life.at("wait")
            time.sleep(self._life.plan.pace[self._life.rank])
        return torch.tensor([float(index % 7)])


class Ahead(ResumableLoader):
    """Holds a batch ahead, as a loader with workers does, and may get no more."""

    life: Life
    looks_ahead = True

    def _arriving(self, epoch: int | None = None) -> Iterator[Arrival | None]:
        for number, arrival in enumerate(super()._arriving(epoch), 1):
            if self.life.starves(number):
                while True:
                    time.sleep(0.002)
                    yield None
            yield arrival


class Slow:
    """State that is captured in the middle of a save."""

    def __init__(self, life: Life | None) -> None:
        self._life = life

    def state_dict(self) -> dict[str, int]:
        if self._life is not None:
            self._life.at("save")
            threading.Timer(0.002, self._life.at, ("commit",)).start()
        return {"x": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {"x": 1}


def together() -> None:
    """A collective: hangs unless every rank comes."""
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1))


def live(directory: Path, life: Life | None) -> tuple[int, int, int]:
    """One life of a job: the step it began at, the one it ended at, its exit code."""
    began = -1
    try:
        with wbdist.job(
            project="trials",
            checkpoint_dir=directory,
            save_every=life.plan.save_every if life else None,
            strategy="per_rank",
            mode="disabled",
            notices=life.notices if life else "off",
        ) as job:
            model = nn.Linear(1, 1)
            nn.init.zeros_(model.weight)
            nn.init.zeros_(model.bias)
            data = job.loader(Waits(life), batch_size=1, seed=0)
            if life is not None and life.plan.ahead:
                data = Ahead(Waits(life), 1, rank=job.rank, world_size=job.world_size, seed=0)
                data.life = life
            job.track(model=model, slow=Slow(life), data=data)
            began = job.step
            if life is not None:
                life.job = job
            for x in job.steps(data, epochs=1):
                together()
                model(x)
                if life is None:
                    if job.step == began + AFTER_RESUME - 1:
                        break
                    continue
                life.advise()
                life.at("train")
                if job.step % life.plan.eval_every == 0:
                    for _ in range(life.plan.eval_batches):
                        if job.should_stop():
                            break
                        life.at("eval")
                        together()
    except Preempted as stop:
        return began, job.step, int(stop.code or 0)
    return began, job.step, 0


def main() -> None:
    rank, world, port, seed, first, count = (int(word) for word in sys.argv[1:7])
    root = Path(sys.argv[7])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WANDB_SILENT": "true"}
    logging.getLogger("wbdist").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for trial in range(first, first + count):
        plan = Plan(seed, trial, world)
        directory = root / f"t{trial}"
        with ExitStack() as services:
            os.environ["WBDIST_INCARNATION"] = f"{trial}a"
            stopped = live(directory, Life(plan, rank, directory, services))
        os.environ["WBDIST_INCARNATION"] = f"{trial}b"
        resumed = live(directory, None)
        print(json.dumps({"trial": trial, "stopped": stopped, "resumed": resumed}), flush=True)


if __name__ == "__main__":
    main()
