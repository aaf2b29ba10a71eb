"""One attempt on this host: all ranks from their start until none of their processes is left.

all run       -> a rank fails -> the others have PEERS_FAIL seconds to fail by themselves (their collective raises within
                 milliseconds, and they say why), then SIGTERM, then PEERS_STOP seconds later SIGKILL
              -> a rank is killed with SIGKILL -> SIGTERM at once for those that end by it, without a word; SIGKILL after
                 DURABLE_STOPS seconds for those whose losses are on disk (a job's ranks): to end by themselves takes an
                 interpreter with torch a second, and some wait for the dead one longer. Not with a GPU open
              -> a rank leaves preempted -> the others have the grace to do the same
              -> the supervisor gets a signal -> every rank gets it once, and has the grace; then SIGKILL
a rank ended  -> what is left of its process group has LEFTOVERS seconds (a resource tracker cleans up), then SIGKILL

With several hosts the first three are told to the others, and what happens there comes here in the same way (`Elsewhere`).
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol, Self

import msgspec

from wbdist.errors import EXIT_PREEMPTED, UsageError
from wbdist.launch.judgement import RankEnd, signal_name
from wbdist.launch.sentinel import Sentinel, group_is_alive, kill_group

PEERS_FAIL = 3.0
PEERS_STOP = 4.0
DURABLE_STOPS = 0.1
LEFTOVERS = 1.0
UNKILLABLE = 10.0
"""Seconds after which a process that SIGKILL did not end is given up: it hangs in the kernel, and the job must go on."""
TICK = 0.05
"""Seconds between looks at what cannot wake us: leftovers, and ranks where the kernel has no pidfd."""
PASSED_ON_AS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
}
"""What ranks get for what we get. A job watches SIGTERM, SIGINT and SIGUSR2; SIGHUP would kill it unsaved, and SIGUSR1 may be
caught by NCCL. That we handle SIGUSR1 at all: its default would kill us, as it kills torchrun, whose workers then run on."""


class RankHandle(Protocol):
    """One started rank; subprocess.Popen is one."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...


StartRanks = Callable[[Sequence[Mapping[str, str]]], Sequence[RankHandle]]
"""One environment (additions to ours) a rank -> the started ranks, in order. Called on the main thread. Each rank leads a
process group of its own, from the start or soon, and calls `worker.tie_to_parent` first thing."""


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """Something on one host that concerns the ranks of all."""

    kind: Literal["signal", "kill", "failed", "leaving", "regroup"]
    """A signal came; a second Ctrl-C; a rank, or the host, failed; a rank leaves preempted; another host is to take part."""
    sentence: str
    signal: int = 0
    """That came, or that ended the rank."""
    grace: float = 0.0
    """Seconds that the ranks have then."""


class Elsewhere(Protocol):
    """The other hosts of the job."""

    @property
    def wake(self) -> int:
        """A descriptor that is readable while `told` has something to say."""
        ...

    def told(self) -> list[Trouble]:
        """What has happened there since the last call."""
        ...

    def tell(self, trouble: Trouble, /) -> None: ...


class Signals:
    """Collects signals while the supervisor runs, and wakes it. A context manager; main thread, else UsageError."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.wake, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        except ValueError:
            os.close(self.wake)
            os.close(self._write)
            raise UsageError("a job can only be launched from the main thread: signals arrive there") from None
        for number in PASSED_ON_AS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)

    def take(self) -> list[int]:
        """Those received since the last call."""
        taken, self.received[:] = list(self.received), []
        return taken

    def drain(self) -> None:
        """After `wake` became readable."""
        try:
            os.read(self.wake, 4096)
        except BlockingIOError:
            return

    def sleep(self, seconds: float) -> None:
        """Until a signal comes, at most `seconds`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.wake, selectors.EVENT_READ)
            if not self.received and selector.select(max(seconds, 0.0)):
                self.drain()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self.wake)
        os.close(self._write)


class Attempt:
    """The ranks of one attempt. `run` once; main thread."""

    def __init__(
        self,
        ranks: Sequence[RankHandle],
        *,
        grace: float,
        signals: Signals,
        sentinel: Sentinel,
        say: Callable[[str], None],
        first_rank: int = 0,
        elsewhere: Elsewhere | None = None,
        durable: Callable[[int], bool] | None = None,
    ) -> None:
        """`durable`: whether a rank may be killed without loss when another was; None when nothing is started after this."""
        self._ranks = dict(enumerate(ranks, first_rank))
        self._grace = grace
        self._elsewhere = elsewhere
        self._durable = durable
        self._signals, self._sentinel, self._say = signals, sentinel, say
        self._ends: dict[int, RankEnd] = {}
        self._told: set[int] = set()
        """Ranks that we ended because another had failed."""
        self._leftovers: dict[int, float] = {}
        """pid of an ended rank -> when its group is killed."""
        self._term_at = self._kill_at = self._kill_durable_at = float("inf")
        self.stopped_by: int | None = None
        """The signal that told us to stop."""

    def run(self) -> list[RankEnd]:
        """Blocks until no rank, and nothing in their process groups, is alive; how each ended, by rank."""
        selector = selectors.DefaultSelector()
        selector.register(self._signals.wake, selectors.EVENT_READ)
        if self._elsewhere is not None:
            selector.register(self._elsewhere.wake, selectors.EVENT_READ)
        descriptors = self._open_pidfds(selector)
        try:
            for handle in self._ranks.values():
                self._sentinel.watch(handle.pid)
            while len(self._ends) < len(self._ranks) or self._leftovers:
                self._look()
                blind = len(descriptors) < len(self._ranks)
                next_at = min(self._term_at, self._kill_at, self._kill_durable_at) - time.monotonic()
                wait = min(next_at, TICK) if self._leftovers or blind else next_at
                if len(self._ends) == len(self._ranks) and not self._leftovers:
                    break
                for key, _ in selector.select(None if wait == float("inf") else max(wait, 0.0)):
                    if key.fd == self._signals.wake:
                        self._signals.drain()
                    elif key.fd in descriptors:
                        selector.unregister(key.fd)  # readable for good once the rank has ended
        finally:
            selector.close()
            for descriptor in descriptors:
                os.close(descriptor)
            self._end_all()
        return [self._ends[rank] for rank in sorted(self._ends)]

    def _open_pidfds(self, selector: selectors.BaseSelector) -> list[int]:
        """One for each rank; none where the kernel (or a sandbox) does not have them: then we look every TICK."""
        opened: list[int] = []
        if not sys.platform.startswith("linux"):
            return opened
        for handle in self._ranks.values():
            try:
                opened.append(os.pidfd_open(handle.pid))
            except OSError:
                continue
            selector.register(opened[-1], selectors.EVENT_READ)
        return opened

    def _look(self) -> None:
        now = time.monotonic()
        for received in self._signals.take():
            self._on_signal(received, now)
        for trouble in [] if self._elsewhere is None else self._elsewhere.told():
            self._on_trouble(trouble, now)
        for rank, handle in self._ranks.items():
            if rank not in self._ends and handle.poll() is not None:
                self._on_end(rank, handle, now)
        for pid, kill_at in list(self._leftovers.items()):
            if not group_is_alive(pid):
                self._gone(pid)
            elif now >= kill_at + UNKILLABLE:
                self._say(f"a helper of the rank with pid {pid} cannot be killed (uninterruptible in the kernel?)")
                self._gone(pid)
            elif now >= kill_at:
                kill_group(pid)
        if now >= self._kill_durable_at:
            self._kill_durable_at = float("inf")
            self._end_durable()
        if now >= self._term_at:
            self._term_at = float("inf")
            for rank in self._alive():
                self._told.add(rank)
                self._send(rank, signal.SIGTERM)
        if now >= self._kill_at:
            self._kill_at = float("inf")
            self._say(f"{_named(self._alive())} did not leave in time: killed")
            self._kill()

    def _on_signal(self, received: int, now: float) -> None:
        if self.stopped_by is None:
            self._stop(received, signal_name(received), self._grace, now)
            self._tell(Trouble("signal", signal_name(received), signal=received, grace=self._grace))
        elif received == signal.SIGINT:
            self._tell(Trouble("kill", "Ctrl-C again"))
            self._kill_now("Ctrl-C again")

    def _stop(self, received: int, what: str, grace: float, now: float) -> None:
        self.stopped_by = received
        self._say(f"{what}: passed on; the ranks have {grace:g} s to save and leave")
        for rank in self._alive():
            self._send(rank, _for_rank(received, self._ranks[rank].pid))
        self._term_at, self._kill_at = float("inf"), now + grace

    def _kill_now(self, what: str) -> None:
        self._say(f"{what}: killing the ranks now")
        self._kill()
        self._kill_at = float("inf")

    def _on_trouble(self, trouble: Trouble, now: float) -> None:
        """Something happened on another host."""
        if trouble.kind == "kill":
            self._kill_now(trouble.sentence)
        elif trouble.kind == "signal":
            if self.stopped_by is None:
                self._stop(trouble.signal, trouble.sentence, trouble.grace, now)
        elif self._undisturbed:
            if trouble.kind == "leaving":
                self._kill_at = now + trouble.grace
            elif trouble.kind == "regroup":
                self._say(f"{trouble.sentence}: the ranks have {self._grace:g} s to save, and start again with it")
                self._kill_at = now + self._grace
                for rank in self._alive():
                    self._told.add(rank)
                    self._send(rank, signal.SIGTERM)
            else:
                self._peer_failed(trouble.sentence, now, killed=trouble.signal == signal.SIGKILL)

    @property
    def _undisturbed(self) -> bool:
        """Nothing has happened yet that the ranks are to leave for."""
        return self.stopped_by is None and self._kill_at == float("inf")

    def _peer_failed(self, sentence: str, now: float, *, killed: bool = False) -> None:
        others = self._alive()
        if others:
            self._say(f"{sentence}; stopping {_named(others)}")
            self._term_at = now + PEERS_FAIL
            self._kill_at = self._term_at + PEERS_STOP
        if killed:
            self._kill_durable_at = now + DURABLE_STOPS
            for rank in others:
                pid = self._ranks[rank].pid
                if not _catches(pid, signal.SIGTERM) and not _has_gpu(pid):
                    self._told.add(rank)
                    self._send(rank, signal.SIGTERM)

    def _end_durable(self) -> None:
        for rank in self._alive():
            if self._durable is not None and self._durable(rank) and not _has_gpu(self._ranks[rank].pid):
                self._told.add(rank)
                # The rank alone: what it has started (the aggregator) has the usual time to notice.
                self._send(rank, signal.SIGKILL)

    def _on_end(self, rank: int, handle: RankHandle, now: float) -> None:
        code = handle.returncode
        assert code is not None
        self._ends[rank] = RankEnd(rank=rank, code=code, at=now, by_us=rank in self._told)
        self._leftovers[handle.pid] = now + LEFTOVERS
        if not group_is_alive(handle.pid):
            self._gone(handle.pid)
        if code == 0 or not self._undisturbed:
            return
        if code == EXIT_PREEMPTED:
            self._tell(Trouble("leaving", self._ends[rank].sentence, grace=self._grace))
            if self._alive():
                self._kill_at = now + self._grace
        else:
            self._tell(Trouble("failed", self._ends[rank].sentence, signal=max(-code, 0)))
            self._peer_failed(self._ends[rank].sentence, now, killed=code == -signal.SIGKILL)

    def _tell(self, trouble: Trouble) -> None:
        if self._elsewhere is not None:
            self._elsewhere.tell(trouble)

    def _gone(self, pid: int) -> None:
        self._leftovers.pop(pid, None)
        self._sentinel.forget(pid)

    def _alive(self) -> list[int]:
        return [rank for rank in self._ranks if rank not in self._ends]

    def _send(self, rank: int, number: int) -> None:
        # Popen and multiprocess look whether it still runs before they signal its pid.
        self._ranks[rank].send_signal(number)

    def _kill(self) -> None:
        for rank in self._alive():
            self._told.add(rank)
            # One that does not lead its group yet is killed alone.
            if not kill_group(self._ranks[rank].pid):
                self._send(rank, signal.SIGKILL)
        for pid in self._leftovers:
            kill_group(pid)

    def _end_all(self) -> None:
        """On every way out of `run`, also by an exception: nothing is left, unless the kernel cannot end it."""
        self._kill()
        deadline = time.monotonic() + UNKILLABLE
        while self._alive() or self._leftovers:
            now = time.monotonic()
            if now > deadline:
                self._say(f"{_named(self._alive()) or 'a helper of a rank'} cannot be killed (uninterruptible in the kernel?)")
                for rank in self._alive():
                    self._ends[rank] = RankEnd(rank=rank, code=-signal.SIGKILL, at=now, by_us=True)
                return
            for rank in self._alive():
                if self._ranks[rank].poll() is not None:
                    self._on_end(rank, self._ranks[rank], now)
            for pid in list(self._leftovers):
                kill_group(pid)
                if not group_is_alive(pid):
                    self._gone(pid)
            time.sleep(0.005)


def _for_rank(received: int, pid: int) -> int:
    """What to send to a rank. One that does not watch for SIGTERM (it still imports torch, or is no job of ours) gets SIGTERM
    rather than SIGINT: that ends it without the KeyboardInterrupt traceback that each of N ranks would print."""
    number = PASSED_ON_AS[signal.Signals(received)]
    if number == signal.SIGINT and not _catches(pid, signal.SIGTERM):
        return signal.SIGTERM
    return number


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for signal `number`; True where that cannot be known."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), None)
    return caught is None or bool(int(caught, 16) >> (number - 1) & 1)


def _has_gpu(pid: int) -> bool:
    """Whether the process has a GPU open, whose communicators it should close itself: killing it can take the link's other
    end along. True where that cannot be known."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return True
    return "/dev/nvidia" in maps or "/dev/kfd" in maps


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks)) if ranks else ""
