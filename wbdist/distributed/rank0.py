"""Strategy rank0, on every rank: this rank's feed into the one run, and on rank 0 the aggregator's life."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition
from wbdist.core.reducers import DEFAULT
from wbdist.core.tails import JournalPrefix
from wbdist.distributed import opening
from wbdist.distributed.aggregator import LINGER
from wbdist.distributed.aggregator_process import AggregatorDownError, AggregatorProcess
from wbdist.distributed.channel import Meeting
from wbdist.distributed.feeder import Feeder
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.lateness import LatePolicy
from wbdist.distributed.opening import OPEN_TIMEOUT, Opened, refusal_of, told_by_rank0
from wbdist.distributed.own_runs import label_of, standing_of, tail_of
from wbdist.distributed.rank_run import RankRun, check_reduce
from wbdist.errors import EnvironmentFault, Error
from wbdist.run.journal import JournalWriter
from wbdist.run.journal_format import FeedFacts
from wbdist.run.lifecycle import REGISTER_SECONDS, RunSpec, open_run
from wbdist.run.shipper.client import Standing
from wbdist.run.values import flat_row
from wbdist.settings import Settings

START_SECONDS = 2 * REGISTER_SECONDS
"""Seconds for an aggregator to be up, besides what it may wait for its server."""
MAX_DECLARED = 1024
"""Keys with their operations that are remembered; what a script asks for beyond these is looked over each time."""
_Asked: TypeAlias = str | tuple[tuple[str, str], ...]
"""`reduce` of a call."""


class FeedRun(RankRun):
    """Strategy rank0: this rank feeds the one run."""

    strategy = "rank0"

    def __init__(
        self,
        identity: RankIdentity,
        coordinator: Coordinator,
        spec: RunSpec,
        name: str,
        reason: str,
        *,
        late: LatePolicy | None,
    ) -> None:
        """`name`: of this opening, the same on all ranks. Raises what opening the run raised beside rank 0, on all ranks."""
        self.reason = reason
        self._rank = identity.rank
        self._peers = coordinator.clone()
        self._feeder_peers = coordinator.clone()
        self._name = name
        self._aggregator: AggregatorProcess | None = None
        if identity.rank == 0:
            self._aggregator = AggregatorProcess(spec, identity.world_size, alone_on_host=_on_one_host(identity), late=late)
        told = self._meet(spec)
        meeting = told.meeting
        self.run = open_run(
            msgspec.structs.replace(
                spec,
                role="feed",
                feed=FeedFacts(identity.world_size, identity.local_world_size, meeting is not None),
                writer=f"feed{identity.rank}",
                earlier=(),
                must_be_new=False,
                entity=told.entity or spec.entity,
                project=told.project or spec.project,
                name=told.name or spec.name,
                config={**spec.config, **told.config},
                settings=_labelled(spec, identity),
                sample="all" if identity.local_rank == 0 else "process",
                url=told.url,
            )
        )
        self.group = self.run.group
        # The aggregator runs beside rank 0, so its journals and what it brought back lie below the same root.
        self._tail = tail_of(self.run, spec.earlier) if identity.rank == 0 else None
        self._cut: list[tuple[Path, int]] = []
        self._cut_step = -1
        self._declared: set[tuple[_Asked, tuple[str, ...]]] = set()
        self._declared_last: dict[_Asked, tuple[str, ...]] = {}
        """What was asked for -> the keys that it was asked for last."""
        self._ops: dict[str, str] = {}
        journal = self.run.journal
        assert isinstance(journal, JournalWriter)
        self._feeder = Feeder(journal.path, identity.rank, meeting, self._next_meeting, lambda: journal.size)
        self._feeder.passed = self.run.starting_step
        # Also when the process ends without finish(): the rest is still handed over.
        self.run.on_finish(self._complete)

    def log(self, data: Mapping[str, Any], step: int | None = None, reduce: str | Mapping[str, str] = DEFAULT) -> None:
        if reduce is not DEFAULT or self._ops:
            self._declare_what_is_new(data, reduce)
        self.run.log(data, step)  # a row says by itself that its rank has passed the steps below

    def commit_row(self) -> None:
        self.run.commit_row()
        self._feeder.passed = max(self._feeder.passed, self.run.step)

    def drain(self, step: int, timeout: float) -> RunPosition:
        self._feeder.passed = max(self._feeder.passed, step + 1)
        return opening.rank0s_position(self._peers, f"{self._name}/drain/{step}", lambda: self._drained(step, timeout), timeout)

    def _drained(self, step: int, timeout: float) -> RunPosition:
        position, self._cut = self._feeder.drain(step, timeout)
        self._cut_step = position.watermark.step
        return position

    def tail(self) -> list[JournalPrefix]:
        return [] if self._tail is None else self._tail.of(self._cut, self._cut_step)

    def standing(self) -> Standing:
        return standing_of(None if self._aggregator is None else self._aggregator.journal)

    def finish(self, exit_code: int | None = None) -> None:
        self.run.finish(exit_code)

    def _complete(self) -> None:
        timeout = LINGER + 5.0 + (self.run.settings.finish_timeout if self._rank == 0 else 0.0)
        if not self._feeder.complete(timeout):
            self.run.settings.say(
                f"run {self.run.id}: rank {self._rank}'s last rows did not reach the aggregator within {timeout:.0f} s; "
                f"they are kept in {self.run.journal_path}",
                warning=True,
            )
        if self._aggregator is not None:
            self._aggregator.wait(LINGER)
        self._peers.close()
        self._feeder_peers.close()

    def _declare_what_is_new(self, data: Mapping[str, Any], reduce: str | Mapping[str, str]) -> None:
        """A script asks for the same at each step: that is looked up, and not looked over again."""
        keys = tuple(data)
        try:
            asked = reduce if isinstance(reduce, str) else tuple(reduce.items())
            if self._declared_last.get(asked) == keys:
                return
        except (TypeError, AttributeError):  # no words, and no mapping to words
            check_reduce(reduce)
            raise
        if (asked, keys) not in self._declared:
            nested = isinstance(reduce, str) and any(isinstance(value, Mapping) for value in data.values())
            self._declare(flat_row(data) if nested else data, reduce)
            if nested or len(self._declared) >= MAX_DECLARED:
                return
            self._declared.add((asked, keys))
        self._declared_last[asked] = keys

    def _declare(self, data: Iterable[str], reduce: str | Mapping[str, str]) -> None:
        """Journals what is new in how keys are reduced, before the row that needs it. Each is said once."""
        check_reduce(reduce)
        if isinstance(reduce, str):
            wanted = dict.fromkeys(data, reduce)
        else:
            wanted = {key: reduce.get(key, DEFAULT) for key in data} | dict(reduce)
        changed = {key: op for key, op in wanted.items() if self._ops.get(key, DEFAULT) != op}
        if changed:
            self.run.define_reduction(changed)
            self._ops.update(changed)
            self._declared.clear()
            self._declared_last.clear()

    # Meeting the aggregator -----------------------------------------------------------------------------

    def _meet(self, spec: RunSpec) -> Opened:
        """All ranks, in step: rank 0 starts the aggregator; its success or error becomes everybody's.

        One that does not come up stops nobody: rows are kept in the ranks' journals, and rank 0 goes on trying.
        """
        name = f"{self._name}/open"
        if self._aggregator is None:
            return told_by_rank0(self._peers, name)
        try:
            told = self._aggregator.start(spec.settings.init_timeout + START_SECONDS)
        except AggregatorDownError as error:
            spec.settings.say(
                f"run {spec.run_id}: {error}; training goes on, rows are kept in the ranks' journals and go into the run "
                "when an aggregator is up: it is tried again in the background",
                warning=True,
            )
            told = Opened()
        except Error as error:
            self._peers.agree(name, msgspec.msgpack.encode(refusal_of(error)), OPEN_TIMEOUT)
            raise
        told.config = spec.config
        self._peers.agree(name, msgspec.msgpack.encode(told), OPEN_TIMEOUT)
        return told

    def _next_meeting(self, generation: int) -> Meeting | None:
        """On the feeder's thread, when there is no aggregator: rank 0 starts the next one, the others look for it."""
        key = f"{self._name}/aggregator/{generation}"
        if self._aggregator is None:
            told = self._feeder_peers.peek(key)
            if told is None:
                return None
            answer = msgspec.msgpack.decode(told, type=Opened)
        else:
            try:
                answer = self._aggregator.restart(generation, OPEN_TIMEOUT)
            except Error as error:
                answer = refusal_of(error)
            self._feeder_peers.put(key, msgspec.msgpack.encode(answer))
        if answer.meeting is None:
            raise EnvironmentFault(
                f"the aggregator is gone and cannot be started again: {answer.error}. Rows are kept on this rank's disk."
            )
        return answer.meeting


def _labelled(spec: RunSpec, identity: RankIdentity) -> Settings:
    """Rank 0's lines are the job's; the others' say whose they are."""
    settings = spec.settings
    if identity.rank == 0:
        return settings
    return msgspec.structs.replace(settings, x_label=settings.x_label or label_of(spec, identity))


def _on_one_host(identity: RankIdentity) -> bool:
    return identity.local_world_size == identity.world_size
