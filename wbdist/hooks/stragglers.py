"""Which rank the others wait for, by who is last to begin its backward pass.

All ranks have the reduced gradients at about the same time, after the last one has come. So a rank's *wait*, from where its
backward pass begins to where all is reduced, is by how much it came before the last one, plus what computing and reducing
take; that part is the same for all. Differences of waits are differences of arrivals, each measured on the rank's own clock:
no clocks are compared. (Step times cannot tell: the all-reduce makes them equal. From the first bucket's readiness to its
reduction names the same ranks, with more false alarms on a busy machine, and seeing it costs a call of Python a bucket.)

Waits are exchanged a window of passes at a time through the coordinator, by a thread of each rank that sleeps otherwise. The
training thread appends a number; no collective is added.

    lateness of a rank in a pass = the median of the others' waits - its own wait
    a window names the rank of the largest median lateness, if that is at least FLOOR_MS, positive in most passes, and far
    outside what the passes' own spread explains
"""

from __future__ import annotations

import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.errors import EnvironmentFault

log = logging.getLogger("wbdist.hooks")

WINDOW = 20
"""Passes that are judged together."""
FLOOR_MS = 2.0
"""What is not worth telling."""
MOST = 0.75
"""Share of a window's passes in which a straggler has come after the others."""
SIGNIFICANT = 4.0
"""Standard errors between a straggler's median lateness and none."""
WARN_AFTER = 3
"""Windows in a row that name the same rank, before a person is told."""
KEPT = 4
"""Windows that stay in the store."""
LATE = 30.0
"""Seconds for all ranks to hand in a window; then it is left out (a rank has joined, or died: others will say)."""

REDUCE: Mapping[str, str] = {"ddp/late_ms": "first", "ddp/straggler": "first"}


class Verdict(msgspec.Struct, frozen=True):
    """About one window."""

    window: int
    rank: int
    """Who came last, in the median."""
    late_ms: float
    """Its median lateness."""
    named: bool
    """Whether it is a straggler, and not just the last of equals."""


class _Window(msgspec.Struct):
    number: int
    host: str
    waits: list[float]


def judge(waits: Sequence[Sequence[float]], window: int = 0) -> Verdict:
    """`waits` in ms, by rank and pass, at least two ranks."""
    lateness = []
    for rank, own in enumerate(waits):
        others = [each for number, each in enumerate(waits) if number != rank]
        lateness.append([statistics.median(at_once) - mine for *at_once, mine in zip(*others, own, strict=True)])
    medians = [statistics.median(each) for each in lateness]
    worst = max(range(len(waits)), key=medians.__getitem__)
    late = medians[worst]
    # Of a median, from the median deviation, for what is roughly normal in its middle.
    spread = statistics.median(abs(each - late) for each in lateness[worst])
    error = 1.4826 * 1.2533 * spread / len(lateness[worst]) ** 0.5
    after = sum(each > 0 for each in lateness[worst]) / len(lateness[worst])
    return Verdict(window, worst, late, late >= FLOOR_MS and after >= MOST and late >= SIGNIFICANT * error)


class StragglerWatch:
    """One a model and rank, made on all ranks in step; `close` it."""

    def __init__(
        self,
        peers: Coordinator,
        name: str,
        host: str,
        say: Callable[[str], None],
        told: Callable[[Verdict], None] | None = None,
    ) -> None:
        """`name` is this model's among the job's, the same on all ranks. On rank 0's thread: `say` when the same rank was named
        in WARN_AFTER windows in a row, `told` for each window.
        """
        self._peers = peers.clone()
        self._name = name
        self._host = host
        self._say = say
        self._told = told
        self._waits: list[float] = []
        self._number = 0
        self._full: queue.SimpleQueue[_Window | None] = queue.SimpleQueue()
        self._verdict: Verdict | None = None
        self._closing = threading.Event()
        self._named: list[int] = []
        self._warned = -1
        self._thread = threading.Thread(target=self._run, name="wbdist-stragglers", daemon=True)
        self._thread.start()

    def waited(self, milliseconds: float) -> Mapping[str, Any]:
        """All ranks, after each pass, on one thread: microseconds, never waits. What is new to be logged: on rank 0, once a
        window, `ddp/late_ms` (how much the last rank is after the others) and `ddp/straggler` (its rank, -1 for none).
        """
        self._waits.append(milliseconds)
        if len(self._waits) == WINDOW:
            self._full.put(_Window(self._number, self._host, self._waits))
            self._number += 1
            self._waits = []
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return {}
        return {"ddp/late_ms": verdict.late_ms, "ddp/straggler": verdict.rank if verdict.named else -1}

    def close(self) -> None:
        """Any rank, not in step; at most two seconds. What is not judged by now is not judged."""
        self._closing.set()
        self._full.put(None)
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self._peers.close()

    # The thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (window := self._full.get()) is not None:
                self._peers.put(self._key(window.number, self._peers.rank), msgspec.msgpack.encode(window))
                if self._peers.rank == 0 and self._full.qsize() < KEPT - 1:  # else it is lagging: the newest ones count
                    self._judge(window)
        except EnvironmentFault as problem:
            if not self._closing.is_set():
                log.warning("stragglers are not looked for any more: %s", problem)

    def _judge(self, window: _Window) -> None:
        handed_in = [window]
        deadline = time.monotonic() + LATE
        for rank in range(1, self._peers.world_size):
            while (theirs := self._read(window.number, rank)).number != window.number:
                # A newer one in its place: too late for this one.
                if theirs.number > window.number or time.monotonic() > deadline or self._closing.wait(0.02):
                    return
            handed_in.append(theirs)
        verdict = judge([each.waits for each in handed_in], window.number)
        self._verdict = verdict
        if self._told is not None:
            self._told(verdict)
        self._named = [*self._named, verdict.rank if verdict.named else -1][-WARN_AFTER:]
        (rank, *others) = set(self._named)
        if others or len(self._named) < WARN_AFTER or rank == self._warned:
            return
        self._warned = rank  # -1 when nobody was, so that the next time is told again
        if rank >= 0:
            self._say(
                f"rank {rank} on {handed_in[rank].host} is slower than the others: in the last {WARN_AFTER * WINDOW} steps "
                f"they were ready {verdict.late_ms:.1f} ms before it, in the median, and waited"
            )

    def _read(self, number: int, rank: int) -> _Window:
        value = self._peers.peek(self._key(number, rank))
        return _Window(-1, "", []) if value is None else msgspec.msgpack.decode(value, type=_Window)

    def _key(self, number: int, rank: int) -> str:
        return f"{self._name}/{number % KEPT}/{rank}"
