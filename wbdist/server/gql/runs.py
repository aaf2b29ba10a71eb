"""Fields of a run, and the mutations that make and change one."""

from __future__ import annotations

import math
import secrets
from typing import Any

import msgspec

from wbdist.core import ids
from wbdist.core.position import CONSOLE, EVENTS, HISTORY, Watermark
from wbdist.core.states import RunEvent
from wbdist.protocol import jsonvalues
from wbdist.protocol.attempts import BeginAttempt
from wbdist.protocol.operations import UPSERT_NAME
from wbdist.server.gql.call import (
    Call,
    Info,
    Resolver,
    call_of,
    names,
    refusals,
    refuse,
    run_of_storage_id,
    run_or_404,
    storage_id,
)
from wbdist.server.gql.session import ProjectRef, number_of
from wbdist.server.store.interface import AttemptRow, Opening, RunFields, RunRow

_UPSERT_FIELDS = {
    "displayName": "display_name",
    "groupName": "group",
    "jobType": "job_type",
    "notes": "notes",
    "tags": "tags",
    "host": "host",
    "jobProgram": "program",
    "jobRepo": "repo",
    "commit": "commit",
    "sweep": "sweep",
}
"""Input field -> field of the store. Null and absent both leave a field as it is; an empty list of tags is a value."""


def _upsert_bucket(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    store = call.app.store
    if input.get("description"):
        raise refuse(400, "this server keeps no `description` of a run: use `notes`")
    state = input.get("state")
    if state not in {None, "running", "pending"}:
        raise refuse(400, f"a run is created running or pending, not {state[:20]!r}")
    entity, project, run_id = _target(call, input)
    now = call.app.clock()
    ours = info.operation.name is not None and info.operation.name.value == UPSERT_NAME
    fields = _fields(input)
    # Our own client's upserts open nothing: `beginAttempt` does, and an upsert may be the echo of a superseded attempt.
    opening = None if ours else _opening(call, input, fields, run_id)
    with refusals():
        run, inserted = store.upsert_run(entity, project, run_id, fields, now, opening=opening, keep_config=ours or call.shared)
    if state == "pending" and inserted:
        run = store.record_event(run.pk, RunEvent.REQUEUE, now)
    elif not (inserted or ours) and (input.get("host") or input.get("jobProgram")):
        run = store.record_event(run.pk, RunEvent.START, now)
    return {"bucket": run, "inserted": inserted}


def _opening(call: Call, input: dict[str, Any], fields: RunFields, run_id: str) -> Opening | None:
    """How a process opens the run with this upsert; None when it is an edit, or a later word of a process that has it open.

    W&B's client says where it runs and gives its config without the environment (`_wandb.e`), which it has gathered only when
    it sends the next. It names the run by its storage id when it has asked for its state before: it resumes it then. Of several
    processes that share a run none opens it anew.
    """
    inner = fields.config.get("_wandb") if isinstance(fields.config, dict) else None
    said = inner.get("value") if isinstance(inner, dict) else None
    if not isinstance(said, dict) or said.get("e") or not (input.get("host") or input.get("jobProgram")):
        return None
    branch = said.get("branch_point")
    source, step = (branch.get("run_id"), branch.get("step")) if isinstance(branch, dict) else (None, None)
    if isinstance(source, str) and source and source != run_id:
        return Opening("fork", source, _step(step))
    if call.shared:
        return None
    return Opening("resume" if input.get("id") else "start")


def _step(value: object) -> int:
    """A branch point's step: W&B's client counts on from the next whole one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -(2**53) < value < 2**53:
        raise refuse(400, f"a branch point's step must be a number, not {value!r}")
    return math.floor(value)


def _rewind_run(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    if input["metricName"] != "_step":
        raise refuse(400, f"a run is rewound to a `_step`, not to a value of {input['metricName'][:80]!r}")
    run = run_or_404(call, input.get("entityName"), input.get("projectName") or "uncategorized", input["runName"])
    opening = Opening("rewind", step=_step(input["metricValue"]))
    with refusals():
        return {"rewoundRun": call.app.store.open_run(run.pk, opening, call.app.clock())}


def _target(call: Call, input: dict[str, Any]) -> tuple[str, str, str]:
    if input.get("id"):
        run = run_of_storage_id(call, input["id"])
        return run.entity, run.project, run.run_id
    run_id = input.get("name") or ids.id_from_entropy(secrets.token_bytes(16))
    return names(call, input.get("entityName"), input.get("modelName") or "uncategorized", run_id)


def _fields(input: dict[str, Any]) -> RunFields:
    fields = RunFields()
    for source, target in _UPSERT_FIELDS.items():
        if input.get(source) is not None and (source != "sweep" or input[source]):
            setattr(fields, target, input[source])
    try:
        if input.get("config") is not None:
            fields.config = jsonvalues.loads_object(input["config"], "config")
        if input.get("summaryMetrics") is not None:
            fields.summary = jsonvalues.loads_object(input["summaryMetrics"], "summaryMetrics")
    except ValueError as error:
        raise refuse(400, str(error)) from None
    return fields


def _begin_attempt(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    run = run_or_404(call, input.get("entityName"), input["projectName"], input["runName"])
    if input["attempt"] < 1:
        raise refuse(400, f"attempts are numbered from 1, not {input['attempt']}")
    for field in ("nonce", "writer"):
        if not 1 <= len(input[field]) <= 128:
            raise refuse(400, f"{field} must have 1 to 128 characters")
    try:
        base = None if input.get("base") is None else msgspec.convert(input["base"], Watermark)
    except msgspec.ValidationError as error:
        raise refuse(400, f"base is not a watermark: {error}") from None
    request = BeginAttempt(
        attempt=input["attempt"],
        nonce=input["nonce"],
        writer=input["writer"],
        base=base,
        cause=input.get("cause") or "",
        base_run=input.get("baseRun") or "",
        at_step=input.get("atStep"),
        fresh=tuple(input.get("fresh") or ()),
        started=input.get("started") or 0.0,
    )
    with refusals():
        begun = call.app.store.begin_attempt(run.pk, request, call.app.clock())
    return {
        "attempt": begun.attempt,
        "accepted": begun.accepted,
        "next": begun.next,
        "lines": begun.lines,
        "historyLineCount": begun.lines.get(HISTORY, 0),
    }


# Fields -----------------------------------------------------------------------------------------------


def _wandb_config(run: RunRow, _info: Info, keys: list[str] | None = None) -> str:
    entry = run.config.get("_wandb")
    found = entry.get("value") if isinstance(entry, dict) else None
    found = found if isinstance(found, dict) else {}
    return jsonvalues.dumps(found if keys is None else {key: found[key] for key in keys if key in found})


def _system_metrics(run: RunRow, info: Info) -> str:
    tail = call_of(info).app.store.history_tail(run.pk, EVENTS, attempt=run.view) or {}
    return jsonvalues.dumps({key: value for key, value in tail.items() if key.startswith("system")})


def _tail(stream: str) -> Resolver:
    def resolve(run: RunRow, info: Info) -> str:
        """A JSON list of JSON strings, never null: W&B's client cannot resume from a null tail."""
        tail = call_of(info).app.store.history_tail(run.pk, stream, attempt=run.view)
        return jsonvalues.dumps([] if tail is None else [jsonvalues.dumps(tail)])

    return resolve


def _lines(stream: str) -> Resolver:
    return lambda run, _info: run.line_counts.get(stream, 0)


def _position(run: RunRow, info: Info, step: int | None = None) -> dict[str, Any]:
    with refusals():
        found: dict[str, Any] = msgspec.to_builtins(call_of(info).app.store.position(run, step=step))
    return found


def _history_line_count(run: RunRow, info: Info) -> int:
    """W&B's client counts on from here, but not where several write to one run: each of them counts its own lines."""
    return 0 if call_of(info).shared else run.line_counts.get(HISTORY, 0)


def _attempts(run: RunRow, info: Info) -> list[AttemptRow]:
    return call_of(info).app.store.attempts(run.pk)


def _project_of(run: RunRow) -> ProjectRef:
    return ProjectRef(run.entity, run.project)


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Mutation": {"upsertBucket": _upsert_bucket, "rewindRun": _rewind_run, "beginAttempt": _begin_attempt},
    "Run": {
        "id": lambda run, _info: storage_id(run),
        "name": lambda run, _info: run.run_id,
        "displayName": lambda run, _info: run.display_name,
        "description": lambda _run, _info: None,
        "state": lambda run, _info: run.state.value,
        "config": lambda run, _info: jsonvalues.dumps(run.config),
        "wandbConfig": _wandb_config,
        "summaryMetrics": lambda run, _info: jsonvalues.dumps(run.summary),
        "systemMetrics": _system_metrics,
        "jobType": lambda run, _info: run.job_type,
        "jobProgram": lambda run, _info: run.program,
        "jobRepo": lambda run, _info: run.repo,
        "sweepName": lambda run, _info: run.sweep or None,
        "readOnly": lambda _run, _info: False,
        "createdAt": lambda run, _info: run.created_at,
        "heartbeatAt": lambda run, _info: run.heartbeat_at,
        "user": lambda run, _info: {"id": f"User:{run.entity}", "name": run.entity, "username": run.entity},
        "projectId": lambda run, _info: number_of(_project_of(run)),
        "project": lambda run, _info: _project_of(run),
        "historyLineCount": _history_line_count,
        "eventsLineCount": _lines(EVENTS),
        "logLineCount": _lines(CONSOLE),
        "historyTail": _tail(HISTORY),
        "eventsTail": _tail(EVENTS),
        "attempts": _attempts,
        "position": _position,
        "lineage": lambda run, info: call_of(info).app.store.lineage(run),
    },
    "Attempt": {
        "baseAttempt": lambda attempt, _info: attempt.base_attempt,
        "baseStep": lambda attempt, _info: attempt.base_step,
        "startedAt": lambda attempt, _info: attempt.started_at,
        "endedAt": lambda attempt, _info: attempt.ended_at,
        "endCause": lambda attempt, _info: attempt.end_cause,
        "exitCode": lambda attempt, _info: attempt.exit_code,
        "rowsLive": lambda attempt, _info: attempt.rows_live,
        "lostSeconds": lambda attempt, _info: attempt.lost_seconds,
    },
}
