"""How a run is named in the read API: by a path, in one of several forms."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

import msgspec

from wbdist.errors import UsageError

FORMS = (
    "a run's path is entity/project/id, project/id, id, entity/project:id or the address of its page; <run>:<attempt> in place "
    "of the id is the run as that attempt had it"
)
_IMMUTABLE = re.compile(r"[^:]+:[0-9]+")


class Place(msgspec.Struct, frozen=True):
    """Where a run may be."""

    entity: str
    """'' is the default one."""
    project: str
    run_id: str
    """Or an immutable id."""


def places(path: str, default_project: str) -> list[Place]:
    """What `path` may mean, the likeliest first. Raises UsageError when it means nothing, or has no project and none is set."""
    given = path
    if "://" in path:
        path = unquote(urlsplit(path).path)
    immutable = [part for part in path.split("/") if part]
    if len(immutable) >= 4 and immutable[2] == "runs":
        immutable = [*immutable[:2], immutable[3]]  # what comes behind in a URL is a tab of the run's page
    plain = [part for part in path.replace(":", "/").split("/") if part]
    if len(plain) >= 4 and plain[2] == "runs":
        plain = [*plain[:2], plain[3]]
    named = bool(immutable) and _IMMUTABLE.fullmatch(immutable[-1]) is not None
    forms = [immutable] if named and len(immutable) >= 3 else [immutable, plain] if named else [plain]
    found = [_place(parts, default_project) for parts in forms if 1 <= len(parts) <= 3 and (len(parts) > 1 or default_project)]
    if not found:
        if any(len(parts) == 1 for parts in forms):
            raise UsageError(
                f"run path {given!r} has no project, and none is set (WANDB_PROJECT): write entity/project/id; {FORMS}"
            )
        raise UsageError(f"run path {given!r} is not understood: {FORMS}")
    return found


def _place(parts: list[str], default_project: str) -> Place:
    return Place(parts[0] if len(parts) == 3 else "", parts[-2] if len(parts) > 1 else default_project, parts[-1])
