"""The GraphQL operations that our own client sends, as values: a document, its variables, and the answer's meaning.

Documents that W&B's server must understand too are W&B's own texts, cut to the fields we read. Post
`Operation.body()` to `/graphql` with HTTP Basic user `api`; give the answer's `data` object to the matching `read_*`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from wbdist.core.position import CONSOLE, EVENTS, HISTORY, RunPosition
from wbdist.protocol import jsonvalues
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt


class Operation(msgspec.Struct, frozen=True):
    """One GraphQL request."""

    name: str
    query: str
    variables: dict[str, Any] = {}

    def body(self) -> bytes:
        """The POST body. Absent and None variables mean the same to the server: leave unchanged."""
        variables = {key: value for key, value in self.variables.items() if value is not None}
        return msgspec.json.encode({"query": self.query, "variables": variables, "operationName": self.name})


def error_message(body: bytes) -> str:
    """The first message of an error answer in any of the forms servers use; '' when there is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if not isinstance(value, dict):
        return ""
    found = value.get("errors") or value.get("error") or ""
    if isinstance(found, list):
        found = found[0]
    if isinstance(found, dict):
        found = found.get("message", "")
    return found if isinstance(found, str) else ""


def _dig(data: Mapping[str, Any], *path: str) -> Any:
    """data[path[0]][path[1]]…, None as soon as one is null or absent."""
    value: Any = data
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


# Session ----------------------------------------------------------------------------------------------


def viewer() -> Operation:
    return Operation("Viewer", "query Viewer { viewer { id entity username email } }")


class Viewer(msgspec.Struct, frozen=True):
    username: str
    entity: str
    """The default entity."""


def read_viewer(data: Mapping[str, Any]) -> Viewer | None:
    """None: the key is not accepted."""
    found = _dig(data, "viewer")
    if not found:
        return None
    return Viewer(username=found.get("username") or "", entity=found.get("entity") or "")


def server_features() -> Operation:
    return Operation("ServerFeaturesQuery", "query ServerFeaturesQuery { serverInfo { features { name isEnabled } } }")


def read_server_features(data: Mapping[str, Any]) -> frozenset[str]:
    """The enabled ones. Look for `attempts.FEATURE`."""
    features = _dig(data, "serverInfo", "features") or ()
    return frozenset(feature["name"] for feature in features if feature and feature.get("isEnabled"))


# Writing a run ----------------------------------------------------------------------------------------

UPSERT_NAME = "UpsertAttemptedRun"
"""Other servers read the mutation, not the operation's name; ours knows by it that `begin_attempt` governs the run's state."""

_UPSERT = """
mutation UpsertAttemptedRun($id: String, $name: String, $project: String, $entity: String, $groupName: String,
    $displayName: String, $notes: String, $commit: String, $config: JSONString, $host: String, $program: String,
    $repo: String, $jobType: String, $tags: [String!], $summaryMetrics: JSONString, $sweep: String) {
  upsertBucket(input: {id: $id, name: $name, modelName: $project, entityName: $entity, groupName: $groupName,
      displayName: $displayName, notes: $notes, commit: $commit, config: $config, host: $host, jobProgram: $program,
      jobRepo: $repo, jobType: $jobType, tags: $tags, summaryMetrics: $summaryMetrics, sweep: $sweep}) {
    bucket { id name displayName historyLineCount project { id name entity { id name } } }
    inserted
  }
}
"""


def upsert_run(
    *,
    project: str,
    run_id: str,
    entity: str | None = None,
    storage_id: str | None = None,
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    display_name: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    notes: str | None = None,
    tags: Sequence[str] | None = None,
    host: str | None = None,
    program: str | None = None,
    commit: str | None = None,
    repo: str | None = None,
    sweep: str | None = None,
) -> Operation:
    """Creates or updates. `config` is in W&B's form {key: {"value": v}}, always the whole of it. None leaves a field unchanged.

    On our server it does not change the state of a known run: `begin_attempt` does. W&B's server knows no attempts and
    takes it for the word of a running process.
    """
    return Operation(
        UPSERT_NAME,
        _UPSERT,
        {
            "id": storage_id,
            "name": run_id,
            "project": project,
            "entity": entity,
            "groupName": group,
            "displayName": display_name,
            "notes": notes,
            "commit": commit,
            "config": None if config is None else jsonvalues.dumps(config),
            "host": host,
            "program": program,
            "repo": repo,
            "jobType": job_type,
            "tags": None if tags is None else list(tags),
            "summaryMetrics": None if summary is None else jsonvalues.dumps(summary),
            "sweep": sweep,
        },
    )


class UpsertedRun(msgspec.Struct, frozen=True):
    storage_id: str
    run_id: str
    display_name: str
    entity: str
    project: str
    history_line_count: int
    """Live history lines: the W&B offset of the next one."""
    inserted: bool


def read_upserted(data: Mapping[str, Any]) -> UpsertedRun:
    bucket = _dig(data, "upsertBucket", "bucket")
    if not bucket:
        raise ValueError("the answer to UpsertBucket has no bucket")
    return UpsertedRun(
        storage_id=bucket["id"],
        run_id=bucket["name"],
        display_name=bucket.get("displayName") or bucket["name"],
        entity=_dig(bucket, "project", "entity", "name") or "",
        project=_dig(bucket, "project", "name") or "",
        history_line_count=bucket.get("historyLineCount") or 0,
        inserted=bool(_dig(data, "upsertBucket", "inserted")),
    )


_BEGIN = """
mutation BeginAttempt($input: BeginAttemptInput!) {
  beginAttempt(input: $input) { attempt accepted next lines historyLineCount }
}
"""


def begin_attempt(entity: str | None, project: str, run_id: str, request: BeginAttempt) -> Operation:
    """Only for a server with `attempts.FEATURE`. The run must exist (UpsertBucket first)."""
    return Operation(
        "BeginAttempt",
        _BEGIN,
        {
            "input": {
                "entityName": entity,
                "projectName": project,
                "runName": run_id,
                "attempt": request.attempt,
                "nonce": request.nonce,
                "writer": request.writer,
                "base": None if request.base is None else msgspec.to_builtins(request.base),
                "cause": request.cause,
                "baseRun": request.base_run,
                "atStep": request.at_step,
                "fresh": list(request.fresh),
                "started": request.started,
            }
        },
    )


def read_begun(data: Mapping[str, Any]) -> BegunAttempt:
    """`lines` falls back to the history count alone for a server that has no `lines`."""
    answer = _dig(data, "beginAttempt")
    if not answer:
        raise ValueError("the answer to BeginAttempt is empty")
    lines = answer.get("lines")
    if lines is None:
        lines = {HISTORY: answer.get("historyLineCount") or 0}
    return msgspec.convert(
        {"accepted": answer["accepted"], "attempt": answer["attempt"], "next": answer.get("next") or {}, "lines": lines},
        BegunAttempt,
    )


_POSITION = """
query RunPosition($project: String!, $entity: String, $name: String!, $step: Int64) {
  project(name: $project, entityName: $entity) { run(name: $name) { attempt position(step: $step) } }
}
"""


def run_position(entity: str | None, project: str, run_id: str, *, step: int | None = None) -> Operation:
    """Where a run stands, or stood after `step`. Only for a server with `attempts.FEATURE`."""
    return Operation("RunPosition", _POSITION, {"entity": entity, "project": project, "name": run_id, "step": step})


def read_position(data: Mapping[str, Any]) -> tuple[int, RunPosition] | None:
    """(the run's newest attempt, the position); None when there is no such run. The position's `run_id` is the run in which its
    watermark counts: below the branch point of a fork that is the source."""
    run = _dig(data, "project", "run")
    return None if not run else (run["attempt"], msgspec.convert(_with_non_finite(run["position"]), RunPosition))


_NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def _with_non_finite(value: Any) -> Any:
    """Strict JSON has no numbers that are not finite: they come as these strings."""
    if isinstance(value, dict):
        return {key: _with_non_finite(inner) for key, inner in value.items()}
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


FRESH = (CONSOLE, EVENTS)
"""Streams that a fork and a rewind begin anew (W&B's rule)."""

_REWIND = """
mutation RewindRun($runName: String!, $entity: String, $project: String, $metricName: String!, $metricValue: Float!) {
  rewindRun(input: {runName: $runName, entityName: $entity, projectName: $project, metricName: $metricName,
      metricValue: $metricValue}) {
    rewoundRun { id name displayName config historyLineCount project { id name entity { id name } } }
  }
}
"""


def rewind_run(entity: str | None, project: str, run_id: str, step: int) -> Operation:
    """W&B's own rewind, for a server without `attempts.FEATURE`. Not every one offers it."""
    where = {"runName": run_id, "entity": entity, "project": project}
    return Operation("RewindRun", _REWIND, {**where, "metricName": "_step", "metricValue": step})


_ALERT = """
mutation NotifyScriptableRunAlert($entityName: String!, $projectName: String!, $runName: String!, $title: String!,
    $text: String!, $severity: AlertSeverity = INFO, $waitDuration: Duration) {
  notifyScriptableRunAlert(input: {entityName: $entityName, projectName: $projectName, runName: $runName, title: $title,
      text: $text, severity: $severity, waitDuration: $waitDuration}) { success }
}
"""


def notify_alert(run: tuple[str, str, str], title: str, text: str, level: str, wait: float) -> Operation:
    """W&B's alert. `wait`: seconds in which the server says no other one with this title."""
    entity, project, run_id = run
    named = {"entityName": entity, "projectName": project, "runName": run_id}
    said = {"title": title, "text": text, "severity": level, "waitDuration": int(wait * 1000)}
    return Operation("NotifyScriptableRunAlert", _ALERT, named | said)


_RESUME = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    id name entity { id name }
    bucket(name: $name, missingOk: true) {
      id name displayName summaryMetrics config tags notes wandbConfig(keys: ["t"])
      logLineCount historyLineCount eventsLineCount historyTail eventsTail
    }
  }
}
"""


def run_resume_status(entity: str | None, project: str, run_id: str) -> Operation:
    return Operation("RunResumeStatus", _RESUME, {"project": project, "entity": entity, "name": run_id})


def read_run_names(data: Mapping[str, Any]) -> tuple[str, str]:
    """(entity, project) of an existing run, however it came to be; empty when there is none. Of `run_resume_status`."""
    model = _dig(data, "model")
    if not model or not model.get("bucket"):
        return "", ""
    return _dig(model, "entity", "name") or "", model.get("name") or ""


class ResumeStatus(msgspec.Struct, frozen=True):
    """An existing run, as W&B's rules of resuming see it."""

    storage_id: str
    display_name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    tags: list[str]
    notes: str
    lines: dict[str, int]
    """stream -> live lines: the offsets of the next ones."""
    history_tail: dict[str, Any]
    events_tail: dict[str, Any]


def read_resume_status(data: Mapping[str, Any]) -> ResumeStatus | None:
    """None: the run does not exist, or was only reserved: no client started it, so its config has no telemetry."""
    bucket = _dig(data, "model", "bucket")
    if not bucket or "t" not in _json_object(bucket.get("wandbConfig")):
        return None
    return ResumeStatus(
        storage_id=bucket["id"],
        display_name=bucket.get("displayName") or bucket["name"],
        config=_json_object(bucket.get("config")),
        summary=_json_object(bucket.get("summaryMetrics")),
        tags=list(bucket.get("tags") or ()),
        notes=bucket.get("notes") or "",
        lines={
            HISTORY: bucket.get("historyLineCount") or 0,
            EVENTS: bucket.get("eventsLineCount") or 0,
            CONSOLE: bucket.get("logLineCount") or 0,
        },
        history_tail=_tail(bucket.get("historyTail")),
        events_tail=_tail(bucket.get("eventsTail")),
    )


def _json_object(text: str | None) -> dict[str, Any]:
    value = jsonvalues.loads(text) if text else {}
    return value if isinstance(value, dict) else {}


def _tail(text: str | None) -> dict[str, Any]:
    """A tail is a JSON list of JSON strings, of which the last counts."""
    lines = jsonvalues.loads(text) if text else []
    return _json_object(lines[-1]) if lines else {}


_CREATE_FILES = """
mutation CreateRunFiles($entity: String!, $project: String!, $run: String!, $files: [String!]!) {
  createRunFiles(input: {entityName: $entity, projectName: $project, runName: $run, files: $files}) {
    runID uploadHeaders files { name uploadUrl }
  }
}
"""


def create_run_files(entity: str, project: str, run_id: str, names: Sequence[str]) -> Operation:
    """Asks for upload addresses; PUT each file there with the answer's headers and without our Authorization."""
    return Operation(
        "CreateRunFiles", _CREATE_FILES, {"entity": entity, "project": project, "run": run_id, "files": list(names)}
    )


class UploadSlots(msgspec.Struct, frozen=True):
    headers: dict[str, str]
    urls: dict[str, str]
    """name -> absolute URL; a name that is missing needs no upload."""


def read_upload_slots(data: Mapping[str, Any]) -> UploadSlots:
    answer = _dig(data, "createRunFiles") or {}
    pairs = (header.split(":", 1) for header in answer.get("uploadHeaders") or () if ":" in header)
    return UploadSlots(
        headers={key.strip(): value.strip() for key, value in pairs},
        urls={file["name"]: file["uploadUrl"] for file in answer.get("files") or () if file.get("uploadUrl")},
    )
