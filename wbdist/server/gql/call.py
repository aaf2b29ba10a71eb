"""What a resolver knows about the call it serves."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from graphql import GraphQLResolveInfo
from starlette.exceptions import HTTPException

from wbdist.errors import UsageError
from wbdist.protocol import names as naming
from wbdist.server import access
from wbdist.server.auth import User
from wbdist.server.context import AppContext
from wbdist.server.store.interface import DeletedRunError, RunRow, UnknownRunError

Info: TypeAlias = GraphQLResolveInfo
Resolver: TypeAlias = Any
"""A function (source, info, **arguments); graphql-core types it no closer."""


@dataclass(frozen=True, slots=True)
class Call:
    """The context value of one GraphQL request. Resolvers run in a worker thread, so they may block on the store."""

    app: AppContext
    user: User
    base_url: str
    """The address that this client uses, without a trailing slash: what we hand out must be absolute for it."""
    shared: bool = False
    """W&B's client in its shared mode: one of several processes that write to one run."""


def call_of(info: Info) -> Call:
    call = info.context
    assert isinstance(call, Call)
    return call


def refuse(status: int, message: str) -> HTTPException:
    """Raise it: the answer gets this HTTP status and message."""
    return HTTPException(status, message)


@contextmanager
def refusals() -> Iterator[None]:
    """What the store finds senseless becomes a refusal that says so."""
    try:
        yield
    except UnknownRunError as error:
        raise refuse(404, str(error)) from None
    except DeletedRunError as error:
        raise refuse(410, str(error)) from None
    except UsageError as error:
        raise refuse(400, str(error)) from None


def names(call: Call, entity: str | None, project: str, run_id: str) -> tuple[str, str, str]:
    """The three names of a run that the caller may write to, checked; no entity means his own."""
    entity = entity or call.user.entity
    try:
        check_names(entity, project, run_id)
    except UsageError as error:
        raise refuse(400, str(error)) from None
    check_writing(call, entity, project)
    return entity, project, run_id


def check_writing(call: Call, entity: str, project: str) -> None:
    """Refuses with 404 an entity that there is not, with 403 one that is not the caller's."""
    if (refused := access.why_not_write(call.user, entity, project)) is not None:
        raise refuse(*refused)


def check_names(entity: str, project: str, run_id: str) -> None:
    """Raises UsageError for a name that can be none. Run ids are taken as they come, as long as a URL can carry them."""
    naming.entity(entity)
    naming.project(project)
    if not run_id or len(run_id) > 128 or any(char in "/\\#?%:" for char in run_id):
        raise UsageError(f"{run_id[:130]!r} is not a run id: 1 to 128 characters, none of / \\ # ? % :")
    for name in (entity, project, run_id):
        if not name.isprintable() or name.strip(".") == "":
            raise UsageError(f"{name[:130]!r} cannot be a name: empty, dots only, or with unprintable characters")


def storage_id(run: RunRow) -> str:
    """W&B's form of a run's storage id: made of its names, so that it needs no table."""
    return base64.b64encode(f"Run:v1:{run.run_id}:{run.project}:{run.entity}".encode()).decode()


def run_of_storage_id(call: Call, given: str) -> RunRow:
    """The run that `storage_id` names, to write to; refuses with 404 what names none."""
    try:
        kind, version, rest = base64.b64decode(given, validate=True).decode().split(":", 2)
        run_id, project, entity = rest.rsplit(":", 2)
    except (binascii.Error, ValueError):
        kind = version = run_id = project = entity = ""
    run = call.app.store.get_run(entity, project, run_id) if (kind, version) == ("Run", "v1") else None
    if run is None:
        raise refuse(404, f"no run has the storage id {given[:80]!r}")
    check_writing(call, run.entity, run.project)
    return run


def run_or_404(call: Call, entity: str | None, project: str, run_id: str) -> RunRow:
    entity, project, run_id = names(call, entity, project, run_id)
    run = call.app.store.get_run(entity, project, run_id)
    if run is None:
        raise refuse(404, f"run {entity}/{project}/{run_id} does not exist")
    return run
