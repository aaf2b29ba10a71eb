"""What people do to runs through W&B's API: delete, stop, requeue, give up."""

from __future__ import annotations

from typing import Any

from wbdist.core.states import RunEvent, RunState
from wbdist.server.gql.call import Info, Resolver, call_of, refuse, run_of_storage_id

_S = RunState
_ALLOWED = {
    "pending": (RunEvent.REQUEUE, frozenset({_S.RUNNING, _S.FAILED, _S.CRASHED, _S.PREEMPTED})),
    "failed": (RunEvent.GIVE_UP, frozenset({_S.PENDING, _S.RUNNING})),
}
"""state asked for -> the event that leads there, and from where W&B allows it"""


def _delete_run(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    if input.get("deleteArtifacts"):
        raise refuse(400, "artifacts are kept when a run is deleted; delete the run alone (delete_artifacts=False)")
    call.app.store.delete_run(run_of_storage_id(call, input["id"]).pk, call.app.clock())
    return {"clientMutationId": None}


def _stop_run(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    run = run_of_storage_id(call, input["id"])
    if run.state not in {_S.RUNNING, _S.PREEMPTING}:
        return {"success": False}
    call.app.store.ask_to_stop(run.pk)
    return {"success": True}


def _update_run_state(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    run = run_of_storage_id(call, input["id"])
    if input["state"] not in _ALLOWED:
        raise refuse(400, f"a run can be set to {' or '.join(_ALLOWED)}, not to {input['state'][:40]!r}")
    event, before = _ALLOWED[input["state"]]
    if run.state not in before:
        raise refuse(
            400, f"a {run.state.value} run cannot be set to {input['state']}: only a {' or '.join(sorted(before))} one"
        )
    call.app.store.record_event(run.pk, event, call.app.clock())
    return {"success": True}


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Mutation": {"deleteRun": _delete_run, "stopRun": _stop_run, "updateRunState": _update_run_state},
}
