"""What a job does between a notice and its end, in this order: mark the run preempting, agree with all ranks on what still fits
into the time that is left, do it, say what was done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.errors import DeadlineError, PeerLostError
from wbdist.preemption import budget
from wbdist.preemption.agreement import LOOK, StopAgreement
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.job")

STOP_TIMEOUT = 20.0
"""Seconds for all ranks to say where they are after a notice; one that does not is taken for dead. Below torchrun's 30 s."""
SETTLE = 2.0
"""Seconds that a stop waits for what its scheduler says about it (cancelled, or preempted?), where there is one to ask."""
APPROVAL = 5.0
"""Seconds that the ranks wait at least for each other before a provider is told to go ahead."""
LOST = 1800.0
"""Seconds that ranks wait for one whose first batch does not come; as long as torch lets a collective wait."""


class Stopping:
    """This rank's part in it; made in step on all ranks."""

    def __init__(self, peers: Coordinator, hub: NoticeHub) -> None:
        """`hub` is started already."""
        self._peers, self._hub = peers, hub
        self._agreement = StopAgreement(peers, hub, timeout=STOP_TIMEOUT)
        self.advised = False
        """Advice has come to all ranks, before the same unit. Whoever heeds it resets this."""
        self.advice_agreed = False
        """The last advice reached all ranks: the checkpoint that it asks for can be made."""
        self.asked = False
        """`begin_unit` has answered False."""
        self.plan: budget.StopPlan | None = None
        self._stopped_at = 0.0
        self._lead: float | None = None
        self._meetings = 0

    @property
    def notice(self) -> Notice | None:
        """The notice in force as this rank knows it; None while there is none. Any thread, not in step."""
        own = self._hub.notice
        if own is not None:
            return own
        agreed = self._agreement.notice
        return None if agreed is None or agreed.advice else agreed

    def told(self) -> bool:
        """Whether the next `begin_unit` is going to ask where all ranks are: for waits that a notice should end. Any thread."""
        return self._agreement.requested

    def meet(self, name: str, *, ready: bool) -> None:
        """All ranks, same sequence: returns when all are here and ready, or a notice has come, or some rank is away for LOST
        seconds (what comes next will tell who). A millisecond when nobody is late.

        A rank that is not ready must have been `told`, as the others are about to be."""
        self._meetings += 1
        key = f"meet/{name}/{self._meetings}"
        if ready:
            self._peers.put(f"{key}/{self._peers.rank}", b"")
        until = time.monotonic() + LOST
        for rank in range(self._peers.world_size):
            while not self.told() and time.monotonic() < until:
                with suppress(DeadlineError):
                    self._peers.get(f"{key}/{rank}", LOOK)
                    break

    def begin_unit(self) -> bool | None:
        """All ranks, same sequence: True when a unit of work begins; False on all ranks before the same unit, from then on
        always. None on all of them when advice came first: `advised` is set, no unit has begun, ask again.

        Under a microsecond without a notice.
        """
        if self._agreement.begin_unit():
            return True
        told = self._agreement.notice
        if told is None or not told.advice:
            self.asked = True
            return False
        # Where not all ranks answered there is no common place to save at; but nobody has to stop, either.
        self.advised, self.advice_agreed = True, self._agreement.agreed
        self._agreement = self._agreement.next_round()
        return None

    def may_go_on(self) -> bool:
        """`begin_unit` for those who have nothing to do about advice; whoever comes next sees `advised`."""
        while (begun := self.begin_unit()) is None:
            pass
        return begun

    def check(self) -> Notice:
        """After `begin_unit` said False: the notice. Raises PeerLostError when not all ranks stop at the same place."""
        notice = self._agreement.notice
        assert notice is not None, "asked to stop without a notice"
        if not self._agreement.agreed:
            raise PeerLostError(
                f"rank {self._peers.rank} was told to stop ({reason_of(notice)}), but not all ranks answered within "
                f"{STOP_TIMEOUT:.0f} s: {self._agreement.missing}. Nothing was saved now; the last committed checkpoint stands."
            )
        self._hub.settle(SETTLE)
        own = self._hub.notice
        return notice if own is None or not own.cancelled else msgspec.structs.replace(notice, cancelled=True)

    def agree(self, costs: budget.SaveCosts, *, saving: float | None, committed: int, timeout: float) -> budget.StopPlan:
        """All ranks, in step, once, after `check`: what all of them do now. Blocks until all are here, at most `timeout`
        seconds or what the notice leaves. Raises PeerLostError naming who did not come."""
        self._stopped_at = time.time()
        known = [notice for notice in (self._hub.notice, self._agreement.notice) if notice is not None]
        deadline = min((notice.deadline for notice in known if notice.deadline is not None), default=None)
        self._lead = None if deadline is None else deadline - self._stopped_at
        own = budget.Facts(
            now=self._stopped_at,
            deadline=deadline,
            cancelled=any(notice.cancelled for notice in known),
            approvable=self._hub.approvable,
            save_seconds=costs.seconds,
            saving=saving,
            committed=committed,
        )
        patience = timeout if deadline is None else min(timeout, max(1.0, deadline - self._stopped_at))
        gathered = self._peers.gather(f"{self._agreement.name}/facts", msgspec.msgpack.encode(own), patience)
        self.plan = budget.decide([msgspec.msgpack.decode(facts, type=budget.Facts) for facts in gathered])
        return self.plan

    @property
    def left(self) -> float | None:
        """Seconds until everything must be done; None when nobody said."""
        return None if self._lead is None else self._lead - (time.time() - self._stopped_at)

    def facts(self, notice: Notice, saved: float | None) -> dict[str, float]:
        """For the run: how long before the end the notice came, how long stopping and saving took, and what was to spare."""
        found = {"wbdist.preemption.stop_s": max(0.0, self._stopped_at - _heard_at(notice))}
        if notice.deadline is not None:
            found["wbdist.preemption.lead_s"] = notice.deadline - _heard_at(notice)
        if saved is not None:
            found["wbdist.preemption.save_s"] = saved
        if (left := self.left) is not None:
            found["wbdist.preemption.spare_s"] = left
        return found

    def let_go(self) -> None:
        """All ranks, in step, at the very end, when a provider waits for our word: gives it once all ranks are here."""
        if self.plan is None or not self.plan.approvable:
            return
        try:
            self._peers.barrier(f"{self._agreement.name}/left", max(APPROVAL, self.left or 0.0))
        except PeerLostError as error:
            log.warning("the provider is not told to go ahead, it waits for its own time: %s", error)
            return
        self._hub.approve()

    def close(self, *, failed: bool = False) -> None:
        """Any rank, when it begins no unit any more; see StopAgreement.close. Idempotent."""
        self._agreement.close(failed=failed)


def reason_of(notice: Notice) -> str:
    """For people: `aws: EC2 spot interruption: ...`."""
    return f"{notice.source}: {notice.reason}"


def _heard_at(notice: Notice) -> float:
    return time.time() - (time.monotonic() - notice.received)


def timed(action: Callable[[], None]) -> float:
    """Seconds that `action` took."""
    began = time.monotonic()
    action()
    return time.monotonic() - began
