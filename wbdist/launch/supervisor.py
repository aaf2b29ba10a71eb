"""Keeps the ranks of one job on this host alive, together, and leaves nothing behind.

One attempt after the other: start all ranks, wait, judge, start again or leave. The supervisor imports neither torch nor
the run client, so it costs a bare interpreter and starts the next attempt without importing anything.

Signals. SIGTERM, SIGINT, SIGUSR2 and SIGHUP are forwarded once to every rank, which then has the whole grace; a second SIGINT
kills at once. A sentinel process (`sentinel.py`) kills what is left when the supervisor itself is killed.

Judgement. The ranks' exit codes, and the verdicts they left in files (`intent.py`), are judged by the worst: fenced and
failed-for-good end the job, preempted ends it or starts it again in place (`on_preempt`), anything else is started again with
back-off. The budget of restarts is spent only by attempts that committed nothing new: a job that moves on between crashes
may crash as often as the machine likes, and one that does not move stops soon.
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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol, Self

import msgspec

from wbdist.errors import (
    EXIT_FAILED_FOR_GOOD,
    EXIT_FENCED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    EXIT_RETRYABLE,
    UsageError,
)
from wbdist.launch import intent
from wbdist.launch.sentinel import Sentinel

POLL = 0.05
"""Seconds between looks at the ranks."""
PEERS_FAIL_BY_THEMSELVES = 3.0
"""Seconds the others have after one rank failed: their collective raises within milliseconds, and they say why."""
PEERS_STOP = 5.0
"""Seconds between SIGTERM and SIGKILL for ranks that outlive a failed peer: all are gone within 10 s."""
BACKOFF = (1.0, 30.0)
"""First and longest pause before a restart without progress, in seconds; doubled each time, with jitter."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to keep alive, and how hard to try."""

    nprocs: int
    max_restarts: int = 3
    """Restarts in a row without a new committed checkpoint."""
    grace: float = 30.0
    """Seconds the ranks have to save and leave after a signal."""
    on_preempt: Literal["exit", "relaunch"] = "exit"
    """`exit`: leave with 75 and let the scheduler requeue. `relaunch`: the machine stays, so start again in place."""


class RankHandle(Protocol):
    """One started rank; subprocess.Popen is one."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...


StartRanks = Callable[[Sequence[Mapping[str, str]]], Sequence[RankHandle]]
"""One environment (additions to ours) a rank -> the started ranks, in order."""


class _Signals:
    """Collects signals while the supervisor runs; main thread."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in FORWARDED:
            self._previous[number] = signal.signal(number, self._note)
        # Its default action would end the supervisor and orphan the ranks (what torchrun does); nobody means that.
        self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.SIGTERM if number == signal.SIGUSR1 else number)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)


class Ended(msgspec.Struct, frozen=True):
    """How an attempt ended."""

    exit_code: int
    why: str
    stopped_by: int | None
    """The signal that told the supervisor to stop, if any."""


def supervise(spec: LaunchSpec, start_ranks: StartRanks, say: Callable[[str], None] | None = None) -> int:
    """Main thread: runs the job to its end and returns its exit code (see the contract in docs/architecture.md).

    Blocks as long as the job runs. When it returns no rank is alive. `say` gets one line for each thing worth knowing;
    standard error by default.
    """
    if spec.nprocs < 1:
        raise UsageError(f"nprocs={spec.nprocs}: give 1 or more")
    tell = say or _say
    directory = Path(tempfile.mkdtemp(prefix="wbdist-launch-"))
    try:
        with _Signals() as signals, Sentinel() as sentinel:
            return _Supervisor(spec, start_ranks, say=tell, signals=signals, sentinel=sentinel, directory=directory).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _say(line: str) -> None:
    sys.stderr.write(f"wbdist launch: {line}\n")
    sys.stderr.flush()


class _Supervisor:
    def __init__(
        self,
        spec: LaunchSpec,
        start_ranks: StartRanks,
        *,
        say: Callable[[str], None],
        signals: _Signals,
        sentinel: Sentinel,
        directory: Path,
    ) -> None:
        self._spec, self._start_ranks, self._say = spec, start_ranks, say
        self._signals, self._sentinel, self._directory = signals, sentinel, directory
        self._committed = -1

    def run(self) -> int:
        spent, number, cause = 0, 0, ""
        while True:
            ended = self._attempt(number, cause)
            if ended.exit_code in {EXIT_FINISHED, EXIT_FAILED_FOR_GOOD, EXIT_FENCED}:
                if ended.exit_code:
                    self._say(f"{ended.why}; not restarted (exit code {ended.exit_code})")
                return ended.exit_code
            if ended.exit_code == EXIT_PREEMPTED:
                if self._spec.on_preempt == "exit" or ended.stopped_by == signal.SIGINT:
                    self._say(f"{ended.why}; run the same command to continue (exit code {EXIT_PREEMPTED})")
                    return EXIT_PREEMPTED
                self._signals.received.clear()
            elif ended.stopped_by is not None:
                self._say(f"{ended.why}; the last committed checkpoint stands")
                return 128 + ended.stopped_by
            spent = 0 if self._progressed() else spent + 1
            if spent > self._spec.max_restarts and ended.exit_code != EXIT_PREEMPTED:
                tries = f"{spent} attempt(s) in a row without a new checkpoint"
                self._say(f"{ended.why}; {tries}, giving up (--max-restarts {self._spec.max_restarts})")
                return EXIT_RETRYABLE
            pause = 0.0 if spent == 0 else min(BACKOFF[0] * 2 ** (spent - 1), BACKOFF[1]) * random.uniform(0.75, 1.25)
            self._say(f"{ended.why}; restarting" + (f" in {pause:.1f} s" if pause else ""))
            self._rest(pause)
            if self._signals.received:
                return 128 + self._signals.received[0]
            number, cause = number + 1, ended.why

    def _progressed(self) -> bool:
        newest = max((intent.read_progress(d) for d in self._directory.iterdir()), default=-1)
        progressed, self._committed = newest > self._committed, max(newest, self._committed)
        return progressed

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._signals.received:
            time.sleep(POLL)

    # One attempt ----------------------------------------------------------------------------------------

    def _attempt(self, number: int, cause: str) -> Ended:
        directory = self._directory / f"{number:04d}"
        directory.mkdir()
        ranks = self._start_ranks(self._environments(number, cause, directory))
        try:
            for rank in ranks:
                self._sentinel.watch(rank.pid)
            stopped_by = self._wait(ranks, directory)
        finally:
            _kill(ranks)
            for rank in ranks:
                self._sentinel.forget(rank.pid)
        return self._judge(ranks, directory, stopped_by)

    def _environments(self, number: int, cause: str, directory: Path) -> list[dict[str, str]]:
        n = self._spec.nprocs
        common = {
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WBDIST_INCARNATION": secrets.token_hex(8),
            "WBDIST_RESTART": str(number),
            "WBDIST_CAUSE": cause,
            "WBDIST_LAUNCHER": "1",
            intent.VARIABLE: str(directory),
        }
        if n > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Each rank would start a thread per core, and they would fight; torchrun does the same.
            common["OMP_NUM_THREADS"] = "1"
        return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]

    def _wait(self, ranks: Sequence[RankHandle], directory: Path) -> int | None:
        """Until no rank is alive, or time is up; the signal that stopped us, if one did."""
        stopped_by: int | None = None
        term_at = kill_at = float("inf")
        failed = False
        while any(rank.poll() is None for rank in ranks):
            now = time.monotonic()
            for received in self._take_signals():
                if stopped_by == received == signal.SIGINT:
                    self._say("second Ctrl-C: killing the ranks now")
                    return stopped_by
                if stopped_by is None:
                    stopped_by = received
                    self._say(f"{signal.Signals(received).name}: ranks have {self._spec.grace:g} s to save and leave")
                    _signal(ranks, received)
                    kill_at = now + self._spec.grace
            if not failed and stopped_by is None:
                culprit = next((i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0, EXIT_PREEMPTED)), None)
                if culprit is not None:
                    failed = True
                    term_at = now + PEERS_FAIL_BY_THEMSELVES
                    kill_at = term_at + PEERS_STOP
                elif any(rank.poll() == EXIT_PREEMPTED for rank in ranks):
                    failed = True
                    kill_at = now + self._spec.grace
            if now >= term_at:
                term_at = float("inf")
                _signal(ranks, signal.SIGTERM)
            if now >= kill_at:
                alive = [i for i, rank in enumerate(ranks) if rank.poll() is None]
                self._say(f"rank(s) {', '.join(map(str, alive))} did not leave in time: killed")
                return stopped_by
            time.sleep(POLL)
        return stopped_by

    def _take_signals(self) -> list[int]:
        taken, self._signals.received[:] = list(self._signals.received), []
        return taken

    def _judge(self, ranks: Sequence[RankHandle], directory: Path, stopped_by: int | None) -> Ended:
        verdicts = intent.read_all(directory)
        codes: dict[int, int] = {}
        said: dict[int, str] = {}
        for number, rank in enumerate(ranks):
            code = rank.returncode if rank.returncode is not None else -signal.SIGKILL
            left = verdicts.get(number)
            # The process's own end outranks its words only when it is worse: killed after saying "finished".
            codes[number] = left.exit_code if left is not None and code > 0 else code
            said[number] = f"rank {number} {_how(code)}" + (f": {left.message}" if left is not None and left.message else "")
        for final in (EXIT_FAILED_FOR_GOOD, EXIT_FENCED):
            for number, code in codes.items():
                if code == final:
                    return Ended(final, said[number], stopped_by)
        bad = [number for number, code in codes.items() if code not in {0, EXIT_PREEMPTED}]
        if bad:
            # A rank that died by a signal is the cause; the others' errors are what that did to them.
            worst = min(bad, key=lambda number: (codes[number] > 0, number))
            return Ended(EXIT_RETRYABLE, said[worst], stopped_by)
        if any(code == EXIT_PREEMPTED for code in codes.values()):
            reason = signal.Signals(stopped_by).name if stopped_by else "a notice"
            return Ended(EXIT_PREEMPTED, f"preempted by {reason}, state saved", stopped_by)
        return Ended(EXIT_FINISHED, "finished", stopped_by)


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _signal(ranks: Sequence[RankHandle], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            try:
                rank.send_signal(number)
            except ProcessLookupError:
                continue


def _kill(ranks: Sequence[RankHandle]) -> None:
    """SIGKILL to every rank and its process group; returns when they are reaped, at most 10 s."""
    for rank in ranks:
        kill_group(rank.pid)
        if rank.poll() is None:
            _signal([rank], signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)


def kill_group(pid: int) -> None:
    """SIGKILL to the process group led by `pid`, when it leads one: its DataLoader workers and helpers."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _free_port() -> int:
    """A TCP port that is free now. When somebody takes it before rank 0 does, the attempt fails; the next has another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
