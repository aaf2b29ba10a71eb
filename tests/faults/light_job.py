"""The job that is killed, without torch: ranks, runs, launcher, shipper and server are the real ones, the model is an integer.

Its order of samples is a permutation a epoch, its state the mixture of all samples that all ranks have seen, in order: one
sample skipped, doubled or swapped anywhere changes the final state. A checkpoint is one file, committed by the rename of
its directory, with names as the Checkpointer's. Notes and pace as in `torch_job.py`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from file_coordinator import FileCoordinator
from pace import arguments, open_acks, take_time

from wbdist.checkpoint.claim import Claim
from wbdist.core.mixing import mix64
from wbdist.core.position import RunPosition
from wbdist.distributed import strategies
from wbdist.distributed.identity import detect
from wbdist.errors import Error, PeerLostError
from wbdist.launch import intent
from wbdist.run.init import make_spec
from wbdist.settings import resolve

PATIENCE = 30.0
"""Seconds for peers."""


class Checkpoint(msgspec.Struct):
    """State of the job after `step` steps."""

    step: int
    state: int
    positions: list[RunPosition]
    """By rank."""


class Peers(FileCoordinator):
    """Learns of a dead peer at once, as a collective would."""

    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(directory, rank, world_size)
        self.put(f"pid/{rank}", str(os.getpid()).encode())

    def get(self, key: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while (value := self.peek(key)) is None:
            for rank in range(self.world_size):
                pid = self.peek(f"pid/{rank}")
                if pid is not None and not Path(f"/proc/{pid.decode()}").exists():
                    raise PeerLostError(f"rank {rank} is gone; {key!r} does not come")
            if time.monotonic() > deadline:
                raise PeerLostError(f"{key!r} did not come within {timeout} s")
            time.sleep(0.001)
        return value

    def clone(self) -> Peers:
        return Peers(self._directory, self.rank, self.world_size)


def newest(directory: Path) -> Checkpoint | None:
    found = sorted(
        (path for path in directory.glob("step-*.a*") if path.suffix != ".tmp"),
        key=lambda path: [int(number) for number in path.name.removeprefix("step-").split(".a")],
    )
    return msgspec.json.decode((found[-1] / "state.json").read_bytes(), type=Checkpoint) if found else None


def save(directory: Path, attempt: int, checkpoint: Checkpoint) -> None:
    """Rank 0."""
    temporary = directory / f"step-{checkpoint.step}.a{attempt}.tmp"
    temporary.mkdir()
    with (temporary / "state.json").open("wb") as file:
        file.write(msgspec.json.encode(checkpoint))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(temporary.with_suffix(""))
    intent.write_progress(checkpoint.step)


def sample_of(number: int, epoch_length: int) -> int:
    epoch, place = divmod(number, epoch_length)
    order = list(range(epoch_length))
    random.Random(epoch).shuffle(order)
    return order[place]


def train(stack: ExitStack) -> None:
    args = arguments()
    me = detect()
    directory = Path(args.checkpoint_dir).absolute()
    keys = Path("keys").absolute() / os.environ["WBDIST_INCARNATION"]
    peers = Peers(keys, me.rank, me.world_size)
    peers.barrier("start", PATIENCE)
    spec = make_spec(resolve({"project": "faults", "run_name": args.name}), config={"lr": 0.01})
    told = b""
    if me.rank == 0:
        cause = os.environ["WBDIST_CAUSE"]
        patience = spec.settings.claim_timeout
        claim = Claim.take(
            directory, run_id=None, project=spec.project, entity="", name=args.name, cause=cause, timeout=patience
        )
        stack.callback(claim.release)
        start = newest(directory) or Checkpoint(0, 0, [])
        told = msgspec.json.encode((claim.job.run_id, claim.attempt.number, claim.attempt.nonce, claim.attempt.cause, start))
    agreed = msgspec.json.decode(peers.agree("plan", told or None, PATIENCE), type=tuple[str, int, str, str, Checkpoint])
    run_id, attempt, nonce, cause, start = agreed
    base = start.positions[me.rank] if start.positions else None
    spec = msgspec.structs.replace(spec, run_id=run_id, attempt=attempt, nonce=nonce, cause=cause, base=base, must_be_new=False)
    runs = strategies.open_runs(args.strategy, me, peers, spec)
    acks = open_acks(args, me.rank)
    state = start.state
    every = int(args.save_every.split()[0])
    for step in range(start.step, args.steps):
        sample = sample_of(step * me.world_size + me.rank, args.steps * me.world_size // args.epochs)
        samples = [int(word) for word in peers.gather(f"step/{step}", str(sample).encode(), PATIENCE)]
        state = mix64(state, *samples)
        # Sums of integers below 2**53, so that they are exact in whatever order ranks are added.
        runs.log({"sample": sample, "state": state >> 20}, step=step, reduce="sum")
        runs.log({"dice": mix64(step, me.rank) % 1000 / 8}, step=step)
        if step % 3 == 0:
            runs.log({"rare": float("nan") if step % 2 else 1.0, "word": f"step {step}"}, step=step, reduce="first")
        os.write(acks, b"%d %d\n" % (attempt, step))
        print(f"at step {step}", flush=True)
        runs.commit_row()
        if (step + 1) % every == 0 or step + 1 == args.steps:
            position = runs.drain(step, PATIENCE)
            positions = peers.gather(f"save/{step}", msgspec.json.encode(position), PATIENCE)
            if me.rank == 0:
                decoded = [msgspec.json.decode(word, type=RunPosition) for word in positions]
                save(directory, attempt, Checkpoint(step + 1, state, decoded))
            peers.barrier(f"saved/{step}", PATIENCE)
        take_time(args, step)
    runs.run.summary["weights"] = json.dumps(state)
    runs.finish(0)


def end(error: Any) -> int:
    code = error.exit_code if isinstance(error, Error) else 70
    intent.write(detect().rank, intent.Verdict(intent.word_for(code), code, f"{type(error).__name__}: {error}"))
    return code


if __name__ == "__main__":
    with ExitStack() as everything:
        try:
            train(everything)
        except Exception as problem:  # noqa: BLE001  (told to the supervisor, as a job does)
            import traceback

            traceback.print_exc()
            sys.exit(end(problem))
