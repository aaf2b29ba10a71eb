"""The GraphQL type File: a run's file, or one of an artifact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from wbdist.server.gql.call import Resolver


class FileNode(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    size: int
    md5: str
    """Base64; "0" for a file that does not exist, which is how W&B's restore() finds out."""
    url: Callable[[str], str]
    """The address for a method, PUT or GET."""
    mimetype: str | None = None
    updated_at: float | None = None


def _url(node: FileNode, _info: Any, upload: bool | None = None) -> str:
    return node.url("PUT" if upload else "GET")


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "File": {
        "url": _url,
        "displayName": lambda node, _info: node.name,
        "directUrl": lambda node, _info: node.url("GET"),
        "sizeBytes": lambda node, _info: node.size,
        "updatedAt": lambda node, _info: node.updated_at,
        "digest": lambda node, _info: node.md5,
        "storagePath": lambda _node, _info: None,
    },
}
