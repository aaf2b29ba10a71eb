"""Which run ids, names and tags are allowed: for clients that make requests, and for servers that check them.

A run id names a run for ever inside its project: it is a directory name, a URL segment and a key on the wire. So at most
64 characters, and every character that is not a letter, digit, `_`, `-` or `.` becomes `-` (W&B's documented rule); the
same raw string always gives the same id, so that a job may name its run by any string it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from wbdist.errors import UsageError

MAX_ID = 64
MAX_PROJECT = 128
MAX_TAG = 64

_NOT_ALLOWED_IN_ID = re.compile(r"[^A-Za-z0-9_.\-]")
_NOT_ALLOWED_IN_PROJECT = re.compile(r"[/\\#?%:]")


def run_id(raw: str) -> str:
    """The id that `raw` stands for. Raises UsageError when it is empty, padded, or longer than 64 characters.

    Too long is refused, not cut: two ids that differ in their 65th character would silently become one run.
    """
    if not isinstance(raw, str):
        raise UsageError(f"a run id must be a string, not {type(raw).__name__}")
    if not raw.strip():
        raise UsageError("a run id must not be empty; leave `id` out to have one made")
    if raw != raw.strip():
        raise UsageError(f"run id {raw!r} begins or ends with white space; remove it")
    if len(raw) > MAX_ID:
        raise UsageError(f"run id {raw[:20]!r}... has {len(raw)} characters; at most {MAX_ID} are allowed")
    cleaned = _NOT_ALLOWED_IN_ID.sub("-", raw)
    if cleaned.strip(".") == "":
        raise UsageError(f"run id {raw!r} consists of dots only, which names a directory; use letters or digits")
    return cleaned


def project(raw: str) -> str:
    """`raw` when it may name a project, else UsageError."""
    if not raw.strip() or raw != raw.strip():
        raise UsageError(f"project {raw!r} must not be empty and must not begin or end with white space")
    if len(raw) > MAX_PROJECT:
        raise UsageError(f"project name has {len(raw)} characters; at most {MAX_PROJECT} are allowed")
    bad = sorted(set(_NOT_ALLOWED_IN_PROJECT.findall(raw)))
    if bad:
        raise UsageError(f"project {raw!r} contains {' '.join(bad)}; none of / \\ # ? % : is allowed")
    return raw


def entity(raw: str) -> str:
    """`raw` when it may name an entity (user or team), else UsageError. Empty means the server's default for the key."""
    if _NOT_ALLOWED_IN_PROJECT.search(raw) or raw != raw.strip():
        raise UsageError(f"entity {raw!r} is not a user or team name: no / \\ # ? % : and no white space around it")
    return raw


def tags(raw: str | Iterable[str]) -> tuple[str, ...]:
    """Tags without repetition, in order; a bare string is one tag. Raises UsageError for one without 1 to 64 characters."""
    given: tuple[object, ...] = (raw,) if isinstance(raw, str) else tuple(raw)
    for tag in given:
        if not isinstance(tag, str) or not 1 <= len(tag) <= MAX_TAG:
            raise UsageError(f"tag {tag!r} must be a string of 1 to {MAX_TAG} characters")
    return tuple(dict.fromkeys(map(str, given)))
