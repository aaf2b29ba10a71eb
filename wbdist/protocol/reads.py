"""The GraphQL operations that our read API sends, as values: runs, their history, console, attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from wbdist.core.attempts import ENDS, describe_begin, describe_end
from wbdist.protocol import jsonvalues
from wbdist.protocol.operations import Operation

_RUN_FIELDS = """
fragment RunFields on Run {
  id name displayName state group jobType sweepName tags notes commit createdAt heartbeatAt historyLineCount
  config summaryMetrics systemMetrics historyKeys user { username }
}
"""

_RUN = """
query Run($project: String!, $entity: String!, $name: String!) {
  project(name: $project, entityName: $entity) { run(name: $name) { ...RunFields } }
}
"""

_RUNS = """
query Runs($project: String!, $entity: String!, $cursor: String, $perPage: Int = 50, $order: String, $filters: JSONString) {
  project(name: $project, entityName: $entity) {
    runCount(filters: $filters)
    runs(filters: $filters, after: $cursor, first: $perPage, order: $order) {
      edges { node { ...RunFields } cursor }
      pageInfo { endCursor hasNextPage }
    }
  }
}
"""

_HISTORY_PAGE = """
query HistoryPage($entity: String!, $project: String!, $run: String!, $minStep: Int64!, $maxStep: Int64!, $pageSize: Int!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { history(minStep: $minStep, maxStep: $maxStep, samples: $pageSize) }
  }
}
"""

_ARCHIVE_PAGE = """
query AttemptHistoryPage($entity: String!, $project: String!, $run: String!, $minStep: Int64!, $maxStep: Int64!,
    $pageSize: Int!, $attempt: Int!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { history(minStep: $minStep, maxStep: $maxStep, samples: $pageSize, attempt: $attempt) }
  }
}
"""

_SAMPLED = """
query RunSampledHistory($project: String!, $entity: String!, $name: String!, $specs: [JSONString!]!) {
  project(name: $project, entityName: $entity) { run(name: $name) { sampledHistory(specs: $specs) } }
}
"""

_FULL = """
query RunFullHistory($project: String!, $entity: String!, $name: String!, $samples: Int) {
  project(name: $project, entityName: $entity) { run(name: $name) { rows: %s(samples: $samples) } }
}
"""

_CONSOLE = """
query RunConsoleLogPage($entity: String!, $project: String!, $runName: String!, $first: Int, $after: String,
    $last: Int) {
  project(name: $project, entityName: $entity) {
    run(name: $runName) {
      logLines(first: $first, after: $after, last: $last, useImprovedPagination: true) {
        edges { node { number timestamp level label line } }
        pageInfo { endCursor hasNextPage }
      }
    }
  }
}
"""

_ATTEMPTS = """
query RunAttempts($project: String!, $entity: String!, $name: String!) {
  project(name: $project, entityName: $entity) {
    run(name: $name) {
      attempts { attempt nonce baseAttempt baseStep startedAt endedAt cause endCause exitCode rows rowsLive lostSeconds phases }
    }
  }
}
"""


_ALERTS = """
query RunAlerts($project: String!, $entity: String!, $name: String!) {
  project(name: $project, entityName: $entity) { run(name: $name) { alerts { title text level time step } } }
}
"""


class RemoteRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run as the server tells it. Times are ISO 8601, UTC."""

    storage_id: str
    run_id: str
    display_name: str
    state: str
    group: str
    job_type: str
    sweep: str
    """Empty: no trial of one."""
    tags: list[str]
    notes: str
    commit: str
    created_at: str
    heartbeat_at: str
    history_line_count: int
    config: dict[str, Any]
    """{key: value} without W&B's own `_wandb`."""
    raw_config: dict[str, Any]
    """As stored: {key: {"value": v}}."""
    summary: dict[str, Any]
    system_metrics: dict[str, Any]
    last_step: int
    """-1: no history."""
    username: str


class Page(msgspec.Struct, frozen=True):
    runs: list[RemoteRun]
    cursor: str | None
    """Give it to the next `runs`; None: this was the last page."""
    total: int


class RemoteAttempt(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One attempt of a run; the fields mean what they mean in the store. Times are Unix seconds."""

    attempt: int
    nonce: str
    base_attempt: int | None
    base_step: int
    started_at: float
    ended_at: float | None
    cause: str
    end_cause: str
    exit_code: int | None
    rows: int
    rows_live: int
    lost_seconds: float = 0.0
    """Training in vain: what was done of it beyond the checkpoint that a later attempt went on from."""
    phases: dict[str, float] | None = None
    """Seconds by phase, from the end of the attempt before (of the first: from its submission) to its own end: queued, down,
    startup, restore, train, lost, save, stop. None for a run that no job has written."""

    @property
    def rows_archived(self) -> int:
        """Rows of it that are kept, and no part of the run's history."""
        return self.rows - self.rows_live

    @property
    def began(self) -> str:
        """Why it began, for people: 'first start', 'rank 1 was killed by SIGKILL', ..."""
        return describe_begin(self.cause)

    @property
    def ended(self) -> str:
        """How it ended, for people: 'preempted', 'killed without a word', ...; 'running'."""
        return ENDS.get(self.end, self.end) if self.ended_at is not None else "running"

    @property
    def end(self) -> str:
        """How it ended, in a word for people: 'finished', 'preempted', 'failed (70)', 'lost', ...; '' while it runs."""
        return describe_end(self.end_cause, self.exit_code)


def run(entity: str, project: str, run_id: str) -> Operation:
    return Operation("Run", _RUN + _RUN_FIELDS, {"entity": entity, "project": project, "name": run_id})


def read_run(data: Mapping[str, Any]) -> RemoteRun | None:
    """None: no such run or project."""
    node = _run_node(data)
    return None if node is None else _remote_run(node)


def runs(
    entity: str,
    project: str,
    *,
    filters: Mapping[str, Any] | None = None,
    order: str = "+created_at",
    cursor: str | None = None,
    per_page: int = 50,
) -> Operation:
    """`filters`: W&B's subset of MongoDB's language, e.g. {"group": "g1", "config.lr.value": {"$lt": 0.1}}."""
    variables = {
        "entity": entity,
        "project": project,
        "filters": jsonvalues.dumps(filters or {}),
        "order": order,
        "cursor": cursor,
        "perPage": per_page,
    }
    return Operation("Runs", _RUNS + _RUN_FIELDS, variables)


def read_runs(data: Mapping[str, Any]) -> Page | None:
    """None: no such project."""
    project = data.get("project")
    if not project:
        return None
    found = project["runs"]
    info = found["pageInfo"]
    return Page(
        runs=[_remote_run(edge["node"]) for edge in found["edges"]],
        cursor=info.get("endCursor") if info.get("hasNextPage") else None,
        total=project.get("runCount") or 0,
    )


def history_page(
    entity: str, project: str, run_id: str, min_step: int, max_step: int, *, rows: int, attempt: int | None = None
) -> Operation:
    """Every live row with min_step <= `_step` < max_step, if these are less than `rows` (at most a thousand) or there are no
    more steps than that; a W&B server may leave some out of others.

    `attempt` (only with `attempts.FEATURE`) reads the history as that attempt saw it, archived or not.
    """
    variables: dict[str, Any] = {
        "entity": entity,
        "project": project,
        "run": run_id,
        "minStep": min_step,
        "maxStep": max_step,
        "pageSize": max(1, rows),
    }
    if attempt is None:
        return Operation("HistoryPage", _HISTORY_PAGE, variables)
    return Operation("AttemptHistoryPage", _ARCHIVE_PAGE, variables | {"attempt": attempt})


def read_history_page(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows in order; non-finite floats as floats. Empty when there is no such run."""
    node = _run_node(data) or {}
    return [jsonvalues.loads_object(line, "a history row") for line in node.get("history") or ()]


def sampled_history(entity: str, project: str, run_id: str, keys: Sequence[str], samples: int) -> Operation:
    """At most `samples` rows, of those that have all `keys`, with these keys alone."""
    spec = jsonvalues.dumps({"keys": list(keys), "samples": samples})
    return Operation("RunSampledHistory", _SAMPLED, {"entity": entity, "project": project, "name": run_id, "specs": [spec]})


def read_sampled_history(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Non-finite floats arrive as the strings "NaN", "Infinity", "-Infinity": this field is plain JSON."""
    lists = (_run_node(data) or {}).get("sampledHistory") or [[]]
    return list(lists[0])


def full_history(entity: str, project: str, run_id: str, samples: int, *, events: bool = False) -> Operation:
    """At most `samples` whole rows; `events` reads system metrics instead."""
    query = _FULL % ("events" if events else "history")
    return Operation("RunFullHistory", query, {"entity": entity, "project": project, "name": run_id, "samples": samples})


def read_full_history(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    node = _run_node(data) or {}
    return [jsonvalues.loads_object(line, "a row") for line in node.get("rows") or ()]


class ConsoleLine(msgspec.Struct, frozen=True):
    """One printed line."""

    number: int
    timestamp: str | None
    """ISO 8601, UTC; None when it was not sent with one."""
    level: str
    """"error" for standard error, else ""."""
    label: str
    """The rank or other writer, where there are several."""
    content: str = msgspec.field(name="line")


def console_page(
    entity: str, project: str, run_id: str, *, first: int = 1000, after: str | None = None, last: int | None = None
) -> Operation:
    """`last`: the newest lines instead of the first ones."""
    variables = {"entity": entity, "project": project, "runName": run_id, "first": first, "after": after, "last": last}
    return Operation("RunConsoleLogPage", _CONSOLE, variables)


def read_console_lines(data: Mapping[str, Any]) -> tuple[list[ConsoleLine], str | None]:
    """(lines, cursor of the next page or None)."""
    found = (_run_node(data) or {}).get("logLines") or {"edges": [], "pageInfo": {}}
    info = found["pageInfo"]
    lines = msgspec.convert([edge["node"] for edge in found["edges"]], list[ConsoleLine])
    return lines, (info.get("endCursor") if info.get("hasNextPage") else None)


def attempts(entity: str, project: str, run_id: str) -> Operation:
    """Only for a server with `attempts.FEATURE`."""
    return Operation("RunAttempts", _ATTEMPTS, {"entity": entity, "project": project, "name": run_id})


def read_attempts(data: Mapping[str, Any]) -> list[RemoteAttempt]:
    """Oldest first."""
    return msgspec.convert((_run_node(data) or {}).get("attempts") or [], list[RemoteAttempt])


class RemoteAlert(msgspec.Struct, frozen=True):
    """What `run.alert` said."""

    title: str
    text: str
    level: str
    """INFO, WARN or ERROR."""
    time: float
    """Unix seconds."""
    step: int | None = None
    """Of the row that was open then; None from W&B's client, which does not tell."""


def alerts(entity: str, project: str, run_id: str) -> Operation:
    """Only for a server with `attempts.FEATURE`."""
    return Operation("RunAlerts", _ALERTS, {"entity": entity, "project": project, "name": run_id})


def read_alerts(data: Mapping[str, Any]) -> list[RemoteAlert]:
    """Oldest first."""
    return msgspec.convert((_run_node(data) or {}).get("alerts") or [], list[RemoteAlert])


def _run_node(data: Mapping[str, Any]) -> dict[str, Any] | None:
    project = data.get("project")
    node = project.get("run") if project else None
    return node if isinstance(node, dict) else None


def _remote_run(node: Mapping[str, Any]) -> RemoteRun:
    raw = _object(node.get("config"))
    return RemoteRun(
        storage_id=node["id"],
        run_id=node["name"],
        display_name=node.get("displayName") or node["name"],
        state=node.get("state") or "",
        group=node.get("group") or "",
        job_type=node.get("jobType") or "",
        sweep=node.get("sweepName") or "",
        tags=list(node.get("tags") or ()),
        notes=node.get("notes") or "",
        commit=node.get("commit") or "",
        created_at=node.get("createdAt") or "",
        heartbeat_at=node.get("heartbeatAt") or "",
        history_line_count=node.get("historyLineCount") or 0,
        config={key: _config_value(value) for key, value in raw.items() if key not in {"_wandb", "wandb_version"}},
        raw_config=raw,
        summary=_object(node.get("summaryMetrics")),
        system_metrics=_object(node.get("systemMetrics")),
        last_step=(node.get("historyKeys") or {}).get("lastStep", -1),
        username=(node.get("user") or {}).get("username") or "",
    )


def _config_value(item: Any) -> Any:
    return item["value"] if isinstance(item, dict) and "value" in item else item


def _object(text: str | None) -> dict[str, Any]:
    return jsonvalues.loads_object(text, "a run's field") if text else {}
