"""How a run goes on: which attempt it is, what it is built upon, and what it takes over. Resume, fork and rewind in one place.

Whoever continues is the next attempt of its run (a fork: the first of a new one), built upon a position. The position comes
from the server, or from the journals of this machine when they know more: rows that were never shipped, a server that is
away, no server at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from wbdist.core.branch import BranchPoint, split_immutable
from wbdist.core.position import Counts, RunPosition, Watermark
from wbdist.errors import CommError, DeadlineError, JobAlreadyRunningError, UsageError
from wbdist.protocol import operations, reads
from wbdist.protocol.attempts import FEATURE
from wbdist.protocol.operations import FRESH
from wbdist.run import process_end, unreadable
from wbdist.run.connection import RefusedError
from wbdist.run.journal_format import begin_request
from wbdist.run.local_history import LocalRun, Standing
from wbdist.run.shipper.placing import first_step

if TYPE_CHECKING:
    from wbdist.run.connection import Connection
    from wbdist.run.lifecycle import RunSpec

CLAIM_SECONDS = 60.0
"""How long opening a run waits for another process that is just opening one of the same id."""


class ServerRun(msgspec.Struct, frozen=True):
    """A run as the server has it."""

    attempt: int
    last_step: int
    standing: Standing
    """Of the live view; its position may be cut at a step."""

    @property
    def position(self) -> RunPosition:
        return self.standing.position


def ask(connection: Connection, entity: str, project: str, run_id: str, step: int | None = None) -> ServerRun | None:
    """None when the server (ours) has no such run, or one that was only reserved. Raises as `Connection.execute`."""
    status = operations.read_resume_status(connection.execute(operations.run_resume_status(entity or None, project, run_id)))
    found = operations.read_position(connection.execute(operations.run_position(entity or None, project, run_id)))
    if found is None or (status is None and not found[0]):
        return None
    attempt, position = found
    last_step = position.watermark.step
    if step is not None and step < last_step:
        cut = operations.read_position(connection.execute(operations.run_position(entity or None, project, run_id, step=step)))
        position = cut[1] if cut is not None else position
    config: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    metrics: list[dict[str, Any]] = []
    if status is not None:
        facts = {"display_name": status.display_name, "notes": status.notes, "tags": status.tags}
        for key, value in status.config.items():
            if key != "_wandb":
                config[key] = value["value"] if isinstance(value, dict) and "value" in value else value
        internal = status.config.get("_wandb", {})
        metrics = internal.get("value", {}).get("m", []) if isinstance(internal, dict) else []
    return ServerRun(attempt, last_step, Standing(position, config, facts, metrics))


@contextlib.contextmanager
def claim(root: Path, spec: RunSpec) -> Iterator[LocalRun]:
    """What is known here of the run that `spec` names; nobody else on this machine opens it until the journal is made.

    Raises JobAlreadyRunningError when a process here is writing the run, DeadlineError when one takes over a minute to open it.
    """
    process_end.chain_excepthook()
    lock = root / f".{spec.run_id}.opening"
    descriptor = _lock(lock, spec)
    try:
        local = LocalRun(root, spec.project, spec.entity, spec.run_id)
        if (alive := local.alive()) is not None:
            raise JobAlreadyRunningError(
                f"run {spec.run_id!r} is being written by process {alive.header.pid} on this machine (journal {alive.path}); "
                "two writers would interleave their rows: end that process first, or give this run another id"
            )
        yield local
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, spec: RunSpec) -> int:
    deadline = time.monotonic() + CLAIM_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            pass
        except FileNotFoundError:
            pass  # its holder has just removed it
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"another process has been opening run {spec.run_id!r} for {CLAIM_SECONDS:g} s; {path} is its lock"
            )
        time.sleep(0.02)


def with_server(connection: Connection, spec: RunSpec, local: LocalRun | None) -> RunSpec:
    """The spec of the next attempt, as server and local journals together know the run. Raises UsageError, CommError,
    JournalCorruptError when what came last may lie in a journal that cannot be read."""
    if not knows_attempts(connection):
        from wbdist.run import foreign

        return foreign.with_server(connection, spec, local)
    if spec.branch is not None:
        return _branched(connection, spec, local)
    if not spec.resume:
        return spec
    known = ask(connection, spec.entity, spec.project, spec.run_id)
    _refuse_unreadable(spec, local, known)
    if known is None and not local:
        return _missing(spec, f"project {spec.project!r} of {connection.base_url}")
    if local and (known is None or _local_is_newer(connection, spec, local, known)):
        return _resumed_locally(spec, local, known)
    assert known is not None
    if spec.resume == "never":
        raise _exists(spec, f"project {spec.project!r} of {connection.base_url}")
    return _continued(spec, known.attempt + 1, known.standing, cause="resume")


def knows_attempts(connection: Connection) -> bool:
    try:
        return FEATURE in operations.read_server_features(connection.execute(operations.server_features()))
    except RefusedError:
        return False


def without_server(spec: RunSpec, local: LocalRun | None, problem: str = "") -> RunSpec:
    """As `with_server`, from this machine's journals alone. `problem`: why there is no server; '' offline."""
    _refuse_unreadable(spec, local, None)
    if spec.branch is not None:
        return _branched_locally(spec, local, problem)
    if not spec.resume:
        if spec.must_be_new and local:
            raise UsageError(must_be_new_refusal(spec, str(local.root)))
        return spec
    if local:
        return _resumed_locally(spec, local, None)
    if problem and (spec.resume == "must" or spec.id_is_given):
        # Beginning anew would hide what is logged from now on behind the history that the server may have.
        raise CommError(
            f"{problem}; whether run {spec.run_id!r} exists cannot be asked, and {spec.settings.root_dir}/wandb has no journal "
            f'of it, so resume={spec.resume!r} cannot be decided: try again later, leave `resume` out, or use mode="offline"'
        )
    found = _missing(spec, f"{spec.settings.root_dir}/wandb, which is all that is known {'offline' if not problem else 'here'}")
    # Some server may have it: what is logged now then goes behind that.
    return msgspec.structs.replace(found, behind=0) if spec.resume == "allow" else found


def _refuse_unreadable(spec: RunSpec, local: LocalRun | None, known: ServerRun | None) -> None:
    if local is not None:
        unreadable.refuse(spec.settings, spec.run_id, local.unreadable, local.attempt, 0 if known is None else known.attempt)


def must_be_new_refusal(spec: RunSpec, where: str, *, resumable: bool = True) -> str:
    """`resumable`: whether who asks for the run takes `resume`; init_ranks and jobs do not."""
    exists = f"run {spec.run_id!r} exists already in project {spec.project!r} of {where}. "
    exists += "Logging to it again would mix two histories"
    if not resumable:
        return (
            f"{exists}: leave `id` out, choose another, or use a wbdist.job with a checkpoint_dir, which goes on with its run"
        )
    return (
        f'{exists}: continue it with resume="allow" (or "must"), leave `id` out, or choose another. '
        "(A job with a checkpoint_dir continues its run by itself.)"
    )


def _exists(spec: RunSpec, where: str) -> UsageError:
    return UsageError(
        f'run {spec.run_id!r} exists in {where}, and resume="never" allows no existing one: leave `id` out, choose '
        'another, or continue it with resume="allow"'
    )


def _missing(spec: RunSpec, where: str) -> RunSpec:
    if spec.resume == "must":
        raise UsageError(
            f'run {spec.run_id!r} does not exist in {where}, and resume="must" needs one: check id, project and entity, '
            'or use resume="allow" to create it'
        )
    return spec


def _local_is_newer(connection: Connection, spec: RunSpec, local: LocalRun, known: ServerRun) -> bool:
    """Whether this machine's journals go beyond what the server has of the run."""
    first = local.journals[0].header
    if first.behind is not None:
        # Begun without knowing what the server has: only where it is the server's first attempt, too, do numbers compare.
        there_too = reads.read_attempts(connection.execute(reads.attempts(known.position.entity, spec.project, spec.run_id)))
        if not any(one.attempt == 1 and one.nonce == (first.root or first.nonce) for one in there_too):
            return False
    if local.attempt != known.attempt:
        return local.attempt > known.attempt
    below = known.position.watermark
    there = below.counts if below.attempt == known.attempt and known.position.run_id == spec.run_id else {}
    here = local.state().position.watermark.counts
    if all(count <= there.get(stream, {}).get(writer, 0) for stream, by in here.items() for writer, count in by.items()):
        return False
    # The attempt's number is the same: is it the same incarnation? Beginning it once more changes nothing, and tells.
    header = local.journals[-1].header
    entity = header.entity or known.position.entity
    begun = operations.read_begun(
        connection.execute(operations.begin_attempt(entity, spec.project, spec.run_id, begin_request(header)))
    )
    return begun.accepted


def _resumed_locally(spec: RunSpec, local: LocalRun, known: ServerRun | None) -> RunSpec:
    if spec.resume == "never":
        raise _exists(spec, str(local.root))
    here = local.state()
    if known is not None:
        position, there = here.position, known.standing
        mark = position.watermark
        if known.position.watermark.attempt == mark.attempt:
            # Other writers of the attempt, whose journals are on other machines.
            counts = _larger(mark.counts, known.position.watermark.counts)
            mark = Watermark(mark.attempt, counts, max(mark.step, known.position.watermark.step))
            position = msgspec.structs.replace(position, watermark=mark)
        config, facts = {**there.config, **here.config}, {**here.facts, **there.facts}
        here = Standing(position, config, facts, here.metrics or there.metrics)
    continued = _continued(spec, local.attempt + 1, here, cause="resume")
    first = local.journals[0]
    if first.header.behind is None:
        return continued
    return msgspec.structs.replace(
        continued,
        behind=first.header.behind if first.header.root else first_step(first.path) or 0,
        root=first.header.root or first.header.nonce,
    )


def _larger(one: Counts, other: Counts) -> Counts:
    merged = {stream: dict(by_writer) for stream, by_writer in one.items()}
    for stream, by_writer in other.items():
        mine = merged.setdefault(stream, {})
        for writer, count in by_writer.items():
            mine[writer] = max(count, mine.get(writer, 0))
    return merged


def _continued(spec: RunSpec, attempt: int, standing: Standing, *, cause: str) -> RunSpec:
    """The same run goes on: what this call does not say stays as it was."""
    position, facts = standing.position, standing.facts
    source = split_immutable(position.run_id)[0]
    return msgspec.structs.replace(
        spec,
        attempt=attempt,
        base=position,
        base_run="" if source == spec.run_id else position.run_id,
        cause=cause if spec.cause == "start" else spec.cause,
        config={**standing.config, **spec.config},
        metrics=spec.metrics or tuple(standing.metrics),
        name=spec.name or facts.get("display_name") or None,
        notes=spec.notes if spec.notes is not None else facts.get("notes") or None,
        tags=spec.tags if spec.tags is not None else tuple(facts.get("tags") or ()) or None,
        group=spec.group or facts.get("group") or None,
        job_type=spec.job_type or facts.get("job_type") or None,
    )


# Fork and rewind --------------------------------------------------------------------------------------


def _branched(connection: Connection, spec: RunSpec, local: LocalRun | None) -> RunSpec:
    branch = _branch(spec)
    where = f"project {spec.project!r} of {connection.base_url}"
    known = ask(connection, spec.entity, spec.project, branch.source)
    _refuse_unreadable(spec, local, None if spec.is_fork else known)
    source = _local_source(spec, local)
    if source and (known is None or _local_is_newer(connection, _as_source(spec), source, known)):
        return _branched_locally(spec, local, "")
    if known is None:
        raise UsageError(f"{_argument(spec)}: run {branch.source!r} does not exist in {where}")
    _check_step(spec, known.last_step, where)
    cut = ask(connection, spec.entity, spec.project, branch.source, branch.step)
    own = known if branch.source == spec.run_id else None
    attempt = 1
    if not spec.is_fork:
        own = own or ask(connection, spec.entity, spec.project, spec.run_id)
        attempt = max(own.attempt if own else 0, local.attempt if local else 0) + 1
    assert cut is not None
    branched = _cut(spec, attempt, cut.standing)
    # The server finds the cut, so that the lineage names what was asked for; in this incarnation, so that it is this very cut.
    number = split_immutable(branch.source)[1]
    pinned = f"{branch.run_id}:{known.attempt if number is None else number}"
    return msgspec.structs.replace(branched, at_step=branch.step, base_run="" if own is known else pinned)


def _branched_locally(spec: RunSpec, local: LocalRun | None, problem: str) -> RunSpec:
    branch = _branch(spec)
    source = _local_source(spec, local)
    position = None
    state = None
    if source:
        number = split_immutable(branch.source)[1]
        state = source.state(number)
        _check_step(spec, state.position.watermark.step, str(source.root))
        position = source.position_at(branch.step, number)
    attempt = 1 if spec.is_fork else (local.attempt + 1 if local else _unheard_of_attempt())
    if position is not None and state is not None:
        return _cut(spec, attempt, msgspec.structs.replace(state, position=position))
    if problem:
        spec.settings.say(f"{problem}; the server finds {branch.source} up to step {branch.step} when it is back", warning=True)
    return msgspec.structs.replace(
        spec,
        attempt=attempt,
        base_run=branch.source if branch.source != spec.run_id else "",
        at_step=branch.step,
        fresh=FRESH,
        cause="fork" if spec.is_fork else "rewind",
    )


def _unheard_of_attempt() -> int:
    """A number for an attempt of a run of which nothing is known here: minutes since 2020, above any that was counted up.

    The server numbers nothing: the attempt's number is in its journal, so that shipping it twice is shipping the same.
    """
    return int(time.time() - 1_577_836_800) // 60


def _cut(spec: RunSpec, attempt: int, standing: Standing) -> RunSpec:
    branch = _branch(spec)
    position = standing.position
    mark = position.watermark
    counts = {stream: by_writer for stream, by_writer in mark.counts.items() if stream not in FRESH}
    # The next step is the one behind the point that was asked for, also where that step has no row.
    position = msgspec.structs.replace(position, watermark=Watermark(mark.attempt, counts, branch.step))
    cause = "fork" if spec.is_fork else "rewind"
    kept = {} if spec.is_fork else standing.facts
    cut = msgspec.structs.replace(standing, position=position, facts=kept)
    return msgspec.structs.replace(_continued(spec, attempt, cut, cause=cause), fresh=FRESH)


def _branch(spec: RunSpec) -> BranchPoint:
    assert spec.branch is not None
    return spec.branch


def _argument(spec: RunSpec) -> str:
    branch = _branch(spec)
    return f"{'fork_from' if spec.is_fork else 'resume_from'}={f'{branch.source}?_step={branch.step}'!r}"


def _as_source(spec: RunSpec) -> RunSpec:
    return msgspec.structs.replace(spec, run_id=_branch(spec).run_id)


def _local_source(spec: RunSpec, local: LocalRun | None) -> LocalRun | None:
    """This machine's journals of the run that is branched from; None when it has none."""
    source = _branch(spec).run_id
    if local is not None and local.run_id == source:
        return local or None
    root = local.root if local is not None else Path(spec.settings.root_dir) / "wandb"
    found = LocalRun(root, spec.project, spec.entity, source)
    unreadable.tell(spec.settings, found.unreadable)  # a fork leaves its source as it is
    return found or None


def _check_step(spec: RunSpec, last: int, where: str) -> None:
    if _branch(spec).step > last:
        raise UsageError(
            f"{_argument(spec)}: the history of {_branch(spec).source!r} in {where} ends with step {last}; "
            + ("there is nothing to branch from yet" if last < 0 else f"name a step from 0 to {last}")
        )
