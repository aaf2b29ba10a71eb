"""Who am I, what can this server do, which project is that."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec

from wbdist.errors import UsageError
from wbdist.protocol import attempts
from wbdist.protocol import names as naming
from wbdist.server import access, run_filters
from wbdist.server.auth import User
from wbdist.server.gql.call import Call, Info, Resolver, call_of, refuse
from wbdist.server.store.interface import RunRow

FEATURES = (attempts.FEATURE, "FILESTREAM_GZIP", "MARK_RUN_FILES_UPLOADED")
_ALL = 2**31
_MAX_PAGE = 1000


class ProjectRef(msgspec.Struct, frozen=True):
    """A project that has at least one run: it comes into being with its first."""

    entity: str
    name: str
    created_at: float | None = None
    """Unix seconds; None: not looked up."""


def entity_of(name: str) -> dict[str, Any]:
    return {"id": f"Entity:{name}", "name": name, "organization": None}


def user_of(user: User) -> dict[str, Any]:
    return {
        "id": f"User:{user.name}",
        "name": user.name,
        "username": user.name,
        "email": None,
        "entity": user.entity,
        "admin": user.admin,
        "flags": "{}",
        "deletedAt": None,
        "apiKeys": {"edges": []},
        "teams": {"edges": [{"node": entity_of(name)} for name in (user.entity, *sorted(user.teams))]},
    }


def _viewer(_source: Any, info: Info) -> dict[str, Any]:
    return user_of(call_of(info).user)


def _server_info(_source: Any, _info: Info) -> dict[str, Any]:
    return {
        "features": [{"name": name, "isEnabled": True} for name in FEATURES],
        # The clients that the contract tests run; W&B's `verify` compares itself with it.
        "cliVersionInfo": {"min_cli_version": "0.31.0", "max_cli_version": "0.31.0"},
    }


def _entity(_source: Any, info: Info, name: str | None = None) -> dict[str, Any]:
    return entity_of(name or call_of(info).user.entity)


def _project(_source: Any, info: Info, name: str | None = None, entityName: str | None = None) -> ProjectRef | None:  # noqa: N803
    """Null when neither a run nor an artifact is in it, or it is not for the caller to see."""
    call = call_of(info)
    project, entity = name or "uncategorized", entityName or call.user.entity
    try:
        naming.project(project)
        naming.entity(entity)
    except UsageError as error:
        raise refuse(400, str(error)) from None
    if not access.may_read(call.user, entity, project):
        call.app.refused.note(call.user.name, f"read {entity}/{project}", "not a project of his, nor a public one")
        return None
    store = call.app.store
    exists = store.list_runs(entity, project, limit=1) or store.artifacts.collections(entity, project)
    return ProjectRef(entity, project) if exists else None


def number_of(project: ProjectRef) -> str:
    """W&B's client reads `int(projectId)`; the store knows projects by name, so the number is made of it; a GraphQL Int."""
    return str(zlib.crc32(f"{project.entity}/{project.name}".encode()) & 0x7FFFFFFF)


def _run(project: ProjectRef, info: Info, name: str, **_options: Any) -> RunRow | None:
    call = call_of(info)
    found = call.app.store.find_run(project.entity, project.name, name)
    return None if found is None else access.shown(call.user, found)


def _selected(call: Call, project: ProjectRef, filters: str | None) -> list[RunRow]:
    try:
        passes = run_filters.compile_filter(filters)
    except ValueError as error:
        raise refuse(400, str(error)) from None
    runs = call.app.store.list_runs(project.entity, project.name, limit=_ALL)
    return [run for run in (access.shown(call.user, found) for found in runs) if passes(run)]


def _run_count(project: ProjectRef, info: Info, filters: str | None = None) -> int:
    return len(_selected(call_of(info), project, filters))


def _runs(
    project: ProjectRef,
    info: Info,
    *,
    filters: str | None = None,
    after: str | None = None,
    first: int | None = 50,
    order: str | None = None,
) -> dict[str, Any]:
    try:
        found = run_filters.ordered(_selected(call_of(info), project, filters), order)
    except ValueError as error:
        raise refuse(400, str(error)) from None
    start, stop = page(after, first, len(found), _MAX_PAGE)
    edges = [{"node": run, "cursor": str(start + index + 1)} for index, run in enumerate(found[start:stop])]
    return {"edges": edges, "pageInfo": page_info(stop, len(found))}


def page(after: str | None, first: int | None, total: int, most: int) -> tuple[int, int]:
    """[start, stop) of a page; a cursor is the number of items before it."""
    if first is not None and first < 0:
        raise refuse(400, f"first must be at least 0, not {first}")
    try:
        start = int(after) if after else 0
    except ValueError:
        raise refuse(400, f"after={after[:40]!r} is not a cursor of this server") from None  # type: ignore[index]
    start = min(max(0, start), total)
    return start, min(total, start + min(most, first if first is not None else 50))


def page_info(stop: int, total: int) -> dict[str, Any]:
    return {"endCursor": str(stop) if stop else None, "hasNextPage": stop < total}


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Query": {
        "viewer": _viewer,
        "serverInfo": _server_info,
        "entity": _entity,
        "project": _project,
        "model": _project,
    },
    "Project": {
        "id": lambda project, _info: f"Project:{number_of(project)}",
        "internalId": lambda project, _info: number_of(project),
        "entityName": lambda project, _info: project.entity,
        "entity": lambda project, _info: entity_of(project.entity),
        "readOnly": lambda project, info: not access.member(call_of(info).user, project.entity),
        "run": _run,
        "bucket": _run,
        "runCount": _run_count,
        "runs": _runs,
        "sweep": lambda _project, _info, sweepName: None,  # noqa: N803
    },
}
