"""Mutations of artifacts: log one, use one, name, link and delete it."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from wbdist.errors import UsageError
from wbdist.protocol.attempts import FileStamp
from wbdist.server import artifact_transfers
from wbdist.server.gql.artifact_nodes import Member, artifact_or_404, decode_id, encode_id, own_artifact_or_404
from wbdist.server.gql.call import Call, Info, Resolver, call_of, check_writing, refuse, run_or_404
from wbdist.server.gql.manifests import Manifest, manifest_of
from wbdist.server.store.artifact_lines import Wanted
from wbdist.server.store.artifacts import COMMITTED, LATEST, PENDING, Artifact, Draft

_MAX_FILES = 10_000
_MAX_NAME = 128


def _create(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    if not input.get("runName"):
        raise refuse(400, "runName: an artifact is logged by a run")
    run = run_or_404(call, input["entityName"], input["projectName"], input["runName"])
    collection = input.get("artifactCollectionName") or next(iter(input.get("artifactCollectionNames") or ()), "")
    if input.get("distributedID"):
        raise refuse(400, "distributedID: this server joins no artifact of several writers; log it from one")
    aliases = [entry["alias"] for entry in input.get("aliases") or ()]
    for what, name in (("type", input["artifactTypeName"]), ("name", collection), *(("alias", alias) for alias in aliases)):
        _check_name(what, name)
    _check_aliases(aliases)
    draft = Draft(
        collection=collection,
        type=input["artifactTypeName"],
        digest=input["digest"],
        client_id=input.get("clientID") or "",
        description=input.get("description") or "",
        metadata=_json(input.get("metadata")),
        tags=[tag["tagName"] for tag in input.get("tags") or ()],
        wanted=Wanted(tuple(aliases), _stamp(input.get("wbdist"))),
        once=bool(input.get("enableDigestDeduplication")),
    )
    try:
        return {"artifact": call.app.store.artifacts.create(run, draft, call.app.clock())}
    except UsageError as error:
        raise refuse(409 if "exists already" in str(error) else 400, str(error)) from None


def _check_name(what: str, name: str) -> None:
    if not name or len(name) > _MAX_NAME or "/" in name or ":" in name or not name.isprintable():
        raise refuse(400, f"{name[:_MAX_NAME]!r} is no {what} of an artifact: 1 to {_MAX_NAME} characters, neither / nor :")


def _check_aliases(aliases: list[str]) -> None:
    for alias in aliases:
        if alias[:1] == "v" and alias[1:].isdecimal():
            raise refuse(400, f"{alias!r} is no alias: it would look like a version")


def _json(text: str | None) -> str:
    if text is None:
        return ""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(400, f"metadata is not JSON: {error}") from None
    return text


def _stamp(value: Any) -> FileStamp | None:
    try:
        stamp = None if value is None else msgspec.convert(value, FileStamp)
    except msgspec.ValidationError as error:
        raise refuse(400, f"wbdist is not a stamp: {error}") from None
    if stamp is not None and not (0 <= stamp.attempt < 2**31 and 0 <= stamp.seq < 2**53 and stamp.nonce and stamp.writer):
        raise refuse(400, "wbdist is not a stamp: attempt and seq count from 0; nonce and writer must not be empty")
    return stamp


def _create_manifest(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    if input.get("type") not in {None, "FULL"}:
        raise refuse(400, f"manifests of type {input['type']} are not known here; send the whole manifest")
    return {"artifactManifest": own_artifact_or_404(call, input["artifactID"])}


def _update_manifest(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    pk = decode_id("ArtifactManifest", input["artifactManifestID"])
    return {"artifactManifest": own_artifact_or_404(call, encode_id("Artifact", pk or 0))}


def _create_files(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    """A slot a file, in the order given; those whose content is here already get no address."""
    call = call_of(info)
    wanted = input["artifactFiles"]
    if len(wanted) > _MAX_FILES:
        raise refuse(400, f"at most {_MAX_FILES} files at a time")
    table = call.app.store.artifacts
    found = {given: own_artifact_or_404(call, given) for given in {spec["artifactID"] for spec in wanted}}
    edges = []
    known: dict[int, dict[str, tuple[str, int]]] = {}
    for artifact in found.values():
        collection = table.collection(artifact.collection_pk)
        assert collection is not None
        md5s = [spec["md5"] for spec in wanted if found[spec["artifactID"]].pk == artifact.pk]
        known[artifact.pk] = table.known_contents(collection.entity, md5s)
    for spec in wanted:
        artifact = found[spec["artifactID"]]
        here = spec["md5"] in known[artifact.pk]
        url = None if here else artifact_transfers.upload_url(call.app, call.base_url, artifact.pk, spec["md5"])
        node = {"name": spec["name"], "uploadUrl": url, "uploadHeaders": [], "artifact": artifact}
        edges.append({"node": node})
    return {"files": {"edges": edges}}


def _commit(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    """Only when everything that the manifest names is here."""
    call = call_of(info)
    artifact = own_artifact_or_404(call, input["artifactID"])
    if artifact.state == PENDING:
        manifest = manifest_of(call, artifact)
        _check_complete(call, artifact, manifest)
        size = sum(entry.size or 0 for entry in manifest.contents.values())
        count = len(manifest.contents)
        artifact = call.app.store.artifacts.commit(artifact.pk, size=size, file_count=count, now=call.app.clock())
    return {"artifact": artifact}


def _check_complete(call: Call, artifact: Artifact, manifest: Manifest) -> None:
    collection = call.app.store.artifacts.collection(artifact.collection_pk)
    assert collection is not None
    here = {name: entry for name, entry in manifest.contents.items() if entry.ref is None}
    known = call.app.store.artifacts.known_contents(collection.entity, [entry.digest for entry in here.values()])
    missing = [name for name, entry in here.items() if entry.digest not in known]
    if missing:
        raise refuse(400, f"{len(missing)} files of the manifest were not uploaded, {missing[0]!r} among them")


def _use(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    run = run_or_404(call, input["entityName"], input["projectName"], input["runName"])
    artifact = artifact_or_404(call, input["artifactID"])
    if artifact.state != COMMITTED:
        raise refuse(409, "the artifact is not complete yet")
    call.app.store.artifacts.use(run.pk, artifact, Wanted((), _stamp(input.get("wbdist"))), call.app.clock())
    return {"artifact": artifact}


def _update(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    artifact = own_artifact_or_404(call, input["artifactID"])
    if input.get("ttlDurationSeconds") not in {None, -1, -2}:
        raise refuse(400, "ttlDurationSeconds: this server keeps artifacts until they are deleted")
    changes: dict[str, Any] = {}
    if input.get("description") is not None:
        changes["description"] = input["description"]
    if input.get("metadata") is not None:
        changes["metadata"] = _json(input["metadata"])
    if input.get("tagsToAdd") or input.get("tagsToDelete"):
        gone = {tag["tagName"] for tag in input.get("tagsToDelete") or ()}
        tags = [*json.loads(artifact.tags), *(tag["tagName"] for tag in input.get("tagsToAdd") or ())]
        changes["tags"] = json.dumps([tag for tag in dict.fromkeys(tags) if tag not in gone])
    if input.get("aliases") is not None:
        _replace_aliases(call, artifact, [entry["alias"] for entry in input["aliases"]])
    call.app.store.artifacts.update(artifact.pk, changes, call.app.clock())
    return {"artifact": own_artifact_or_404(call, input["artifactID"])}


def _replace_aliases(call: Call, artifact: Artifact, wanted: list[str]) -> None:
    table, now = call.app.store.artifacts, call.app.clock()
    _check_aliases(wanted)
    has = [alias for alias, pk in table.aliases(artifact.collection_pk).items() if pk == artifact.pk]
    table.set_aliases(artifact.pk, [(artifact.collection_pk, alias) for alias in wanted if alias not in has], now, add=True)
    gone = [(artifact.collection_pk, alias) for alias in has if alias not in wanted]
    table.set_aliases(artifact.pk, gone, now, add=False)


def _change_aliases(*, add: bool) -> Resolver:
    def resolve(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, bool]:
        call = call_of(info)
        artifact = artifact_or_404(call, input["artifactID"])
        table = call.app.store.artifacts
        members = {member.collection_pk for member in table.memberships(artifact.pk)}
        changes = []
        for entry in input["aliases"]:
            _check_name("alias", entry["alias"])
            collection = table.find(entry["entityName"], entry["projectName"], entry["artifactCollectionName"])
            if collection is None or collection.pk not in members:
                raise refuse(404, f"the artifact is no version of {entry['artifactCollectionName'][:_MAX_NAME]!r}")
            check_writing(call, collection.entity, collection.project)
            changes.append((collection.pk, entry["alias"]))
        if add:
            _check_aliases([alias for _, alias in changes])
        table.set_aliases(artifact.pk, changes, call.app.clock(), add=add)
        return {"success": True}

    return resolve


def _delete(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    artifact = own_artifact_or_404(call, input["artifactID"])
    table = call.app.store.artifacts
    named = [
        alias
        for member in table.memberships(artifact.pk)
        for alias, pk in table.aliases(member.collection_pk).items()
        if pk == artifact.pk and alias != LATEST
    ]
    if named and not input.get("deleteAliases"):
        raise refuse(409, f"the artifact has the aliases {', '.join(named[:10])}; delete it with its aliases, or them first")
    table.delete(artifact.pk, call.app.clock())
    return {"artifact": artifact}


def _link(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    call = call_of(info)
    table = call.app.store.artifacts
    if input.get("artifactID"):
        artifact = artifact_or_404(call, input["artifactID"])
    else:
        found = table.by_client_id(input.get("clientID") or "") if input.get("clientID") else None
        if found is None:
            raise refuse(404, "artifactID or clientID must name an artifact")
        artifact = artifact_or_404(call, encode_id("Artifact", found.pk))
    check_writing(call, input["entityName"], input["projectName"])
    aliases = [entry["alias"] for entry in input.get("aliases") or ()]
    for what, name in (("name", input["artifactPortfolioName"]), *(("alias", alias) for alias in aliases)):
        _check_name(what, name)
    target = (input["entityName"], input["projectName"], input["artifactPortfolioName"])
    try:
        member = table.link(artifact, target, aliases, call.app.clock())
    except UsageError as error:
        raise refuse(409, str(error)) from None
    return {"versionIndex": member.version, "artifactMembership": Member(member)}


def _unlink(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, bool]:
    call = call_of(info)
    artifact = artifact_or_404(call, input["artifactID"])
    collection = decode_id("ArtifactCollection", input["artifactPortfolioID"])
    if collection is None or collection == artifact.collection_pk:
        raise refuse(400, "artifactPortfolioID must name a collection into which the artifact was linked")
    if (into := call.app.store.artifacts.collection(collection)) is not None:
        check_writing(call, into.entity, into.project)
    call.app.store.artifacts.unlink(artifact.pk, collection)
    return {"success": True}


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Mutation": {
        "createArtifact": _create,
        "createArtifactManifest": _create_manifest,
        "updateArtifactManifest": _update_manifest,
        "createArtifactFiles": _create_files,
        "commitArtifact": _commit,
        "useArtifact": _use,
        "updateArtifact": _update,
        "deleteArtifact": _delete,
        "addAliases": _change_aliases(add=True),
        "deleteAliases": _change_aliases(add=False),
        "linkArtifact": _link,
        "unlinkArtifact": _unlink,
    },
}
