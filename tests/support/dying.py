"""Processes that save checkpoints and are killed at a chosen system call: real SIGKILL, forked off a server that has
torch loaded and no threads (forking the test process itself would copy locks that its threads hold)."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import alone
from support.training import Training, position

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.files import FileLayer
from wbdist.distributed.coordination import connect
from wbdist.distributed.identity import RankIdentity
from wbdist.errors import PeerLostError

LIFE = 30
"""Seconds after which such a process is killed by the kernel, whatever becomes of the test."""
CALLS = frozenset({"make_directory", "create", "write", "sync_file", "sync_directory", "rename", "link", "remove_tree"})


def context() -> ForkServerContext:
    """A fork server that has this module loaded, and torch's part for sharding."""
    chosen = mp.get_context("forkserver")
    chosen.set_forkserver_preload(["support.dying", "support.fsdp"])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not hand sys.path to the server, and preloading then fails without a word.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return chosen


def ended(process: BaseProcess) -> int:
    """How it ended: the exit code, or minus the signal that killed it."""
    process.join(LIFE + 5)
    code = process.exitcode
    assert code is not None, f"process {process.pid} still runs"
    process.close()  # type: ignore[attr-defined]  # (in every context's class)
    return code


class Killer(FileLayer):
    """Kills its process just before the n-th system call from now on, or right after it."""

    def __init__(self) -> None:
        self.calls, self.at, self.after = 0, 0, False

    def arm(self, at: int, *, after: bool = False) -> None:
        self.calls, self.at, self.after = 0, at, after

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CALLS:
            return found

        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self.at and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = found(*args)
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def save_three(directory: Path, at: int, after: bool) -> int:
    """Commits steps 1 and 2, then saves step 3, which also removes step 1, and dies at its system call `at` (0: never)."""
    signal.alarm(LIFE)
    model, killer = torch.nn.Linear(2, 2), Killer()
    checkpoints = Checkpointer(directory, alone(), attempt=1, layer=killer)
    checkpoints.track(model=model)
    for step in (1, 2, 3):
        torch.nn.init.constant_(model.weight, step)
        killer.arm(at if step == 3 else 0, after=after)
        checkpoints.save(step, position(step), block=True, timeout=20)
    checkpoints.close()
    signal.alarm(0)
    return killer.calls


def one_life(directory: Path, attempt: int, at: int, steps: int, results: Any) -> None:
    """Trains to `steps`, saving every step in the background, and dies at the system call `at`; else tells its final state."""
    signal.alarm(LIFE)
    killer = Killer()
    training = Training(alone(), directory, attempt=attempt, layer=killer)
    training.track()
    training.restore()
    killer.arm(at)
    training.train(steps, save_at=tuple(range(steps + 1)))
    training.checkpoints.close()
    killer.arm(0)
    training.losses = []
    results.put(training.everything())
    results.close()
    results.join_thread()


def one_rank(directory: Path, rank: int, attempt: int, port: int) -> None:
    """One of two ranks over a real store. Attempt 1: rank 1 dies in its save of step 4. Attempt 2: both go on to step 6."""
    signal.alarm(LIFE)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    coordinator = connect(RankIdentity(rank=rank, world_size=2), f"attempt-{attempt}", 20, env)
    killer = Killer()
    training = Training(coordinator, directory, attempt=attempt, layer=killer, same_data=True)
    training.track()
    restored = training.restore()
    if attempt == 1:
        assert restored is None
        training.train(3)
        training.checkpoints.save(3, position(3), block=True, timeout=20)
        training.train(4)
        if rank == 1:
            killer.arm(5)
            training.checkpoints.save(4, position(4), block=True, timeout=20)
        with pytest.raises(PeerLostError, match="rank 1"):
            training.checkpoints.save(4, position(4), block=True, timeout=1)
    else:
        assert (restored.step, restored.notes) == (3, ())
        training.train(6)
        training.checkpoints.save(6, position(6, 2), timeout=20)
    training.checkpoints.close()
    coordinator.close()


def one_of_ddp(directory: Path, rank: int, life: tuple[int, int, int, int], port: int, results: Any) -> None:
    """One rank of a real DDP training that saves in the background. `life` = (ranks, attempt, step to be killed after or 0,
    steps): all ranks die by SIGKILL at once, after saving each of the last steps; a life without a kill saves now and then,
    and tells what it began with and its final state."""
    import torch.distributed as dist

    signal.alarm(100)
    torch.set_num_threads(1)
    ranks, attempt, kill_after, steps = life
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    coordinator = connect(RankIdentity(rank=rank, world_size=ranks), f"attempt-{attempt}")
    training = Training(coordinator, directory, attempt=attempt)
    training.model = torch.nn.parallel.DistributedDataParallel(training.model)
    training.track("average")
    training.checkpoints.track(per_rank=True, average=training.average)  # of this rank's outputs
    restored = training.restore()
    began = 0 if restored is None else restored.step
    training.train(kill_after or steps, save_at=tuple(range(kill_after - 3, steps) if kill_after else range(0, steps, 10)))
    if kill_after:
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    training.checkpoints.close()
    results.put((rank, began, training.everything()))
    results.close()
    results.join_thread()
    coordinator.close()
    dist.destroy_process_group()
