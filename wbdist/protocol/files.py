"""Files of runs on the wire: what a run has, and where to PUT and GET contents. `attempts.FileStamp` names a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from wbdist.protocol.operations import Operation, UploadSlots, create_run_files, read_upload_slots

__all__ = [
    "FilesPage",
    "RemoteFile",
    "UploadSlots",
    "create_run_files",
    "delete_files",
    "read_run_files",
    "read_upload_slots",
    "run_files",
]

_RUN_FILES = """
query RunFiles($project: String!, $entity: String!, $name: String!, $fileCursor: String, $fileLimit: Int = 50,
    $fileNames: [String] = [], $upload: Boolean = false, $pattern: String) {
  project(name: $project, entityName: $entity) {
    internalId
    run(name: $name) {
      fileCount
      files(names: $fileNames, after: $fileCursor, first: $fileLimit, pattern: $pattern) {
        edges { node { id name url(upload: $upload) directUrl sizeBytes mimetype updatedAt md5 } cursor }
        pageInfo { endCursor hasNextPage }
      }
    }
  }
}
"""


def run_files(
    entity: str,
    project: str,
    run_id: str,
    *,
    names: Sequence[str] = (),
    pattern: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Operation:
    """The files a run has. `names`: these alone, also those it has not. `pattern`: SQL's LIKE."""
    variables = {
        "entity": entity,
        "project": project,
        "name": run_id,
        "fileNames": list(names),
        "pattern": pattern,
        "fileCursor": cursor,
        "fileLimit": limit,
    }
    return Operation("RunFiles", _RUN_FILES, variables)


class RemoteFile(msgspec.Struct, frozen=True):
    """A file as the server tells it."""

    id: str
    name: str
    url: str
    direct_url: str
    size: int
    mimetype: str
    updated_at: str
    """ISO 8601, UTC."""
    md5: str
    """Base64; '0' for a file that was announced and never came, or that the run does not have."""

    @property
    def exists(self) -> bool:
        return self.md5 not in {"", "0"}


class FilesPage(msgspec.Struct, frozen=True):
    files: list[RemoteFile]
    total: int
    cursor: str | None
    """Of the next page; None on the last."""
    project_number: str
    """The project's internal id, which deleting asks for."""


def read_run_files(data: Mapping[str, Any]) -> FilesPage | None:
    """None: there is no such run."""
    project = data.get("project") or {}
    run = project.get("run")
    if not run:
        return None
    found = run.get("files") or {}
    nodes = [edge["node"] for edge in found.get("edges") or () if edge and edge.get("node")]
    info = found.get("pageInfo") or {}
    return FilesPage(
        files=[
            RemoteFile(
                id=node["id"],
                name=node["name"],
                url=node.get("url") or "",
                direct_url=node.get("directUrl") or "",
                size=int(node.get("sizeBytes") or 0),
                mimetype=node.get("mimetype") or "",
                updated_at=str(node.get("updatedAt") or ""),
                md5=node.get("md5") or "",
            )
            for node in nodes
        ],
        total=run.get("fileCount") or 0,
        cursor=(info.get("endCursor") or None) if info.get("hasNextPage") else None,
        project_number=str(project.get("internalId") or ""),
    )


_DELETE_FILES = """
mutation deleteFiles($files: [ID!]!, $projectId: Int) {
  deleteFiles(input: {files: $files, projectId: $projectId}) { success }
}
"""


def delete_files(ids: Sequence[str], project_number: int | None) -> Operation:
    return Operation("deleteFiles", _DELETE_FILES, {"files": list(ids), "projectId": project_number})
