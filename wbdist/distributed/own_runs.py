"""Strategies under which a rank's rows are its own: a run a rank, one run that all write, one run that only rank 0 writes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition
from wbdist.core.reducers import DEFAULT
from wbdist.core.tails import JournalCopy, JournalPrefix
from wbdist.distributed import opening
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.parts_cut import RunCut
from wbdist.distributed.rank_run import RankRun, check_reduce
from wbdist.distributed.tail import Tail, fenced_message
from wbdist.errors import UsageError
from wbdist.protocol import names
from wbdist.protocol.attempts import SHARED
from wbdist.run import machine
from wbdist.run.handle import Run
from wbdist.run.lifecycle import RunSpec
from wbdist.run.shipper import client
from wbdist.run.values import NeedsFilesError, as_step, flat_row


class OwnRun(RankRun):
    """A run of this rank's own: per_rank, and a process that is alone."""

    def __init__(self, run: Run, earlier: tuple[JournalCopy, ...], strategy: str, reason: str) -> None:
        self.run = run
        self.group = run.group
        self.strategy = strategy
        self.reason = reason
        self._cursor: RunCut | None = None
        self._lock = threading.Lock()
        self._tail = tail_of(run, earlier)
        self._checked: object = DEFAULT
        """What was asked for last: a script asks by the same mapping at each step, and nothing comes of it here."""

    def log(self, data: Mapping[str, Any], step: int | None = None, reduce: str | Mapping[str, str] = DEFAULT) -> None:
        if reduce is not self._checked and reduce is not DEFAULT:
            check_reduce(reduce)
            self._checked = reduce
        self.run.log(data, step=step)

    def commit_row(self) -> None:
        self.run.commit_row()

    def drain(self, step: int, timeout: float) -> RunPosition:
        del timeout
        path = self.run.journal_path
        if path is None:  # disabled
            return self.run.position()
        self.run.flush(0.0)
        with self._lock:
            if self._cursor is None:
                self._cursor = RunCut(path)
            return self._cursor.position(step)

    def tail(self) -> list[JournalPrefix]:
        with self._lock:
            cursor = self._cursor
        return [] if cursor is None or self._tail is None else self._tail.of(cursor.cut(), cursor.step)

    def standing(self) -> client.Standing:
        return standing_of(self.run.journal_path)

    def finish(self, exit_code: int | None = None) -> None:
        self.run.finish(exit_code)
        with self._lock:
            if self._cursor is not None:
                self._cursor.close()


class SharedWriter(OwnRun):
    """Strategy shared: this rank is one of the writers of the one run."""

    def __init__(self, run: Run, earlier: tuple[JournalCopy, ...], reason: str, peers: Coordinator, name: str) -> None:
        super().__init__(run, earlier, "shared", reason)
        self._peers = peers.clone()
        self._name = name

    def drain(self, step: int, timeout: float) -> RunPosition:
        own = super().drain(step, timeout)
        return opening.merged_position(self._peers, f"{self._name}/drain/{step}", own, timeout)

    def finish(self, exit_code: int | None = None) -> None:
        super().finish(exit_code)
        self._peers.close()


class OnlyRank0(OwnRun):
    """Strategy rank_zero_only: rank 0's run; on the others a run that keeps nothing, and says the same of what it is given."""

    def __init__(self, run: Run, earlier: tuple[JournalCopy, ...], reason: str, peers: Coordinator, name: str) -> None:
        super().__init__(run, earlier, "rank_zero_only", reason)
        self._peers = peers.clone()
        self._name = name

    def log(self, data: Mapping[str, Any], step: int | None = None, reduce: str | Mapping[str, str] = DEFAULT) -> None:
        if self._peers.rank != 0:
            with suppress(NeedsFilesError):  # media: rank 0 writes the files
                flat_row(data)
            step = None if step is None else as_step(step)
        super().log(data, step, reduce)

    def drain(self, step: int, timeout: float) -> RunPosition:
        name = f"{self._name}/drain/{step}"
        return opening.rank0s_position(self._peers, name, lambda: OwnRun.drain(self, step, timeout), timeout)

    def finish(self, exit_code: int | None = None) -> None:
        super().finish(exit_code)
        self._peers.close()


def per_rank_id(run_id: str, slot: int, *, in_sweep: bool) -> str:
    """The id of a slot's run in the job `run_id`. A sweep knows its trial by the id that it gave: slot 0's run has that one."""
    return run_id if in_sweep and slot == 0 else f"{run_id}-r{slot}"


def first_spec(spec: RunSpec) -> RunSpec:
    """`spec` with the id that slot 0's run has under per_rank: what is known of it is known of the job."""
    return msgspec.structs.replace(spec, run_id=per_rank_id(spec.run_id, 0, in_sweep=bool(spec.sweep)))


def per_rank_spec(spec: RunSpec, identity: RankIdentity) -> RunSpec:
    """The spec of this rank's own run, of the job's."""
    slot = identity.rank if identity.slot < 0 else identity.slot
    try:
        run_id = names.run_id(per_rank_id(spec.run_id, slot, in_sweep=bool(spec.sweep)))
    except UsageError as error:
        raise UsageError(f"strategy per_rank adds -r{slot} to the run id: {error}") from error
    return msgspec.structs.replace(
        spec,
        run_id=run_id,
        name=f"{spec.name}-rank{slot}" if spec.name else None,
        sweep=spec.sweep if slot == 0 else "",
        group=spec.group or spec.run_id,
        job_type=spec.job_type or ("main" if slot == 0 else "worker"),
        config={
            "rank": identity.rank,
            "world_size": identity.world_size,
            "local_rank": identity.local_rank,
            "host": spec.settings.host or socket.gethostname(),
            **spec.config,  # the script's win: LoRA's `rank` is no place among others
        },
    )


def shared_spec(spec: RunSpec, identity: RankIdentity) -> RunSpec:
    """The spec of this rank as a writer of the job's run: rank 0 says what the run is, and when it ends."""
    first = identity.rank == 0
    settings = msgspec.structs.replace(
        spec.settings,
        x_primary=first,
        x_update_finish_state=first,
        x_label=spec.settings.x_label or label_of(spec, identity),
    )
    return msgspec.structs.replace(
        spec,
        settings=settings,
        nonce=f"{SHARED}-{spec.nonce}" if spec.nonce else SHARED,
        sample="all" if identity.local_rank == 0 else "process",
        must_be_new=spec.must_be_new and first,
    )


def label_of(spec: RunSpec, identity: RankIdentity) -> str:
    """What stands before a rank's printed lines and behind its system metrics where several ranks write one run."""
    several_hosts = identity.local_world_size < identity.world_size
    return f"rank{identity.rank}@{spec.settings.host or machine.host()}" if several_hosts else f"rank{identity.rank}"


def silent_spec(spec: RunSpec) -> RunSpec:
    """The spec of a run that keeps nothing."""
    return msgspec.structs.replace(
        spec,
        settings=msgspec.structs.replace(spec.settings, mode="disabled"),
        earlier=(),
        capture_console=False,
        sample="nothing",
    )


def tail_of(run: Run, earlier: tuple[JournalCopy, ...]) -> Tail | None:
    """None for a run without a journal (disabled)."""
    path = run.journal_path
    return None if path is None else Tail(path.parent.parent, earlier, lambda text: run.settings.say(text, warning=True))


def standing_of(journal: Path | None) -> client.Standing:
    """What the server said about the run of this journal."""
    found = client.Standing() if journal is None else client.standing(journal.parent.parent, journal)
    return client.Standing(fenced_message(found.fenced), found.stopped) if found.fenced else found
