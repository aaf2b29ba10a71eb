"""All ranks stop before the same unit of work, without a collective per step.

Every rank counts the units it has begun (train steps, or any work with collectives, in the same sequence on all ranks).
Without a request, `begin_unit` is one uncontended lock. On a notice, or when another rank asks, a listener thread raises
a flag *under the same lock* and publishes the count; from then on `begin_unit` waits for `stop_at`, the largest count
published by all ranks, and lets this rank run up to it. After publication a count can only grow up to `stop_at`, and
`stop_at` is at least every count, so all counts end equal and every unit that a rank has begun is begun by all: no rank
waits in a collective for one that has stopped. "Stop at the next boundary" would hang, because ranks are not within one
step of each other on the host (with CUDA the host runs ahead); an all-reduce of a flag per step costs 100 to 600 us each.

Keys, in the namespace of this incarnation:

    stop/request     first asker wins: who, why, until when
    stop/at/<rank>   that rank's count, published once: on a request, or by `close`; "gone" when it left by an error
    stop/decision    first to conclude wins: {"at": n}, or {"missing": why} when a rank has not published in time

Advice (a notice with which nobody has to stop yet) is agreed upon in the same way; then all ranks make a checkpoint and go on
with the next *round*: another agreement, which goes on counting where this one ended, under keys of its own (`stop.1/...`).

The decision is claimed rather than computed by each rank for itself: with a rank that publishes at the very last moment,
one peer would see all counts and save while another has given up, and the save would then wait for that one.
"""

from __future__ import annotations

import logging
import threading
import time

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.errors import DeadlineError, EnvironmentFault
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.preemption")

LOOK = 0.1
"""Seconds between two looks for another rank's request (30 us each): how late it may be noticed. Ours is noticed at once."""
SLICE = 0.2
"""Seconds of one wait for a rank's count; `close` is heard between two."""
ANSWER = 1.0
"""Seconds that peers have to answer even when the deadline is nearer, or past: some machines last a little longer."""
MARGIN = 5.0
"""Seconds beyond the deadline until `begin_unit` no longer believes that its own listener thread is alive."""


class _Request(msgspec.Struct, frozen=True):
    rank: int
    source: str
    reason: str
    deadline: float | None
    fenced: bool = False
    advice: bool = False


class _Count(msgspec.Struct, frozen=True):
    units: int
    gone: bool = False


class _Decision(msgspec.Struct, frozen=True):
    at: int = 0
    missing: str = ""


class StopAgreement:
    """One a rank, made in step on all ranks; with one rank the same contract without a listener or any message."""

    def __init__(self, coordinator: Coordinator, hub: NoticeHub, timeout: float, *, number: int = 0, begun: int = 0) -> None:
        """`timeout`: seconds to wait for every rank's count after a request; less when the notice's deadline is nearer.

        Uses a connection of its own, so `coordinator` stays free for others. `number` counts the rounds, `begun` the
        units begun before this one; for `next_round`.
        """
        self._coordinator, self._hub = coordinator, hub
        self._round = number
        self.name = f"stop.{self._round}" if self._round else "stop"
        """Of this round; the beginning of its keys."""
        self._timeout = timeout
        self._rank, self._world = coordinator.rank, coordinator.world_size
        self._lock = threading.Lock()
        self._units = begun
        self._requested = False
        self._decided = threading.Event()
        self._decision = _Decision()
        self._notice: Notice | None = None
        self._closing = False
        self._failed = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        if self._world > 1:
            self._peers = coordinator.clone()
            self._thread = threading.Thread(target=self._listen, name="wbdist-stop", daemon=True)
            self._thread.start()
        hub.on_notice(self._on_notice)
        hub.on_advice(self._on_notice)

    def next_round(self) -> StopAgreement:
        """All ranks, once `begin_unit` has answered False because of advice: what to go on with. This one is done."""
        self.close()
        return StopAgreement(self._coordinator, self._hub, self._timeout, number=self._round + 1, begun=self._units)

    @property
    def units(self) -> int:
        """Units begun so far on this rank."""
        return self._units

    @property
    def requested(self) -> bool:
        """Whether the next `begin_unit` will ask where all ranks are, because of a notice or of another rank's. Any thread."""
        return self._requested

    @property
    def notice(self) -> Notice | None:
        """The notice that leads to the stop, ours or that of the rank which asked; None before there is one."""
        return self._notice

    @property
    def agreed(self) -> bool:
        """Whether all ranks stop before the same unit. False, on every rank that can still be told, when one did not answer:
        then nothing that needs all ranks may be tried, and the last committed checkpoint stands."""
        return not self._decision.missing

    @property
    def missing(self) -> str:
        """Who did not answer, for people; '' while `agreed`."""
        return self._decision.missing

    def begin_unit(self) -> bool:
        """All ranks, before each unit, same sequence: True to go on; False to stop before this unit, on every rank the same.

        Under a microsecond until a stop is asked for; then blocks until the ranks have decided, at most `timeout` seconds.
        After False, ask `agreed`. Keeps answering False.
        """
        with self._lock:
            if not self._requested:
                self._units += 1
                return True
        if not self._decided.wait(self._timeout + MARGIN):
            self._decide(_Decision(missing=f"the listener thread of rank {self._rank} does not answer"))
        with self._lock:
            if self.agreed and self._units < self._decision.at:
                self._units += 1
                return True
        return False

    def close(self, *, failed: bool = False) -> None:
        """Any rank, when it begins no unit any more; not in step. Idempotent; within half a second.

        Publishes this rank's final count, so that a rank still on its way here, when it is told to stop, learns at once that
        it must run as far as we did, instead of waiting for our answer. `failed`: this rank leaves by an error in the
        middle of a unit; the others then know at once that no common stop is possible.
        """
        self._failed = self._failed or failed
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2 * SLICE + LOOK)

    def _on_notice(self, notice: Notice) -> None:
        if self._decided.is_set() or self._closing:
            return
        if self._notice is None:
            self._notice = notice
        units = self._freeze()
        if self._world == 1:
            self._decide(_Decision(at=units))
        else:
            self._wake.set()

    def _freeze(self) -> int:
        """From now on `begin_unit` waits for the decision; the units begun until now."""
        with self._lock:
            self._requested = True
            return self._units

    def _decide(self, decision: _Decision) -> None:
        with self._lock:
            if self._decided.is_set():
                return
            self._decision = decision
            self._decided.set()
        if decision.missing:
            log.warning("rank %d: no agreement on where to stop: %s", self._rank, decision.missing)

    # The listener thread ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            request = self._await_request()
            if request is None:
                self._put_count(_Count(self._units, gone=self._failed))
                return
            # All ranks must do the same, so what was asked counts rather than what was heard here.
            own = self._notice
            if own is None or (own.fenced, own.advice) != (request.fenced, request.advice):
                self._notice = Notice(
                    "peer",
                    f"rank {request.rank}: {request.reason} ({request.source})",
                    time.monotonic(),
                    request.deadline,
                    fenced=request.fenced,
                    advice=request.advice,
                )
            self._put_count(_Count(self._freeze()))
            proposal = self._collect(request)
            if proposal is not None:
                stands = self._peers.claim(f"{self.name}/decision", msgspec.json.encode(proposal))
                self._decide(msgspec.json.decode(stands, type=_Decision))
        except EnvironmentFault as error:
            self._without_store(str(error))
        finally:
            if self._requested and not self._decided.is_set():
                self._decide(_Decision(missing=f"rank {self._rank} has left"))
            self._peers.close()

    def _await_request(self) -> _Request | None:
        """Any rank's request, made by us when the notice is ours; None when this rank closes first."""
        key = f"{self.name}/request"
        while not self._closing:
            self._wake.wait(LOOK)
            if self._notice is not None:
                own = self._notice
                ours = _Request(self._rank, own.source, own.reason, own.deadline, own.fenced, own.advice)
                return msgspec.json.decode(self._peers.claim(key, msgspec.json.encode(ours)), type=_Request)
            found = self._peers.peek(key)
            if found is not None:
                return msgspec.json.decode(found, type=_Request)
        return None

    def _put_count(self, count: _Count) -> None:
        self._peers.put(f"{self.name}/at/{self._rank}", msgspec.json.encode(count))

    def _collect(self, request: _Request) -> _Decision | None:
        """What this rank concludes from everybody's count; None when it closes first."""
        left = self._timeout if request.deadline is None else min(self._timeout, max(ANSWER, request.deadline - time.time()))
        until = time.monotonic() + left
        stop_at = 0
        silent: list[str] = []
        for rank in range(self._world):
            raw = None
            while raw is None and not self._closing:
                wait = min(SLICE, max(0.0, until - time.monotonic()))
                try:
                    raw = self._peers.get(f"{self.name}/at/{rank}", wait)
                except DeadlineError:
                    if time.monotonic() >= until:
                        break
            if raw is None:
                if self._closing:
                    return None
                silent.append(f"rank {rank} did not say within {left:.1f} s where it is")
                continue
            count = msgspec.json.decode(raw, type=_Count)
            if count.gone:
                return _Decision(missing=f"rank {rank} has left by an error")
            stop_at = max(stop_at, count.units)
        return _Decision(missing="; ".join(silent)) if silent else _Decision(at=stop_at)

    def _without_store(self, why: str) -> None:
        """The store is gone, so the rank that hosts it has ended. That alone is no reason to stop: it may have finished, and we
        be about to. But a notice can no longer be agreed upon."""
        while not self._closing and self._notice is None and not self._requested:
            self._wake.wait()
        if not self._closing:
            self._freeze()
            self._decide(_Decision(missing=why))
