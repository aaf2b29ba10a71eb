"""What the ranks' rows become: one run for all of them (`rank0`), or a run a rank in one group (`per_rank`).

| strategy   | runs                                      | a row is                        | chosen by `auto`            |
|------------|-------------------------------------------|---------------------------------|-----------------------------|
| `rank0`    | one, `<run_id>`                           | one for all ranks, reduced      | with more than one rank     |
| `per_rank` | `<run_id>-r<rank>`, group `<run_id>`      | this rank's own                 | never: it has to be wanted  |
| (plain)    | one, `<run_id>`                           | this process's own              | with a single rank          |
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

import wbdist.errors
from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition
from wbdist.core.reducers import DEFAULT, NAMES
from wbdist.core.tails import JournalCopy, JournalPrefix
from wbdist.distributed.aggregator import LINGER
from wbdist.distributed.aggregator_process import AggregatorProcess
from wbdist.distributed.channel import Meeting
from wbdist.distributed.cut import PositionCursor
from wbdist.distributed.feeder import Feeder
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.tail import Tail, fenced_message
from wbdist.errors import DeadlineError, EnvironmentFault, Error, PeerLostError, UsageError
from wbdist.protocol import names
from wbdist.run.handle import Run
from wbdist.run.lifecycle import RunSpec, open_run
from wbdist.run.shipper import client
from wbdist.run.values import flat_row

Strategy = Literal["auto", "rank0", "per_rank"]
STRATEGIES = ("auto", "rank0", "per_rank")

OPEN_TIMEOUT = 60.0
"""Seconds for rank 0 to have its run (or its aggregator) open; `init_timeout` and the registration fit in."""

_opened = itertools.count()
"""Counts `open_runs` calls: all ranks call it in step, so it names the same opening everywhere."""


class RankRun(Protocol):
    """This rank's part in the job's runs. All methods exist under every strategy, with the same checks."""

    run: Run
    """This rank's handle. Under rank0 its rows feed the one run; of config, summary and the rest, rank 0's count."""
    group: str
    strategy: str
    """`rank0`, `per_rank` or `plain`."""

    def log(self, data: Mapping[str, Any], step: int | None = None, reduce: str | Mapping[str, str] = DEFAULT) -> None:
        """Any rank, any thread, not in step: adds to the row of `step`, as `Run.log`. On disk when it returns; never waits.

        `reduce`: what becomes of the ranks' values under rank0, for all keys of this call or by key (the others: "mean");
        see core/reducers.py. Checked, and without effect, where a rank has a row of its own. Raises UsageError.
        """
        ...

    def commit_row(self) -> None:
        """Any rank, not in step: this rank adds nothing more to the open row."""
        ...

    def drain(self, step: int, timeout: float) -> RunPosition:
        """All ranks, each `step` once and in growing order, on one thread (which need not be the training thread).

        Returns when every row of a step <= `step`, of all ranks, is in the run's journal and fsynced. The position is the
        one after `step`, whatever was logged meanwhile, and under rank0 the same on all ranks.

        Rows up to `step` must be committed before. Blocks at most `timeout` seconds. Raises PeerLostError naming lost ranks,
        DeadlineError, EnvironmentFault.
        """
        ...

    def tail(self) -> list[JournalPrefix]:
        """Any rank, after `drain` and on its thread: what a checkpoint at the drained step must take along of the history,
        since the server has not acknowledged it. Blocks and raises as `Tail.of` does."""
        ...

    def standing(self) -> client.Standing:
        """Any rank, any thread: what the server said about another job that has the run, or about a person who wants it
        stopped; nothing on a rank that does not speak to it. Asks the shipper; at most a second."""
        ...

    def finish(self, exit_code: int | None = None) -> None:
        """All ranks, not in step: ends this rank's part, and with the last one the run. Blocks at most about
        `settings.finish_timeout` + 15 s (rank 0 under rank0: it waits for its peers), usually some milliseconds. Idempotent."""
        ...


def open_runs(strategy: str, identity: RankIdentity, coordinator: Coordinator, spec: RunSpec) -> RankRun:
    """All ranks, in step: opens this rank's part of the job's run or runs.

    `spec` is the job's: its `run_id` the job's, its `base` this rank's position in the checkpoint it continues from (or
    None); writer, role and rank are filled in here. Blocks at most OPEN_TIMEOUT seconds. Raises UsageError for an unknown
    strategy; whatever opening the run raises on rank 0 is raised on all ranks under rank0.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy={strategy!r} is not known; choose one of: {', '.join(STRATEGIES)}")
    spec = msgspec.structs.replace(spec, rank=identity.rank, writer=f"rank{identity.rank}")
    if spec.settings.mode == "disabled":
        return OwnRun(spec, "plain")
    if strategy == "per_rank":
        return OwnRun(per_rank_spec(spec, identity), "per_rank")
    if identity.world_size == 1:
        return OwnRun(spec, "plain")
    return SharedRun(identity, coordinator, spec, next(_opened))


def per_rank_spec(spec: RunSpec, identity: RankIdentity) -> RunSpec:
    """The spec of this rank's own run, of the job's."""
    rank = identity.rank
    try:
        run_id = names.run_id(f"{spec.run_id}-r{rank}")
    except UsageError as error:
        raise UsageError(f"strategy per_rank adds -r{rank} to the run id: {error}") from error
    return msgspec.structs.replace(
        spec,
        run_id=run_id,
        name=f"{spec.name}-rank{rank}" if spec.name else None,
        group=spec.group or spec.run_id,
        job_type=spec.job_type or ("main" if rank == 0 else "worker"),
        config={
            **spec.config,
            "rank": rank,
            "world_size": identity.world_size,
            "local_rank": identity.local_rank,
            "host": spec.settings.host or socket.gethostname(),
        },
    )


class OwnRun(RankRun):
    """A run of this rank's own: per_rank, and a process that is alone."""

    def __init__(self, spec: RunSpec, strategy: str) -> None:
        run = open_run(spec)
        self.run = run
        self.group = run.group
        self.strategy = strategy
        self._cursor: PositionCursor | None = None
        self._lock = threading.Lock()
        self._tail = _tail_of(run, spec.earlier)

    def log(self, data: Mapping[str, Any], step: int | None = None, reduce: str | Mapping[str, str] = DEFAULT) -> None:
        if reduce is not DEFAULT:
            _check_reduce(reduce)
        self.run.log(data, step=step)

    def commit_row(self) -> None:
        self.run.commit_row()

    def drain(self, step: int, timeout: float) -> RunPosition:
        path = self.run.journal_path
        if path is None:  # disabled
            return self.run.position()
        self.run.flush(0.0)
        with self._lock:
            if self._cursor is None:
                self._cursor = PositionCursor([path])
            return self._cursor.position(step)

    def tail(self) -> list[JournalPrefix]:
        with self._lock:
            cursor = self._cursor
        return [] if cursor is None or self._tail is None else self._tail.of(cursor.cut(), cursor.step)

    def standing(self) -> client.Standing:
        return _standing(self.run.journal_path)

    def finish(self, exit_code: int | None = None) -> None:
        self.run.finish(exit_code)
        with self._lock:
            if self._cursor is not None:
                self._cursor.close()


class SharedRun(RankRun):
    """Strategy rank0: this rank feeds the one run."""

    strategy = "rank0"

    def __init__(self, identity: RankIdentity, coordinator: Coordinator, spec: RunSpec, number: int) -> None:
        self._rank = identity.rank
        self._peers = coordinator.clone()
        self._feeder_peers = coordinator.clone()
        self._name = f"runs/{number}"
        self._aggregator: AggregatorProcess | None = None
        if identity.rank == 0:
            self._aggregator = AggregatorProcess(spec, identity.world_size, alone_on_host=_on_one_host(identity))
        meeting = self._meet()
        self.run = open_run(
            msgspec.structs.replace(
                spec,
                role="feed",
                writer=f"feed{identity.rank}",
                earlier=(),
                must_be_new=False,
                entity=meeting.entity or spec.entity,
                project=meeting.project or spec.project,
                name=meeting.name or spec.name,
                capture_console=spec.capture_console and identity.rank == 0,
                sample="all" if identity.local_rank == 0 else "process",
                url=meeting.url,
            )
        )
        self.group = self.run.group
        # The aggregator runs beside rank 0, so its journals and what it brought back lie below the same root.
        self._tail = _tail_of(self.run, spec.earlier) if identity.rank == 0 else None
        self._cut: list[tuple[Path, int]] = []
        self._cut_step = -1
        self._declared: set[tuple[str, ...]] = set()
        self._ops: dict[str, str] = {}
        journal = self.run.journal_path
        assert journal is not None
        self._feeder = Feeder(journal, identity.rank, meeting, self._next_meeting)
        self._feeder.passed = self.run.starting_step
        # Also when the process ends without finish(): the rest is still handed over.
        self.run.on_finish(self._complete)

    def log(self, data: Mapping[str, Any], step: int | None = None, reduce: str | Mapping[str, str] = DEFAULT) -> None:
        if not isinstance(reduce, str) or (reduce, *data) not in self._declared:
            self._declare(data, reduce)
        self.run.log(data, step=step)
        if step is not None and step > self._feeder.passed:
            self._feeder.passed = step

    def commit_row(self) -> None:
        self.run.commit_row()
        self._feeder.passed = max(self._feeder.passed, self.run.step)

    def drain(self, step: int, timeout: float) -> RunPosition:
        self._feeder.passed = max(self._feeder.passed, step + 1)
        name = f"{self._name}/drain/{step}"
        if self._rank != 0:
            told = self._peers.agree(name, None, timeout)
            answer = msgspec.msgpack.decode(told, type=_Answer)
            if answer.position is None:
                raise _ERRORS.get(answer.error_class, EnvironmentFault)(answer.error)
            return answer.position
        try:
            position, self._cut = self._feeder.drain(step, timeout)
            self._cut_step = position.watermark.step
        except EnvironmentFault as error:
            refusal = _Answer(error=str(error), error_class=type(error).__name__)
            self._peers.agree(name, msgspec.msgpack.encode(refusal), timeout)
            raise
        self._peers.agree(name, msgspec.msgpack.encode(_Answer(position=position)), timeout)
        return position

    def tail(self) -> list[JournalPrefix]:
        return [] if self._tail is None else self._tail.of(self._cut, self._cut_step)

    def standing(self) -> client.Standing:
        return _standing(None if self._aggregator is None else self._aggregator.journal)

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

    def _declare(self, data: Mapping[str, Any], reduce: str | Mapping[str, str]) -> None:
        """Journals what is new in how keys are reduced, before the row that needs it. Each is said once."""
        _check_reduce(reduce)
        if isinstance(reduce, str):
            nested = any(isinstance(value, Mapping) for value in data.values())
            wanted = dict.fromkeys(flat_row(data) if nested else data, reduce)
        else:
            wanted = {key: reduce.get(key, DEFAULT) for key in data} | dict(reduce)
        changed = {key: op for key, op in wanted.items() if self._ops.get(key, DEFAULT) != op}
        if changed:
            self.run.define_reduction(changed)
            self._ops.update(changed)
            self._declared.clear()
        if isinstance(reduce, str) and len(self._declared) < 1024:  # ever new keys: then they are looked at each time
            self._declared.add((reduce, *data))

    # Meeting the aggregator -----------------------------------------------------------------------------

    def _meet(self) -> Meeting:
        """All ranks, in step: rank 0 starts the aggregator; its success or error becomes everybody's."""
        name = f"{self._name}/open"
        if self._aggregator is None:
            told = self._peers.agree(name, None, OPEN_TIMEOUT)
            answer = msgspec.msgpack.decode(told, type=_Opened)
            if answer.meeting is None:
                raise _error_of(answer.error_class)(f"rank 0 could not open the run: {answer.error}")
            return answer.meeting
        try:
            meeting = self._aggregator.start(OPEN_TIMEOUT)
        except Error as error:
            refusal = _Opened(error=str(error), error_class=type(error).__name__)
            self._peers.agree(name, msgspec.msgpack.encode(refusal), OPEN_TIMEOUT)
            raise
        self._peers.agree(name, msgspec.msgpack.encode(_Opened(meeting=meeting)), OPEN_TIMEOUT)
        return meeting

    def _next_meeting(self, generation: int) -> Meeting | None:
        """On the feeder's thread, when an aggregator was lost: rank 0 starts the next one, the others look for it."""
        key = f"{self._name}/aggregator/{generation}"
        if self._aggregator is None:
            told = self._feeder_peers.peek(key)
            if told is None:
                return None
            answer = msgspec.msgpack.decode(told, type=_Opened)
        else:
            try:
                answer = _Opened(meeting=self._aggregator.restart(generation, OPEN_TIMEOUT))
            except Error as error:
                answer = _Opened(error=str(error), error_class=type(error).__name__)
            self._feeder_peers.put(key, msgspec.msgpack.encode(answer))
        if answer.meeting is None:
            raise EnvironmentFault(
                f"the aggregator is gone and cannot be started again: {answer.error}. Rows are kept on this rank's disk."
            )
        return answer.meeting


def _tail_of(run: Run, earlier: tuple[JournalCopy, ...]) -> Tail | None:
    """None for a run without a journal (disabled)."""
    path = run.journal_path
    return None if path is None else Tail(path.parent.parent, earlier, lambda text: run.settings.say(text, warning=True))


def _standing(journal: Path | None) -> client.Standing:
    found = client.Standing() if journal is None else client.standing(journal.parent.parent, journal)
    return client.Standing(fenced_message(found.fenced), found.stopped) if found.fenced else found


class _Opened(msgspec.Struct):
    meeting: Meeting | None = None
    error: str = ""
    error_class: str = ""


class _Answer(msgspec.Struct):
    position: RunPosition | None = None
    error: str = ""
    error_class: str = ""


_ERRORS: dict[str, type[EnvironmentFault]] = {kind.__name__: kind for kind in (PeerLostError, DeadlineError, EnvironmentFault)}


def _error_of(name: str) -> type[Error]:
    kind = getattr(wbdist.errors, name, Error)
    return kind if isinstance(kind, type) and issubclass(kind, Error) else Error


def _check_reduce(reduce: str | Mapping[str, str]) -> None:
    for key, op in reduce.items() if isinstance(reduce, Mapping) else [("", reduce)]:
        if op not in NAMES:
            where = f" for {key!r}" if key else ""
            raise UsageError(f"reduce={op!r}{where} is not known; choose one of: {', '.join(NAMES)}")


def _on_one_host(identity: RankIdentity) -> bool:
    return identity.local_world_size == identity.world_size
