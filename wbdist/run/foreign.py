"""Going on with a run on a server that knows no attempts (W&B's own): by W&B's rules, and the run says which one applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from wbdist.core.position import RunPosition, Watermark
from wbdist.errors import UsageError
from wbdist.protocol import operations
from wbdist.protocol.operations import ResumeStatus
from wbdist.run import unreadable
from wbdist.run.connection import RefusedError

if TYPE_CHECKING:
    from wbdist.run.connection import Connection
    from wbdist.run.lifecycle import RunSpec
    from wbdist.run.local_history import LocalRun


def with_server(connection: Connection, spec: RunSpec, local: LocalRun | None) -> RunSpec:
    """As `continuation.with_server`. Lines go behind those the server has, by their number; steps behind its last one."""
    if spec.branch is not None and spec.is_fork:
        return _forked(connection, spec)
    known = _status(connection, spec, spec.run_id)
    if local is not None:
        unreadable.tell(spec.settings, local.unreadable)
    where = f"project {spec.project!r} of {connection.base_url}"
    if spec.branch is not None:
        if known is None:
            raise UsageError(f"resume_from: run {spec.run_id!r} does not exist in {where}")
        return _rewound(connection, spec, known, local)
    if known is None:
        if spec.resume == "must":
            raise UsageError(f'run {spec.run_id!r} does not exist in {where}, and resume="must" needs one; "allow" creates it')
        return spec
    if spec.resume == "never":
        raise UsageError(f'run {spec.run_id!r} exists in {where}, and resume="never" allows no existing one')
    last = _last_step(known)
    _say(
        spec,
        connection,
        f"by W&B's rules: behind step {last}, whatever this machine's journals say; steps up to there are skipped",
    )
    return _behind(spec, known, last, local)


def _status(connection: Connection, spec: RunSpec, run_id: str) -> ResumeStatus | None:
    status = operations.run_resume_status(spec.entity or None, spec.project, run_id)
    return operations.read_resume_status(connection.execute(status))


def _last_step(known: ResumeStatus) -> int:
    """W&B's rule: of the last history line, else of the summary, when there are lines at all."""
    found = known.history_tail.get("_step", known.summary.get("_step"))
    return int(found) if isinstance(found, int | float) and any(known.lines.values()) else -1


def _behind(spec: RunSpec, known: ResumeStatus, last: int, local: LocalRun | None, **other: Any) -> RunSpec:
    config = {key: value.get("value") for key, value in known.config.items() if key != "_wandb" and isinstance(value, dict)}
    internal = known.config.get("_wandb", {})
    metrics = internal.get("value", {}).get("m", []) if isinstance(internal, dict) else []
    inner = known.summary.get("_wandb")
    times = [known.events_tail.get("_runtime"), known.summary.get("_runtime")]
    times.append(inner.get("runtime") if isinstance(inner, dict) else None)
    attempt = max(local.attempt if local else 0, 1)
    base = RunPosition(
        run_id=spec.run_id,
        project=spec.project,
        entity=spec.entity,
        watermark=Watermark(attempt, {}, last),
        summary=known.summary,
        runtime=max((float(time) for time in times if isinstance(time, int | float)), default=0.0),
    )
    described = {
        "attempt": attempt + 1,
        "base": base,
        "cause": "resume",
        "config": {**config, **spec.config},
        "metrics": spec.metrics or tuple(metrics),
        "name": spec.name or known.display_name or None,
        "notes": spec.notes if spec.notes is not None else known.notes or None,
        "tags": spec.tags if spec.tags is not None else tuple(known.tags) or None,
    }
    return msgspec.structs.replace(spec, **{**described, **other})


def _forked(connection: Connection, spec: RunSpec) -> RunSpec:
    """W&B's fork: the branch point travels in the new run's config, and the server copies what lies up to it."""
    branch = spec.branch
    assert branch is not None
    known = _status(connection, spec, branch.source)
    if known is None:
        raise UsageError(
            f"fork_from: run {branch.source!r} does not exist in project {spec.project!r} of {connection.base_url}"
        )
    _say(spec, connection, f"by W&B's own fork: {branch.source} up to step {branch.step}")
    point = {"run_id": branch.source, "step": branch.step}
    anew = {"attempt": 1, "cause": "fork", "name": spec.name, "notes": spec.notes, "tags": spec.tags}
    forked = _behind(spec, known, branch.step, None, **anew)
    return msgspec.structs.replace(
        forked, base_run=branch.source, at_step=branch.step, fresh=operations.FRESH, branch_point=point
    )


def _rewound(connection: Connection, spec: RunSpec, known: ResumeStatus, local: LocalRun | None) -> RunSpec:
    """W&B's rewind where the server offers it; else its rule of resuming: what is logged again is skipped."""
    branch = spec.branch
    assert branch is not None
    try:
        connection.execute(operations.rewind_run(spec.entity or None, spec.project, spec.run_id, branch.step))
    except RefusedError as error:
        last = _last_step(known)
        _say(
            spec,
            connection,
            f"without the rewind to step {branch.step} ({error}): rows up to step {last} stay, and are skipped",
        )
        return _behind(spec, known, last, local)
    _say(spec, connection, f"by W&B's own rewind to step {branch.step}")
    fresh = _status(connection, spec, spec.run_id) or known
    return _behind(spec, fresh, branch.step, local, cause="rewind", fresh=operations.FRESH)


def _say(spec: RunSpec, connection: Connection, how: str) -> None:
    spec.settings.say(f"{connection.base_url} knows no attempts: run {spec.run_id} goes on {how}", warning=True)
