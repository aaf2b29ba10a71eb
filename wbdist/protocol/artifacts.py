"""Artifacts on the wire: the operations W&B's client sends to log and to use one, and the manifest that names its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from wbdist.protocol.attempts import FileStamp
from wbdist.protocol.operations import Operation

FILES_PAGE = 1000


class ManifestEntry(msgspec.Struct, omit_defaults=True, rename={"birth": "birthArtifactID"}):
    """One file of an artifact."""

    digest: str
    """MD5, base64; of a reference what tells its contents apart, as far as that is known."""
    size: int | None = None
    ref: str | None = None
    """Address of bytes that are kept elsewhere."""
    birth: str | None = None
    """Id of the artifact with which the file was uploaded."""
    extra: dict[str, Any] = {}


class Manifest(msgspec.Struct):
    """W&B's manifest, version 1."""

    contents: dict[str, ManifestEntry]
    version: int = 1
    storagePolicy: str = "wandb-storage-policy-v1"  # noqa: N815  (W&B's names)
    storagePolicyConfig: dict[str, Any] = msgspec.field(default_factory=lambda: {"storageLayout": "V2"})  # noqa: N815

    def digest(self) -> str:
        """W&B's digest of an artifact: of the names and digests of its files."""
        import hashlib  # with OpenSSL: a shipper without artifacts does without

        found = hashlib.md5(b"wandb-artifact-manifest-v1\n", usedforsecurity=False)
        for name in sorted(self.contents):
            found.update(f"{name}:{self.contents[name].digest}\n".encode())
        return found.hexdigest()


_CREATE = """
mutation CreateArtifact($input: CreateArtifactInput!) { createArtifact(input: $input) { artifact { id state } } }
"""


class Created(msgspec.Struct, frozen=True):
    id: str
    committed: bool
    """The very same artifact is there already."""


def create(
    run: tuple[str, str, str],
    *,
    type: str,
    name: str,
    digest: str,
    client_id: str,
    aliases: Sequence[str],
    description: str | None,
    metadata: str,
    stamp: FileStamp | None,
) -> Operation:
    """`run`: entity, project, id. `metadata`: JSON. Repeating it with the same client id means the same artifact."""
    entity, project, run_id = run
    fields: dict[str, Any] = {
        "entityName": entity,
        "projectName": project,
        "runName": run_id,
        "artifactTypeName": type,
        "artifactCollectionName": name,
        "digest": digest,
        "digestAlgorithm": "MANIFEST_MD5",
        "clientID": client_id,
        "sequenceClientID": client_id,
        "aliases": [{"artifactCollectionName": name, "alias": alias} for alias in aliases],
        "description": description,
        "metadata": metadata,
        "enableDigestDeduplication": True,
    }
    if stamp is not None:
        fields["wbdist"] = msgspec.to_builtins(stamp)
    return Operation("CreateArtifact", _CREATE, {"input": fields})


def read_created(data: Mapping[str, Any]) -> Created:
    found = data["createArtifact"]["artifact"]
    return Created(found["id"], found["state"] == "COMMITTED")


_MANIFEST = """
mutation CreateArtifactManifest($artifactID: ID!, $name: String!, $digest: String!, $entityName: String!,
    $projectName: String!, $runName: String!, $includeUpload: Boolean!) {
  createArtifactManifest(input: {artifactID: $artifactID, name: $name, digest: $digest, entityName: $entityName,
      projectName: $projectName, runName: $runName, type: FULL}) {
    artifactManifest { id file @include(if: $includeUpload) { id uploadUrl uploadHeaders } }
  }
}
"""


class ManifestSlot(msgspec.Struct, frozen=True):
    id: str
    url: str = ""
    headers: list[str] = []


def create_manifest(run: tuple[str, str, str], artifact: str, digest: str, *, upload: bool) -> Operation:
    """`upload`: with an address for the manifest's bytes, whose MD5 (base64) is `digest`."""
    entity, project, run_id = run
    variables = {
        "artifactID": artifact,
        "name": "wandb_manifest.json",
        "digest": digest,
        "entityName": entity,
        "projectName": project,
        "runName": run_id,
        "includeUpload": upload,
    }
    return Operation("CreateArtifactManifest", _MANIFEST, variables)


def read_manifest_slot(data: Mapping[str, Any]) -> ManifestSlot:
    found = data["createArtifactManifest"]["artifactManifest"]
    file = found.get("file") or {}
    return ManifestSlot(found["id"], file.get("uploadUrl") or "", file.get("uploadHeaders") or [])


_FILES = """
mutation CreateArtifactFiles($input: CreateArtifactFilesInput!) {
  createArtifactFiles(input: $input) {
    files { edges { node { name uploadUrl uploadHeaders artifact { id } } } }
  }
}
"""


class FileSlot(msgspec.Struct, frozen=True):
    name: str
    url: str
    """'' when the server has these bytes."""
    headers: dict[str, str]
    birth: str


def create_files(artifact: str, manifest: str, files: Mapping[str, str]) -> Operation:
    """`files`: name -> MD5 (base64)."""
    specs = [{"artifactID": artifact, "artifactManifestID": manifest, "name": name, "md5": md5} for name, md5 in files.items()]
    return Operation("CreateArtifactFiles", _FILES, {"input": {"artifactFiles": specs, "storageLayout": "V2"}})


def read_file_slots(data: Mapping[str, Any]) -> list[FileSlot]:
    """In the order in which they were asked for."""
    nodes = [edge["node"] for edge in data["createArtifactFiles"]["files"]["edges"]]
    return [
        FileSlot(node["name"], node.get("uploadUrl") or "", headers(node.get("uploadHeaders")), node["artifact"]["id"])
        for node in nodes
    ]


def headers(lines: Sequence[str] | None) -> dict[str, str]:
    """`Key: value` lines as a dict."""
    pairs = (line.split(":", 1) for line in lines or () if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def commit(artifact: str) -> Operation:
    document = """
mutation CommitArtifact($artifactID: ID!) { commitArtifact(input: {artifactID: $artifactID}) { artifact { id digest } } }
"""
    return Operation("CommitArtifact", document, {"artifactID": artifact})


_USE = "mutation UseArtifact($input: UseArtifactInput!) { useArtifact(input: $input) { artifact { id } } }"


def use(run: tuple[str, str, str], artifact: str) -> Operation:
    entity, project, run_id = run
    fields = {"entityName": entity, "projectName": project, "runName": run_id, "artifactID": artifact}
    return Operation("UseArtifact", _USE, {"input": fields})


_DELETE = "mutation DeleteArtifact($input: DeleteArtifactInput!) { deleteArtifact(input: $input) { artifact { id } } }"


def delete(artifact: str) -> Operation:
    """With the aliases that name it."""
    return Operation("DeleteArtifact", _DELETE, {"input": {"artifactID": artifact, "deleteAliases": True}})


_LINK = "mutation LinkArtifact($input: LinkArtifactInput!) { linkArtifact(input: $input) { versionIndex } }"


def link(artifact: str, target: tuple[str, str, str], aliases: Sequence[str]) -> Operation:
    """`target`: entity, project, portfolio."""
    entity, project, name = target
    fields = {
        "artifactID": artifact,
        "artifactPortfolioName": name,
        "entityName": entity,
        "projectName": project,
        "aliases": [{"artifactCollectionName": name, "alias": alias} for alias in aliases],
    }
    return Operation("LinkArtifact", _LINK, {"input": fields})


# Reading ----------------------------------------------------------------------------------------------

_FACTS = """
fragment Facts on Artifact {
id description metadata state size digest fileCount createdAt
artifactType { name }
artifactSequence { name project { name entity { name } } }
versionIndex
aliases { alias artifactCollection { name } }
currentManifest { file { directUrl } }
}
"""

_BY_NAME = """
query ArtifactMembershipByName($entity: String!, $project: String!, $name: String!) {
  project(name: $project, entityName: $entity) {
    artifactCollectionMembership(name: $name) { versionIndex artifactCollection { name } artifact { ...Facts } }
  }
}
"""
_BY_CLIENT = "query ClientIDMapping($clientID: ID!) { clientIDMapping(clientID: $clientID) { serverID } }"
_BY_ID = "query ArtifactByID($id: ID!) { artifact(id: $id) { ...Facts } }"
_ADDRESSES = """
query GetArtifactMembershipFileUrls($entity: String!, $project: String!, $name: String!, $cursor: String, $limit: Int) {
  project(name: $project, entityName: $entity) {
    artifactCollectionMembership(name: $name) {
      files(after: $cursor, first: $limit) { edges { node { name directUrl } } pageInfo { hasNextPage endCursor } }
    }
  }
}
"""


class RemoteArtifact(msgspec.Struct, frozen=True):
    """A version of a collection as the server tells it."""

    id: str
    entity: str
    project: str
    name: str
    """Of the collection."""
    version: int | None
    type: str
    state: str
    digest: str
    description: str
    metadata: dict[str, Any]
    aliases: list[str]
    size: int
    file_count: int
    created_at: str
    manifest_url: str


def by_name(entity: str, project: str, name: str) -> Operation:
    """`name`: `name:alias` or `name:v3`."""
    return Operation("ArtifactMembershipByName", _BY_NAME + _FACTS, {"entity": entity, "project": project, "name": name})


def read_by_name(data: Mapping[str, Any]) -> RemoteArtifact | None:
    project = data.get("project") or {}
    member = project.get("artifactCollectionMembership")
    if not member or not member.get("artifact"):
        return None
    collection = (member.get("artifactCollection") or {}).get("name")
    return _artifact(member["artifact"], collection, member.get("versionIndex"))


def by_client_id(client_id: str) -> Operation:
    """The server's id of what a client has made; see `read_client_id`."""
    return Operation("ClientIDMapping", _BY_CLIENT, {"clientID": client_id})


def read_client_id(data: Mapping[str, Any]) -> str | None:
    return (data.get("clientIDMapping") or {}).get("serverID")


def by_id(artifact: str) -> Operation:
    return Operation("ArtifactByID", _BY_ID + _FACTS, {"id": artifact})


def read_by_id(data: Mapping[str, Any]) -> RemoteArtifact | None:
    found = data.get("artifact")
    return _artifact(found, None, found.get("versionIndex")) if found else None


_OF_RUN = """
query RunArtifacts($entity: String!, $project: String!, $name: String!, $cursor: String, $perPage: Int) {
  project(name: $project, entityName: $entity) {
    run(name: $name) {
      artifacts: %s(after: $cursor, first: $perPage) {
        totalCount edges { node { ...Facts } } pageInfo { endCursor hasNextPage }
      }
    }
  }
}
"""


class ArtifactPage(msgspec.Struct, frozen=True):
    artifacts: list[RemoteArtifact]
    total: int
    cursor: str | None
    """Of the next page; None behind the last."""


def of_run(run: tuple[str, str, str], *, used: bool, cursor: str | None, per_page: int) -> Operation:
    """What a run logged, or used. `run`: entity, project, id."""
    entity, project, name = run
    variables = {"entity": entity, "project": project, "name": name, "cursor": cursor, "perPage": per_page}
    return Operation("RunArtifacts", _OF_RUN % ("inputArtifacts" if used else "outputArtifacts") + _FACTS, variables)


def read_of_run(data: Mapping[str, Any]) -> ArtifactPage:
    found = ((data.get("project") or {}).get("run") or {}).get("artifacts") or {}
    nodes = [edge["node"] for edge in found.get("edges") or ()]
    info = found.get("pageInfo") or {}
    more = info.get("endCursor") if info.get("hasNextPage") else None
    artifacts = [_artifact(node, None, node.get("versionIndex")) for node in nodes]
    return ArtifactPage(artifacts, int(found.get("totalCount") or len(nodes)), more)


def _artifact(found: Mapping[str, Any], collection: str | None, version: int | None) -> RemoteArtifact:
    sequence = found.get("artifactSequence") or {}
    project = sequence.get("project") or {}
    name = collection or sequence.get("name") or ""
    aliases = [
        entry["alias"]
        for entry in found.get("aliases") or ()
        if ((entry.get("artifactCollection") or {}).get("name") or name) == name
    ]
    manifest = ((found.get("currentManifest") or {}).get("file") or {}).get("directUrl") or ""
    return RemoteArtifact(
        id=found["id"],
        entity=(project.get("entity") or {}).get("name") or "",
        project=project.get("name") or "",
        name=name,
        version=version,
        type=(found.get("artifactType") or {}).get("name") or "",
        state=found.get("state") or "",
        digest=found.get("digest") or "",
        description=found.get("description") or "",
        metadata=msgspec.json.decode(found["metadata"]) if found.get("metadata") else {},
        aliases=aliases,
        size=int(found.get("size") or 0),
        file_count=int(found.get("fileCount") or 0),
        created_at=str(found.get("createdAt") or ""),
        manifest_url=manifest,
    )


def addresses(entity: str, project: str, name: str, cursor: str | None) -> Operation:
    """Where the files of `name:version` can be fetched, a page of them."""
    variables = {"entity": entity, "project": project, "name": name, "cursor": cursor, "limit": FILES_PAGE}
    return Operation("GetArtifactMembershipFileUrls", _ADDRESSES, variables)


def read_addresses(data: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """name -> address; the cursor of the next page, None on the last."""
    found = (((data.get("project") or {}).get("artifactCollectionMembership")) or {}).get("files") or {}
    nodes = [edge["node"] for edge in found.get("edges") or ()]
    info = found.get("pageInfo") or {}
    more = info.get("endCursor") if info.get("hasNextPage") else None
    return {node["name"]: node.get("directUrl") or "" for node in nodes}, more
