"""Saving and restoring a DDP job's state, beside torch's own ways, Lightning Fabric, Accelerate, and the machine's limits.

    python benchmarks/checkpoint.py [--megabytes 600] [--rounds 3] [--pairs 3] [--ranks 2] [--directory DIR] [--json]

Contenders, interleaved round by round in one set of processes (gloo); parameters and Adam's two moments, fp32. Each step of
the loop rewrites all of it and does one all-reduce, so a save in the background is paid for in what it takes from the steps.

- `stall`: seconds the loop was blocked by the call. `drag`: what the steps until the end of the save took beyond their usual
  time. `lost` = stall + drag. `total`: from the call until the bytes were safe, as the saver's own future or
  clock tells it, not as the loop sees it a step later. Fabric and Accelerate do not sync what they write: here it is.
- `limit_memcpy`: the bytes split over the ranks, each copying its part as one block into memory that was touched before, all at
  once. `limit_memcpy_tensors`: the same number of bytes, from the live tensors, a call each. The C library copies blocks of
  tens of MB past the caches, and single tensors through them: that is most of the difference, and a program cannot choose
  (its user can: docs/checkpoints.md, `GLIBC_TUNABLES`).
- `limit_write`: the bytes split over the ranks, written in one call and synced, all at once; `direct`: past the page cache;
  `busy`: the same in a thread, while the loop goes on, as an asynchronous saver has to.
- checksums: saves with and without, in turn, `--pairs` of them a round: the median difference of neighbours, and what a save
  waited for its digests after its bytes were safe.
- restore, one process: `torch.load(mmap=True)` + copy into live tensors against `Checkpointer.restore`, files in the page
  cache; what verifying every byte adds is said apart.

`first` is a contender's first save, where it starts its helpers and touches its buffers. Look at ratios within one table.
Fabric and Accelerate are in the extra `bench`; without it they are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.nn.parallel import DistributedDataParallel

from wbdist.checkpoint import files
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.core.position import RunPosition, Watermark
from wbdist.distributed.coordination import AloneCoordinator, connect
from wbdist.distributed.identity import RankIdentity

WIDTH = 1024
POSITION = RunPosition("bench", "p", "e", Watermark(1, {}, 0), {}, 0.0)

Done = Callable[[], float | None]
"""When a save was safe (`time.perf_counter`), None while it is not."""


def now() -> Done:
    """Of a save that blocks: done when it returns."""
    at = time.perf_counter()
    return lambda: at


def sync(path: Path) -> None:
    """For savers that leave it to the system."""
    for found in [*path.rglob("*"), path]:
        fd = os.open(found, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def model_of(megabytes: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model whose state, with Adam's, has about so many MB."""
    layers = max(1, megabytes * 1_000_000 // (12 * WIDTH * (WIDTH + 1)))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [slot[key] for slot in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return [*(p.detach() for p in model.parameters()), *moments]


class Bench:
    """One rank."""

    def __init__(self, rank: int, ranks: int, megabytes: int, directory: Path) -> None:
        self.rank, self.ranks, self.directory = rank, ranks, directory
        torch.manual_seed(1)
        self.model, self.optimizer = model_of(megabytes)
        self.ddp = DistributedDataParallel(self.model)
        self.tensors = state_of(self.model, self.optimizer)
        self.bytes = sum(tensor.nbytes for tensor in self.tensors)
        self.group = dist.new_group(backend="gloo")
        self.small = torch.ones(64)
        self.stager = DefaultStager(
            StagingOptions(use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False)
        )
        self.shared = DefaultStager(
            StagingOptions(use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False)
        )
        self.coordinator = connect(RankIdentity(rank=rank, world_size=ranks), "bench")
        self.checkpoints = Checkpointer(directory / "wbdist", self.coordinator, attempt=1, keep_last=1)
        self.checkpoints.track(model=self.ddp, optimizer=self.optimizer)
        self.number = 0
        self.waited = 0.0
        self._time_digests()
        share = self.bytes // ranks // 4096 * 4096
        self.source = torch.ones(share, dtype=torch.uint8)
        # Page-aligned, so that it can also be written past the page cache.
        self.region = torch.frombuffer(mmap.mmap(-1, share, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
        self.region.fill_(1)
        self.parts: list[tuple[int, torch.Tensor]] = []
        start = 0
        for tensor in self.tensors[rank::ranks]:
            self.parts.append((start, tensor.view(-1)[: (share - start) // 4]))
            start += self.parts[-1][1].nbytes
        self.peers = self._peers()

    def _peers(self) -> tuple[str, ...]:
        """Those that are installed, made ready as their documentation says for a group that exists already."""
        found = []
        with contextlib.suppress(ImportError):
            from lightning_fabric import Fabric
            from lightning_fabric.plugins.environments import LightningEnvironment
            from lightning_fabric.strategies import DDPStrategy

            strategy = DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend="gloo")
            self.fabric_ = Fabric(accelerator="cpu", devices=self.ranks, strategy=strategy)
            self.fabric_.launch()
            found.append("fabric")
        with contextlib.suppress(ImportError):
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=True)
            # Without a DDP of its own: the state is what is saved, and it is this one.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.accelerator.prepare_optimizer(self.optimizer)
            found.append("accelerate")
        return tuple(found)

    def _time_digests(self) -> None:
        """Counts what saves wait for their digests; they ask for them when the bytes are safe."""
        asked = files._Digests.of

        def of(digests: files._Digests, path: Path) -> str:
            began = time.perf_counter()
            try:
                return asked(digests, path)
            finally:
                self.waited += time.perf_counter() - began

        files._Digests.of = of  # type: ignore[method-assign]

    def step(self) -> float:
        began = time.perf_counter()
        for tensor in self.tensors:
            tensor.mul_(1.0001)
        dist.all_reduce(self.small)
        return time.perf_counter() - began

    # Contenders: each starts a save ----------------------------------------------------------------------

    def wbdist(self, _: Path) -> Done:
        self.number += 1
        began = time.perf_counter()
        pending = self.checkpoints.save(self.number, POSITION, timeout=300)

        def done() -> float | None:
            if not pending.done():
                return None
            pending.wait(0)
            return began + pending.stall_s + pending.write_s

        return done

    def wbdist_no_checksum(self, path: Path) -> Done:
        hashing = files._Digests.run
        files._Digests.run = lambda self: self._found.update(dict.fromkeys(self._files, ""))  # type: ignore[method-assign]
        done = self.wbdist(path)

        def restored() -> float | None:
            at = done()
            if at is not None:
                files._Digests.run = hashing  # type: ignore[method-assign]
            return at

        return restored

    def torch_save(self, path: Path) -> Done:
        if self.rank == 0:
            with (path / "state.pt").open("wb") as file:
                torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier()
        return now()

    def fabric(self, path: Path) -> Done:
        self.fabric_.save(path / "state.ckpt", {"model": self.ddp, "optimizer": self.optimizer})
        if self.rank == 0:
            sync(path)
        dist.barrier()
        return now()

    def accelerate(self, path: Path) -> Done:
        self.accelerator.save_state(str(path))
        dist.barrier()
        if self.rank == 0:
            sync(path)
        dist.barrier()
        return now()

    def _dcp_state(self) -> dict[str, Any]:
        return {"model": get_model_state_dict(self.ddp), "optimizer": get_optimizer_state_dict(self.ddp, self.optimizer)}

    def dcp_save(self, path: Path) -> Done:
        dcp.save(self._dcp_state(), checkpoint_id=path, process_group=self.group)
        return now()

    def dcp_async(self, path: Path) -> Done:
        return self._dcp_async(path, AsyncCheckpointerType.THREAD, self.stager)

    def dcp_process(self, path: Path) -> Done:
        return self._dcp_async(path, AsyncCheckpointerType.PROCESS, self.shared)

    def _dcp_async(self, path: Path, kind: AsyncCheckpointerType, stager: DefaultStager) -> Done:
        answer: Any = dcp.async_save(
            self._dcp_state(),
            checkpoint_id=path,
            process_group=self.group,
            async_checkpointer_type=kind,
            async_stager=stager,
        )
        future = getattr(answer, "upload_completion", answer)
        at: list[float] = []
        future.add_done_callback(lambda _: at.append(time.perf_counter()))

        def done() -> float | None:
            if not at:
                return None
            future.result()
            return at[0]

        return done

    # Limits ----------------------------------------------------------------------------------------------

    def limit_memcpy(self, _: Path) -> Done:
        ctypes.memmove(self.region.data_ptr(), self.source.data_ptr(), self.source.nbytes)
        return now()

    def limit_memcpy_tensors(self, _: Path) -> Done:
        for start, tensor in self.parts:
            ctypes.memmove(self.region.data_ptr() + start, tensor.data_ptr(), tensor.nbytes)
        return now()

    def limit_write(self, path: Path, flags: int = 0) -> Done:
        fd = os.open(path / f"{self.rank}", os.O_WRONLY | os.O_CREAT | flags)
        data = self.region.numpy().data
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
        os.close(fd)
        return now()

    def limit_write_direct(self, path: Path) -> Done:
        return self.limit_write(path, os.O_DIRECT)

    def limit_write_busy(self, path: Path) -> Done:
        at: list[float | None] = []
        threading.Thread(target=lambda: at.append(self.limit_write_direct(path)())).start()
        return lambda: at[0] if at else None

    # One measurement --------------------------------------------------------------------------------------

    def measure(self, name: str, base: float) -> dict[str, float]:
        path = self.directory / f"{name}-{time.time_ns() if self.rank == 0 else 0}"
        word = [str(path)]
        dist.broadcast_object_list(word)
        path = Path(word[0])
        path.mkdir(exist_ok=True)
        dist.barrier()
        self.waited = 0.0
        began = time.perf_counter()
        done: Done = getattr(self, name)(path)
        stall = time.perf_counter() - began
        steps, busy = [], torch.ones(1)
        while True:
            # All ranks stop after the same step; the time of asking is not counted.
            busy.fill_(1.0 if done() is None else 0.0)
            dist.all_reduce(busy)
            if not busy.item():
                break
            steps.append(self.step())
        drag = sum(steps) - base * len(steps)
        safe = done()
        assert safe is not None
        self.checkpoints.wait(300)
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path)
        dist.barrier()
        found = torch.tensor([stall, max(drag, 0.0), safe - began, self.waited], dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return {
            "stall": found[0].item(),
            "drag": found[1].item(),
            "lost": (found[0] + found[1]).item(),
            "total": found[2].item(),
            "waited": found[3].item(),
        }


LIMITS = ("limit_memcpy", "limit_memcpy_tensors", "limit_write", "limit_write_direct", "limit_write_busy")
OURS = ("wbdist", "wbdist_no_checksum")
PEERS = ("dcp_process", "dcp_async", "dcp_save", "torch_save", "fabric", "accelerate")


def one_rank(rank: int, options: argparse.Namespace, directory: str, port: int, results: Any) -> None:
    ranks, megabytes, rounds = options.ranks, options.megabytes, options.rounds
    torch.set_num_threads(1)
    # What the peers look for, as torchrun would set it.
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in there.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    bench = Bench(rank, ranks, megabytes, Path(directory))
    here = [name for name in PEERS if name in bench.peers or name not in ("fabric", "accelerate")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*LIMITS, *OURS, *here)}
    usual: list[float] = []
    for turn in range(rounds + 1):
        # Ours between the peers, and each of the two first as often as the other.
        pairs = [name for pair in range(options.pairs) for name in OURS[:: 1 if (turn + pair) % 2 else -1]]
        for name in (*LIMITS, *pairs[: len(pairs) // 2], *here, *pairs[len(pairs) // 2 :]):
            usual += [bench.step() for _ in range(5)]
            found[name].append(bench.measure(name, statistics.median(usual[-25:])))
    # What was saved without checksums would not be restored.
    bench.wbdist(Path())
    bench.checkpoints.close()
    if rank == 0:
        results.put((found, bench.bytes, statistics.median(usual)))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # the process executor's helper is killed with us, not joined


def restoring(megabytes: int, rounds: int, directory: Path) -> dict[str, float]:
    """Seconds, medians; one process, files in the page cache."""
    model, optimizer = model_of(megabytes)
    live = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(live, directory / "state.pt")
    times: dict[str, list[float]] = {"torch": [], "restore": [], "verify": []}
    for path in [directory / "state.pt", *(directory / "wbdist").rglob("*.safetensors")]:
        path.read_bytes()
    for attempt in range(2, rounds + 2):
        began = time.perf_counter()
        loaded = torch.load(directory / "state.pt", mmap=True, weights_only=True)
        model.load_state_dict(loaded["model"])
        for index, slot in loaded["optimizer"]["state"].items():
            for key, value in slot.items():
                live["optimizer"]["state"][index][key].copy_(value)
        times["torch"].append(time.perf_counter() - began)
        del loaded
        checkpoints = Checkpointer(directory / "wbdist", AloneCoordinator(), attempt=attempt)
        checkpoints.track(model=model, optimizer=optimizer)
        began = time.perf_counter()
        checkpoints.choose(300)
        times["verify"].append(time.perf_counter() - began)
        began = time.perf_counter()
        assert checkpoints.restore(300) is not None
        times["restore"].append(time.perf_counter() - began)
        checkpoints.close()
        live = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3, help="our saves a round, with and without checksums")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--directory", default=None, help="on the disk to measure; default: the system's temporary directory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=one_rank, args=(rank, options, directory, port, results)) for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit("a rank failed")
        found, size, usual = results.get()
        restored = restoring(options.megabytes, options.rounds, Path(directory))
    later = {name: runs[options.pairs if name in OURS else 1 :] for name, runs in found.items()}
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {"first": found[name][0]["stall"]}
        for name, runs in later.items()
    }
    without = later["wbdist_no_checksum"]
    hashed = statistics.median(a["total"] - b["total"] for a, b in zip(later["wbdist"], without, strict=True))
    if options.json:
        print(json.dumps({"bytes": size, "step": usual, "saves": middle, "checksums": hashed, "restore": restored}))
        return
    load = os.getloadavg()[0]
    print(f"{size / 1e6:.0f} MB on {options.ranks} ranks, {options.rounds} rounds, a step {usual:.3f} s, load {load:.1f}\n")
    print(f"{'':20} {'stall':>8} {'drag':>8} {'lost':>8} {'total':>8} {'first':>8}")
    for name, row in middle.items():
        print(f"{name:20} " + " ".join(f"{row[key]:8.3f}" for key in ("stall", "drag", "lost", "total", "first")))
    for name in PEERS:
        if name not in middle:
            print(f"{name:20} not installed (extra `bench`)")
    peers = [middle[name] for name in PEERS if name in middle]
    ours = middle["wbdist"]
    print(f"\nstall: {ours['stall'] / min(p['stall'] for p in peers):.2f} of the best peer's, ", end="")
    print(f"{ours['stall'] / middle['limit_memcpy']['stall']:.2f} of the memcpy as one block, ", end="")
    print(f"{ours['stall'] / middle['limit_memcpy_tensors']['stall']:.2f} of the memcpy of the tensors")
    print(f"lost: {ours['lost'] / min(p['lost'] for p in peers):.2f} of the best peer's")
    print(f"total: {ours['total'] / middle['limit_write_direct']['total']:.2f} of the raw write past the page cache, ", end="")
    print(f"{ours['total'] / middle['limit_write_busy']['total']:.2f} of the same beside the steps, ", end="")
    print(f"{ours['total'] / middle['limit_write']['total']:.2f} of the one through the page cache")
    print(
        f"checksums: {hashed / ours['total']:+.1%} of the save ({len(without)} pairs); waited for {ours['waited'] * 1e3:.1f} ms"
    )
    print(f"restore: {restored['restore']:.3f} s, torch.load + copy {restored['torch']:.3f} s: ", end="")
    print(f"{restored['restore'] / restored['torch']:.2f}; verifying before it {restored['verify']:.3f} s")


if __name__ == "__main__":
    main()
