"""Who may do what: members of an entity write to its projects and see all of them; others read those that are public, without
what tells where and how the code ran. Until somebody adds a user there is one, the admin, who may do everything."""

from __future__ import annotations

from typing import Any

import msgspec

from wbdist.server.auth import User
from wbdist.server.store.interface import RunRow

_HIDDEN_FILES = ("wandb-metadata.json", "diff.patch", "requirements.txt", "code/")
_SHOWN_INTERNALS = frozenset({"t", "m"})
"""Of `_wandb` in a config: what a reader needs. The rest is the machine, the program and its arguments."""


def member(user: User, entity: str) -> bool:
    """Whether a user may write to an entity's projects, and see private ones."""
    return user.admin or entity == user.entity or entity in user.teams


def may_read(user: User, entity: str, project: str) -> bool:
    return member(user, entity) or f"{entity}/{project}" in user.public


def why_not_write(user: User, entity: str, project: str) -> tuple[int, str] | None:
    """None when a user may write there; else the HTTP status and what to tell him: no such entity, or no right."""
    if member(user, entity):
        return None
    own = ", ".join(sorted({user.entity, *user.teams}))
    if entity not in user.entities:
        return 404, f"entity {entity!r} does not exist on this server; you ({user.name}) may write to {own}"
    return (
        403,
        f"you ({user.name}) may not write to project {entity}/{project}: be made a member of {entity}, or write to {own}",
    )


def shown(user: User, run: RunRow) -> RunRow:
    """The run as this user may see it."""
    if member(user, run.entity):
        return run
    config: dict[str, Any] = dict(run.config)
    entry = config.pop("_wandb", None)
    internals = entry.get("value") if isinstance(entry, dict) else None
    if isinstance(internals, dict):
        config["_wandb"] = {"value": {key: value for key, value in internals.items() if key in _SHOWN_INTERNALS}}
    return msgspec.structs.replace(run, config=config, commit="", repo="", program="", host="")


def may_read_file(user: User, entity: str, name: str) -> bool:
    """Of a project that he may read."""
    return member(user, entity) or not name.startswith(_HIDDEN_FILES)
