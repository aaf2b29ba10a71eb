"""The manifest of an artifact: which files it has, as W&B's client writes it."""

from __future__ import annotations

from typing import Any

import msgspec

from wbdist.server.gql.call import Call, refuse
from wbdist.server.store.artifacts import Artifact

_MAX_BYTES = 256 * 2**20


class Entry(msgspec.Struct, frozen=True):
    digest: str
    """MD5 in base64; of a reference, whatever its store has."""
    size: int | None = None
    ref: str | None = None
    """Address of bytes that are not kept here."""


class Manifest(msgspec.Struct, frozen=True):
    contents: dict[str, Entry]
    version: Any = 1


def manifest_of(call: Call, artifact: Artifact) -> Manifest:
    """Refuses with 400 one that was not uploaded or is no manifest."""
    if not artifact.manifest:
        raise refuse(400, "the artifact's manifest was not uploaded")
    path = call.app.files.path(artifact.manifest)
    if path.stat().st_size > _MAX_BYTES:
        raise refuse(400, f"the manifest has more than {_MAX_BYTES} bytes")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(400, f"the artifact's manifest makes no sense: {error}") from None
