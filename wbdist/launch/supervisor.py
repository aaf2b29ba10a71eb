"""Keeps the ranks of one job on this host alive, together, and leaves nothing behind.

One attempt after the other: start all ranks, wait (`attempt.py`), judge (`judgement.py`), start again or leave
(`policy.py`). The supervisor imports neither torch nor the run client, so it costs little more than an interpreter.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from wbdist.errors import UsageError
from wbdist.launch import intent, times
from wbdist.launch.attempt import Attempt, RankHandle, Signals, StartRanks
from wbdist.launch.judgement import Judgement, judge
from wbdist.launch.policy import Decision, OnPreempt, Policy
from wbdist.launch.requeue import requeue
from wbdist.launch.sentinel import Sentinel
from wbdist.launch.worker import LAUNCHER_PID

__all__ = ["LaunchSpec", "RankHandle", "StartRanks", "environments", "supervise"]


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to keep alive, and how hard to try."""

    nprocs: int
    name: str = "the job"
    """For messages."""
    max_restarts: int = 3
    """Restarts in a row without a new committed checkpoint."""
    grace: float = 30.0
    """Seconds the ranks have to save and leave after a signal."""
    on_preempt: OnPreempt = "exit"
    """`exit`: leave with 75 and let the scheduler requeue. `relaunch`: the machine stays, so start again in place. `requeue`:
    have Slurm queue its job again, and leave with 75."""

    def __post_init__(self) -> None:
        if self.nprocs < 1 or self.max_restarts < 0 or self.grace < 0:
            raise UsageError(
                f"nprocs={self.nprocs}, max_restarts={self.max_restarts}, grace={self.grace}: "
                "give 1 or more ranks, 0 or more restarts, 0 or more seconds"
            )


def supervise(
    spec: LaunchSpec,
    start_ranks: StartRanks,
    say: Callable[[str], None] | None = None,
    last_lines: Callable[[int], Sequence[str]] | None = None,
) -> int:
    """Main thread: runs the job to its end and returns its exit code (see the contract in docs/architecture.md).

    Blocks as long as the job runs. When it returns, or raises what `start_ranks` raised, no process of the ranks is alive.
    `say` gets one line for each thing worth knowing (default: standard error); `last_lines` gives the end of a rank's
    standard error, to show with its failure.
    """
    directory = Path(tempfile.mkdtemp(prefix="wbdist-launch-"))
    try:
        with Signals() as signals, Sentinel() as sentinel:
            supervisor = _Supervisor(
                spec,
                start_ranks,
                say=say or say_to_person,
                last_lines=last_lines,
                signals=signals,
                sentinel=sentinel,
                directory=directory,
            )
            return supervisor.run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def environments(spec: LaunchSpec, *, number: int, cause: str, intents: str, port: int) -> list[dict[str, str]]:
    """What each rank of attempt `number` (from 0) gets on top of our own environment, by rank."""
    common = {
        "WORLD_SIZE": str(spec.nprocs),
        "LOCAL_WORLD_SIZE": str(spec.nprocs),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WBDIST_INCARNATION": secrets.token_hex(8),
        "WBDIST_RESTART": str(number),
        "WBDIST_CAUSE": cause,
        "WBDIST_GRACE": f"{spec.grace:g}",
        "WBDIST_LAUNCHER": "1",
        LAUNCHER_PID: str(os.getpid()),
        intent.VARIABLE: intents,
    }
    if spec.nprocs > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Each rank would start a thread per core, and they would fight; torchrun does the same.
        common["OMP_NUM_THREADS"] = "1"
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(spec.nprocs)]


def say_to_person(line: str) -> None:
    """A line on standard error, marked as ours."""
    try:
        sys.stderr.write(f"wbdist launch: {line}\n")
        sys.stderr.flush()
    except OSError:
        return  # the terminal is gone, as after SIGHUP; the ranks still have to be looked after


class _Supervisor:
    def __init__(
        self,
        spec: LaunchSpec,
        start_ranks: StartRanks,
        *,
        say: Callable[[str], None],
        last_lines: Callable[[int], Sequence[str]] | None,
        signals: Signals,
        sentinel: Sentinel,
        directory: Path,
    ) -> None:
        self._spec, self._start_ranks, self._say, self._last_lines = spec, start_ranks, say, last_lines
        self._signals, self._sentinel, self._directory = signals, sentinel, directory
        self._policy = Policy(max_restarts=spec.max_restarts, on_preempt=spec.on_preempt)
        self._start = times.Start(times.process_began())
        """When this start of the ranks began, and what became of the one before."""

    def run(self) -> int:
        number, cause = 0, ""
        while True:
            again = f", attempt {number + 1}" if number else ""
            self._say(f"starting {self._spec.name} on {self._spec.nprocs} rank(s){again}")
            judgement, stopped_by = self._attempt(number, cause)
            decision = self._policy.decide(judgement, stopped_by)
            if judgement.culprit is not None and self._last_lines is not None:
                for line in self._last_lines(judgement.culprit):
                    self._say(f"  rank {judgement.culprit}: {line}")
            if decision.exit_code is None:
                decision = self._pause(decision)
            if decision.exit_code is not None:
                return leave_with(decision, self._say)
            number, cause = number + 1, judgement.why
            self._start = msgspec.structs.replace(self._start, began=times.now())

    def _attempt(self, number: int, cause: str) -> tuple[Judgement, int | None]:
        intents = self._directory / f"{number:04d}"
        intents.mkdir()
        port = free_port("127.0.0.1")
        told = environments(self._spec, number=number, cause=cause, intents=str(intents), port=port)
        ranks = self._start_ranks([{**one, **times.variables(self._start)} for one in told])
        last = self._policy.idle >= self._spec.max_restarts
        attempt = Attempt(
            ranks,
            grace=self._spec.grace,
            signals=self._signals,
            sentinel=self._sentinel,
            say=self._say,
            durable=None if last else lambda rank: intent.is_durable(rank, intents),
        )
        ends = attempt.run()
        ended = times.of_monotonic(min(end.at for end in ends))
        self._start = times.Start(self._start.began, self._start.began, ended)
        said = intent.read_all(intents)
        ends = [msgspec.structs.replace(end, said=said.get(end.rank)) for end in ends]
        self._policy.note(intent.read_progress(intents))
        return judge(ends, attempt.stopped_by, committed=self._policy.committed >= 0), attempt.stopped_by

    def _pause(self, decision: Decision) -> Decision:
        """Before the next attempt: `decision`, or another one when a signal says that there is to be none."""
        self._say(decision.sentence)
        if decision.pause:
            self._signals.sleep(decision.pause)
        return next((self._policy.stopped(received) for received in self._signals.take()), decision)


def leave_with(decision: Decision, say: Callable[[str], None]) -> int:
    """Does and says what is left to do at the end of a job; its exit code. Blocks as `requeue` does, when that is asked for."""
    assert decision.exit_code is not None
    said = decision.sentence
    if decision.requeue:
        said = f"{said}; {requeue().sentence} (exit code {decision.exit_code})"
    say(said)
    return decision.exit_code


def free_port(address: str) -> int:
    """A TCP port that is free on `address` now ('' is all interfaces). When somebody takes it before rank 0 does, the attempt
    fails; the next has another."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
