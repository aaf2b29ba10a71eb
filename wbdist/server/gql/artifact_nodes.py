"""Fields of artifacts, of their collections and of versions in them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from wbdist.server import access, artifact_transfers
from wbdist.server.gql.call import Call, Info, Resolver, call_of, check_writing, refuse
from wbdist.server.gql.file_node import FileNode
from wbdist.server.gql.manifests import Entry, manifest_of
from wbdist.server.gql.session import ProjectRef, page, page_info
from wbdist.server.store.artifacts import COMMITTED, Artifact, Collection, Membership
from wbdist.server.store.interface import RunRow

_MAX_PAGE = 5000


class Member(msgspec.Struct, frozen=True):
    """A version of a collection. A type of its own, since GraphQL tells types apart by it."""

    it: Membership


class Kind(msgspec.Struct, frozen=True):
    """A type of artifacts within a project."""

    project: ProjectRef
    name: str


def encode_id(kind: str, pk: int) -> str:
    """W&B's client decodes ids as base64."""
    return base64.b64encode(f"{kind}:{pk}".encode()).decode()


def decode_id(kind: str, given: str) -> int | None:
    try:
        found, _, number = base64.b64decode(given, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return int(number) if found == kind and number.isdecimal() and len(number) < 18 else None


def artifact_or_404(call: Call, given: str) -> Artifact:
    """One that the caller may read."""
    pk = decode_id("Artifact", given)
    found = None if pk is None else call.app.store.artifacts.get(pk)
    if found is None or not _readable(call, found.collection_pk):
        raise refuse(404, f"no artifact has the id {given[:80]!r}")
    return found


def own_artifact_or_404(call: Call, given: str) -> Artifact:
    """One that the caller may change; refuses with 403 others."""
    found = artifact_or_404(call, given)
    collection = call.app.store.artifacts.collection(found.collection_pk)
    assert collection is not None
    check_writing(call, collection.entity, collection.project)
    return found


def _readable(call: Call, collection: int) -> bool:
    found = call.app.store.artifacts.collection(collection)
    return found is not None and access.may_read(call.user, found.entity, found.project)


def _connection(nodes: Sequence[Any], after: str | None, first: int | None) -> dict[str, Any]:
    start, stop = page(after, first, len(nodes), _MAX_PAGE)
    edges = [{"node": node, "cursor": str(start + index + 1)} for index, node in enumerate(nodes[start:stop])]
    return {"edges": edges, "pageInfo": page_info(stop, len(nodes)), "totalCount": len(nodes)}


# Artifacts --------------------------------------------------------------------------------------------


def _artifact(_source: Any, info: Info, id: str) -> Artifact | None:
    call, pk = call_of(info), decode_id("Artifact", id)
    found = None if pk is None else call.app.store.artifacts.get(pk)
    return found if found is not None and _readable(call, found.collection_pk) else None


def _mapping(_source: Any, info: Info, clientID: str) -> dict[str, str] | None:  # noqa: N803
    call = call_of(info)
    found = call.app.store.artifacts.by_client_id(clientID) if clientID else None
    return None if found is None or not _readable(call, found.collection_pk) else {"serverID": encode_id("Artifact", found.pk)}


def _sequence(artifact: Artifact, info: Info) -> Collection:
    found = call_of(info).app.store.artifacts.collection(artifact.collection_pk)
    assert found is not None
    return found


def _version_index(artifact: Artifact, info: Info) -> int | None:
    members = call_of(info).app.store.artifacts.memberships(artifact.pk)
    return next((member.version for member in members if member.collection_pk == artifact.collection_pk), None)


def _aliases_of(call: Call, artifact: int, collection: int) -> list[dict[str, Any]]:
    table = call.app.store.artifacts
    names = [alias for alias, pk in table.aliases(collection).items() if pk == artifact]
    found = table.collection(collection) if names else None
    return [
        {"id": encode_id(f"Alias:{collection}:{name}", artifact), "alias": name, "artifactCollection": found} for name in names
    ]


def _all_aliases(artifact: Artifact, info: Info) -> list[dict[str, Any]]:
    call = call_of(info)
    members = call.app.store.artifacts.memberships(artifact.pk)
    seen = [member.collection_pk for member in members if _readable(call, member.collection_pk)]
    return [alias for collection in seen for alias in _aliases_of(call, artifact.pk, collection)]


def _created_by(artifact: Artifact, info: Info) -> RunRow | None:
    call = call_of(info)
    found = call.app.store.get_run_by_pk(artifact.run_pk)
    return access.shown(call.user, found) if found is not None and _visible(call, found) else None


def _used_by(artifact: Artifact, info: Info) -> dict[str, Any]:
    call = call_of(info)
    store = call.app.store
    found = [run for pk in store.artifacts.users(artifact.pk) if (run := store.get_run_by_pk(pk)) is not None]
    return _connection([access.shown(call.user, run) for run in found if _visible(call, run)], None, _MAX_PAGE)


def _visible(call: Call, run: RunRow) -> bool:
    return access.may_read(call.user, run.entity, run.project)


def _upload_address(artifact: Artifact, info: Info) -> str:
    call = call_of(info)
    return artifact_transfers.upload_url(call.app, call.base_url, artifact.pk, artifact_transfers.MANIFEST)


def _manifest_address(artifact: Artifact, info: Info) -> str | None:
    call = call_of(info)
    if not artifact.manifest:
        return None
    return artifact_transfers.download_url(call.app, call.base_url, artifact.manifest, "wandb_manifest.json")


# Files ------------------------------------------------------------------------------------------------


def _files(call: Call, artifact: Artifact, names: Sequence[str | None] | None) -> list[FileNode]:
    """By name; without references, whose bytes are not here."""
    contents = manifest_of(call, artifact).contents
    wanted = sorted(contents) if names is None else [name for name in names if name is not None and name in contents]
    here = {name: entry for name in wanted if (entry := contents[name]).ref is None}
    collection = call.app.store.artifacts.collection(artifact.collection_pk)
    assert collection is not None
    known = call.app.store.artifacts.known_contents(collection.entity, [entry.digest for entry in here.values()])
    return [_file(call, artifact, name, entry, known[entry.digest][0]) for name, entry in here.items() if entry.digest in known]


def _file(call: Call, artifact: Artifact, name: str, entry: Entry, sha256: str) -> FileNode:
    return FileNode(
        id=encode_id(f"ArtifactFile:{name}", artifact.pk),
        name=name,
        size=entry.size or 0,
        md5=entry.digest,
        url=lambda _method: artifact_transfers.download_url(call.app, call.base_url, sha256, name),
        updated_at=artifact.updated_at,
    )


def _member_files(
    member: Member, info: Info, names: list[str | None] | None = None, after: str | None = None, first: int | None = 50
) -> dict[str, Any]:
    call = call_of(info)
    artifact = artifact_or_404(call, encode_id("Artifact", member.it.artifact_pk))
    return _connection(_files(call, artifact, names), after, first)


def _files_by_entries(
    artifact: Artifact, info: Info, entries: list[dict[str, Any]] | None = None, **_how: Any
) -> dict[str, Any]:
    names = None if entries is None else [entry["name"] for entry in entries]
    return _connection(_files(call_of(info), artifact, names), None, _MAX_PAGE)


# Collections ------------------------------------------------------------------------------------------


def _collection_by_id(_source: Any, info: Info, id: str) -> Collection | None:
    call, pk = call_of(info), decode_id("ArtifactCollection", id)
    return call.app.store.artifacts.collection(pk) if pk is not None and _readable(call, pk) else None


def _collection(source: ProjectRef | Kind, info: Info, name: str) -> Collection | None:
    project = source.project if isinstance(source, Kind) else source
    found = call_of(info).app.store.artifacts.find(project.entity, project.name, name)
    return None if found is None or (isinstance(source, Kind) and found.type != source.name) else found


def _collections(
    source: ProjectRef | Kind, info: Info, after: str | None = None, first: int | None = 50, **_unused: Any
) -> dict[str, Any]:
    project, kind = (source.project, source.name) if isinstance(source, Kind) else (source, None)
    return _connection(call_of(info).app.store.artifacts.collections(project.entity, project.name, kind), after, first)


def _type(project: ProjectRef, info: Info, name: str) -> Kind | None:
    found = call_of(info).app.store.artifacts.collections(project.entity, project.name, name)
    return Kind(project, name) if found else None


def _types(project: ProjectRef, info: Info, after: str | None = None, first: int | None = 50) -> dict[str, Any]:
    found = call_of(info).app.store.artifacts.collections(project.entity, project.name)
    kinds = [Kind(project, name) for name in sorted({collection.type for collection in found})]
    return _connection(kinds, after, first)


def _type_created(kind: Kind, info: Info) -> float:
    found = call_of(info).app.store.artifacts.collections(kind.project.entity, kind.project.name, kind.name)
    return min((collection.created_at for collection in found), default=0.0)


def _versions(
    collection: Collection, info: Info, after: str | None = None, first: int | None = 50, **_unused: Any
) -> dict[str, Any]:
    """Newest first."""
    table = call_of(info).app.store.artifacts
    members = table.members(collection.pk)
    out = _connection(members, after, first)
    for edge in out["edges"]:
        member: Membership = edge["node"]
        edge |= {"node": table.get(member.artifact_pk), "version": f"v{member.version}"}
    return out


def _membership(collection: Collection, info: Info, aliasName: str) -> Member | None:  # noqa: N803
    """By alias or by version, like v3."""
    table = call_of(info).app.store.artifacts
    members = table.members(collection.pk)
    if aliasName[:1] == "v" and aliasName[1:].isdecimal():
        return next((Member(member) for member in members if f"v{member.version}" == aliasName), None)
    pk = table.aliases(collection.pk).get(aliasName)
    return next((Member(member) for member in members if member.artifact_pk == pk), None)


def _by_name(project: ProjectRef, info: Info, name: str) -> Member | None:
    """`name`, `name:alias` or `name:v3`; without either it is `latest`. A digest names a version, too."""
    base, _, alias = name.partition(":")
    found = _collection(project, info, base)
    if found is None:
        return None
    member = _membership(found, info, alias or "latest")
    if member is None and alias:
        table = call_of(info).app.store.artifacts
        same = [Member(one) for one in table.members(found.pk) if (it := table.get(one.artifact_pk)) and it.digest == alias]
        member = same[0] if same else None
    return member


def _artifact_by_name(project: ProjectRef, info: Info, name: str) -> Artifact | None:
    member = _by_name(project, info, name)
    return None if member is None else call_of(info).app.store.artifacts.get(member.it.artifact_pk)


def _latest(collection: Collection, info: Info) -> Artifact | None:
    member = _membership(collection, info, "latest")
    return None if member is None else call_of(info).app.store.artifacts.get(member.it.artifact_pk)


def _alias_list(collection: Collection, info: Info, after: str | None = None, first: int | None = 1000) -> dict[str, Any]:
    named = call_of(info).app.store.artifacts.aliases(collection.pk)
    nodes = [
        {"id": encode_id(f"Alias:{collection.pk}:{name}", pk), "alias": name, "artifactCollection": collection}
        for name, pk in named.items()
    ]
    return _connection(nodes, after, first)


def _of_run(kind: str) -> Resolver:
    def resolve(run: RunRow, info: Info, after: str | None = None, first: int | None = 50) -> dict[str, Any]:
        call = call_of(info)
        found = call.app.store.artifacts.of_run(run, kind)
        out = _connection([one for one in found if _readable(call, one.collection_pk)], after, first)
        for edge in out["edges"]:
            edge["version"] = f"v{_version_index(edge['node'], info)}"
        return out

    return resolve


_COLLECTION: dict[str, Resolver] = {
    "id": lambda collection, _info: encode_id("ArtifactCollection", collection.pk),
    "description": lambda _collection, _info: None,
    "createdAt": lambda collection, _info: collection.created_at,
    "updatedAt": lambda _collection, _info: None,
    "project": lambda collection, _info: ProjectRef(collection.entity, collection.project),
    "defaultArtifactType": lambda c, _info: Kind(ProjectRef(c.entity, c.project), c.type),
    "tags": lambda _collection, _info: {"edges": []},
    "aliases": _alias_list,
    "artifacts": _versions,
    "artifactMembership": _membership,
}


def type_of_collection(value: Any, _info: Any, _kind: Any) -> str:
    """Which object type of the interface ArtifactCollection a value is."""
    return "ArtifactPortfolio" if value.portfolio else "ArtifactSequence"


def type_of_creator(_value: Any, _info: Any, _kind: Any) -> str:
    return "Run"


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Query": {"artifact": _artifact, "artifactCollection": _collection_by_id, "clientIDMapping": _mapping},
    "Project": {
        "artifact": _artifact_by_name,
        "artifactType": _type,
        "artifactTypes": _types,
        "artifactCollection": _collection,
        "artifactCollections": _collections,
        "artifactCollectionMembership": _by_name,
    },
    "Run": {"inputArtifacts": _of_run("input"), "outputArtifacts": _of_run("output")},
    "ArtifactType": {
        "id": lambda kind, _info: encode_id(f"ArtifactType:{kind.project.entity}/{kind.project.name}/{kind.name}", 0),
        "description": lambda _kind, _info: None,
        "createdAt": _type_created,
        "artifactCollection": _collection,
        "artifactCollections": _collections,
    },
    "ArtifactSequence": {
        **_COLLECTION,
        "latestArtifact": _latest,
        "digestAlgorithm": lambda _collection, _info: "MANIFEST_MD5",
    },
    "ArtifactPortfolio": _COLLECTION,
    "ArtifactCollectionMembership": {
        "id": lambda member, _info: encode_id(f"Membership:{member.it.collection_pk}", member.it.artifact_pk),
        "versionIndex": lambda member, _info: member.it.version,
        "createdAt": lambda member, _info: member.it.created_at,
        "aliases": lambda member, info: _aliases_of(call_of(info), member.it.artifact_pk, member.it.collection_pk),
        "artifactCollection": lambda member, info: call_of(info).app.store.artifacts.collection(member.it.collection_pk),
        "artifact": lambda member, info: call_of(info).app.store.artifacts.get(member.it.artifact_pk),
        "files": _member_files,
    },
    "Artifact": {
        "id": lambda artifact, _info: encode_id("Artifact", artifact.pk),
        "artifactSequence": _sequence,
        "artifactType": lambda a, info: Kind(ProjectRef((c := _sequence(a, info)).entity, c.project), c.type),
        "versionIndex": _version_index,
        "description": lambda artifact, _info: artifact.description or None,
        "metadata": lambda artifact, _info: artifact.metadata or None,
        "ttlDurationSeconds": lambda _artifact, _info: -2,
        "ttlIsInherited": lambda _artifact, _info: True,
        "tags": lambda a, _info: [{"id": encode_id(f"Tag:{tag}", a.pk), "name": tag} for tag in json.loads(a.tags)],
        "historyStep": lambda artifact, _info: artifact.step if artifact.step >= 0 else None,
        "digestAlgorithm": lambda _artifact, _info: "MANIFEST_MD5",
        "commitHash": lambda _artifact, _info: None,
        "fileCount": lambda artifact, _info: artifact.file_count,
        "createdAt": lambda artifact, _info: artifact.created_at,
        "updatedAt": lambda artifact, _info: artifact.updated_at,
        "aliases": _all_aliases,
        "artifactMemberships": lambda a, info: {
            "edges": [
                {"node": Member(member)}
                for member in call_of(info).app.store.artifacts.memberships(a.pk)
                if _readable(call_of(info), member.collection_pk)
            ]
        },
        "createdBy": _created_by,
        "usedBy": _used_by,
        "currentManifest": lambda artifact, _info: artifact if artifact.state == COMMITTED else None,
        "filesByManifestEntries": _files_by_entries,
    },
    "ArtifactManifest": {
        "id": lambda artifact, _info: encode_id("ArtifactManifest", artifact.pk),
        "file": lambda artifact, _info: artifact,
    },
    "ArtifactManifestFile": {
        "id": lambda artifact, _info: encode_id("ArtifactManifestFile", artifact.pk),
        "directUrl": _manifest_address,
        "uploadUrl": _upload_address,
        "uploadHeaders": lambda _artifact, _info: [],
    },
}
