"""Keeps the ranks of one job on this host alive, together, and leaves nothing behind.

One attempt after the other: start all ranks, wait (`attempt.py`), judge (`judgement.py`), start again or leave. The
supervisor imports neither torch nor the run client, so it costs little more than an interpreter.

The budget of restarts is spent by attempts in a row that committed nothing new: a job that moves on between crashes may crash
as often as the machine likes, one that does not move stops soon. A preempted attempt counts in the same way when it is started
again in place. The pause before a restart grows with the same number.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from wbdist.errors import EXIT_FAILED_FOR_GOOD, EXIT_FENCED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_RETRYABLE, UsageError
from wbdist.launch import intent, times
from wbdist.launch.attempt import Attempt, RankHandle, Signals, StartRanks
from wbdist.launch.judgement import Judgement, judge
from wbdist.launch.requeue import requeue
from wbdist.launch.sentinel import Sentinel
from wbdist.launch.worker import LAUNCHER_PID

__all__ = ["LaunchSpec", "RankHandle", "StartRanks", "environments", "supervise"]

BACKOFF = (1.0, 30.0)
"""First and longest pause before a restart without progress, in seconds; doubled each time, times 0.75 to 1.25."""
STAY_STOPPED = (signal.SIGINT, signal.SIGHUP)
"""A person stopped it (Ctrl-C, the terminal closed): never started again in place."""


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to keep alive, and how hard to try."""

    nprocs: int
    name: str = "the job"
    """For messages."""
    max_restarts: int = 3
    """Restarts in a row without a new committed checkpoint."""
    grace: float = 30.0
    """Seconds the ranks have to save and leave after a signal."""
    on_preempt: Literal["exit", "relaunch", "requeue"] = "exit"
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
                say=say or _say,
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


def _say(line: str) -> None:
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
        self._committed = -1
        """The newest committed step that a rank has reported."""
        self._idle = 0
        """Attempts in a row without a new one."""
        self._start = times.Start(times.process_began())
        """When this start of the ranks began, and what became of the one before."""

    def run(self) -> int:
        number, cause = 0, ""
        while True:
            again = f", attempt {number + 1}" if number else ""
            self._say(f"starting {self._spec.name} on {self._spec.nprocs} rank(s){again}")
            judgement, stopped_by = self._attempt(number, cause)
            code = self._leave_with(judgement, stopped_by)
            if code is None:
                code = self._pause(judgement)
            if code is not None:
                return code
            number, cause = number + 1, judgement.why
            self._start = msgspec.structs.replace(self._start, began=times.now())

    def _attempt(self, number: int, cause: str) -> tuple[Judgement, int | None]:
        intents = self._directory / f"{number:04d}"
        intents.mkdir()
        port = _free_port()
        told = environments(self._spec, number=number, cause=cause, intents=str(intents), port=port)
        ranks = self._start_ranks([{**one, **times.variables(self._start)} for one in told])
        attempt = Attempt(ranks, grace=self._spec.grace, signals=self._signals, sentinel=self._sentinel, say=self._say)
        ends = attempt.run()
        ended = times.of_monotonic(min(end.at for end in ends))
        self._start = times.Start(self._start.began, self._start.began, ended)
        said = intent.read_all(intents)
        ends = [msgspec.structs.replace(end, said=said.get(end.rank)) for end in ends]
        newest = intent.read_progress(intents)
        self._idle = 0 if newest > self._committed else self._idle + 1
        self._committed = max(newest, self._committed)
        return judge(ends, attempt.stopped_by, committed=self._committed >= 0), attempt.stopped_by

    def _leave_with(self, judgement: Judgement, stopped_by: int | None) -> int | None:
        """The exit code when the job is over, None when it is started again; says which, and why."""
        code, why = judgement.exit_code, judgement.why
        if judgement.culprit is not None and self._last_lines is not None:
            for line in self._last_lines(judgement.culprit):
                self._say(f"  rank {judgement.culprit}: {line}")
        tries = f"{self._idle} attempt(s) in a row without a new checkpoint"
        spent = self._idle > self._spec.max_restarts
        if code == EXIT_FINISHED:
            self._say(why)
        elif code in {EXIT_FAILED_FOR_GOOD, EXIT_FENCED}:
            self._say(f"{why}; not started again (exit code {code})")
        elif code == EXIT_PREEMPTED:
            if self._spec.on_preempt == "relaunch" and stopped_by not in STAY_STOPPED and not spent:
                return None
            then = "run the same command to continue"
            if self._spec.on_preempt == "requeue" and stopped_by not in STAY_STOPPED:
                then = requeue().sentence
            self._say(f"{why}; {then} (exit code {code})")
        elif stopped_by is not None:
            self._say(f"{why} (exit code {code})")
        elif spent:
            self._say(f"{why}; {tries}, giving up (--max-restarts {self._spec.max_restarts}, exit code {EXIT_RETRYABLE})")
            code = EXIT_RETRYABLE
        else:
            return None
        return code

    def _pause(self, judgement: Judgement) -> int | None:
        """Before the next attempt; the exit code when a signal says that there is to be none."""
        first, longest = BACKOFF
        pause = min(first * 2 ** (self._idle - 1), longest) * random.uniform(0.75, 1.25) if self._idle else 0.0
        self._say(f"{judgement.why}; starting again" + (f" in {pause:.1f} s" if pause else ""))
        if pause:
            self._signals.sleep(pause)
        for received in self._signals.take():
            code = EXIT_PREEMPTED if self._committed >= 0 else 128 + received
            self._say(f"{signal.Signals(received).name} between two attempts: leaving (exit code {code})")
            return code
        return None


def _free_port() -> int:
    """A TCP port that is free now. When somebody takes it before rank 0 does, the attempt fails; the next has another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
