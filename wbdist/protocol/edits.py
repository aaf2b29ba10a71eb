"""The GraphQL operations of our read API that are not readings of one run: changes through it, and lists of projects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from wbdist.protocol import jsonvalues
from wbdist.protocol.operations import Operation

# W&B's documents. Our server knows an edit by what it lacks: neither a host nor a program is said, so no process opens the run.
_UPDATE = """
mutation UpsertBucket($id: String!, $display_name: String, $notes: String, $tags: [String!], $config: JSONString!,
    $groupName: String, $jobType: String) {
  upsertBucket(input: {id: $id, displayName: $display_name, notes: $notes, tags: $tags, config: $config,
      groupName: $groupName, jobType: $jobType}) { bucket { id } }
}
"""

_SUMMARY = """
mutation UpsertBucketSummary($id: String!, $summaryMetrics: JSONString) {
  upsertBucket(input: {id: $id, summaryMetrics: $summaryMetrics}) { bucket { id } }
}
"""

_CREATE = """
mutation UpsertBucket($project: String, $entity: String, $name: String!, $state: String) {
  upsertBucket(input: {modelName: $project, entityName: $entity, name: $name, state: $state}) {
    bucket { id name project { name entity { name } } } inserted
  }
}
"""

_DELETE = "mutation DeleteRun($id: ID!) { deleteRun(input: {id: $id}) { clientMutationId } }"
_STOP = "mutation StopRun($id: ID!) { stopRun(input: {id: $id}) { success } }"
_STATE = "mutation UpdateRunState($input: UpdateRunStateInput!) { updateRunState(input: $input) { success } }"
_LINEAGE = """
query RunLineage($project: String!, $entity: String!, $name: String!) {
  project(name: $project, entityName: $entity) { run(name: $name) { lineage } }
}
"""

_PROJECTS = """
query GetProjects($entity: String, $cursor: String, $perPage: Int = 50) {
  models(entityName: $entity, after: $cursor, first: $perPage) {
    pageInfo { endCursor hasNextPage }
    edges { node { id name entityName createdAt } }
  }
}
"""


def update_run(
    storage_id: str,
    *,
    config: Mapping[str, Any],
    display_name: str,
    notes: str,
    tags: Sequence[str],
    group: str,
    job_type: str,
) -> Operation:
    """`config` is in W&B's form {key: {"value": v}} and replaces the whole of it."""
    variables = {
        "id": storage_id,
        "display_name": display_name,
        "notes": notes,
        "tags": list(tags),
        "config": jsonvalues.dumps(config),
        "groupName": group,
        "jobType": job_type,
    }
    return Operation("UpsertBucket", _UPDATE, variables)


def update_summary(storage_id: str, summary: Mapping[str, Any]) -> Operation:
    """Replaces the whole of it."""
    return Operation("UpsertBucketSummary", _SUMMARY, {"id": storage_id, "summaryMetrics": jsonvalues.dumps(summary)})


def create_run(entity: str, project: str, run_id: str, state: str) -> Operation:
    return Operation("UpsertBucket", _CREATE, {"entity": entity, "project": project, "name": run_id, "state": state})


def delete_run(storage_id: str) -> Operation:
    return Operation("DeleteRun", _DELETE, {"id": storage_id})


def stop_run(storage_id: str) -> Operation:
    return Operation("StopRun", _STOP, {"id": storage_id})


def update_state(storage_id: str, state: str) -> Operation:
    return Operation("UpdateRunState", _STATE, {"input": {"id": storage_id, "state": state}})


class Ancestor(msgspec.Struct, frozen=True):
    """What a run's history was built on."""

    run: str
    attempt: int
    step: int
    """Rows up to this step are shown, inclusive."""
    kind: str
    """fork, rewind or resume."""

    @property
    def id(self) -> str:
        """The immutable id: `Api().run` reads it, `fork_from` takes it."""
        return f"{self.run}:{self.attempt}"


def lineage(entity: str, project: str, run_id: str) -> Operation:
    """Only for a server with `attempts.FEATURE`."""
    return Operation("RunLineage", _LINEAGE, {"entity": entity, "project": project, "name": run_id})


def read_lineage(data: Mapping[str, Any]) -> list[Ancestor]:
    """Newest first."""
    run = (data.get("project") or {}).get("run") or {}
    return msgspec.convert(run.get("lineage") or [], list[Ancestor])


class RemoteProject(msgspec.Struct, frozen=True, rename="camel"):
    """One project as the server tells it."""

    id: str
    name: str
    entity_name: str
    created_at: str
    """ISO 8601, UTC."""


def projects(entity: str, *, cursor: str | None = None, per_page: int = 50) -> Operation:
    return Operation("GetProjects", _PROJECTS, {"entity": entity, "cursor": cursor, "perPage": per_page})


def read_projects(data: Mapping[str, Any]) -> tuple[list[RemoteProject], str | None]:
    """(projects, cursor of the next page or None)."""
    found = data.get("models") or {"edges": [], "pageInfo": {}}
    info = found["pageInfo"]
    nodes = msgspec.convert([edge["node"] for edge in found["edges"]], list[RemoteProject])
    return nodes, (info.get("endCursor") if info.get("hasNextPage") else None)
