"""The projects of an entity."""

from __future__ import annotations

from typing import Any

from wbdist.errors import UsageError
from wbdist.protocol import names as naming
from wbdist.server import access
from wbdist.server.gql.call import Info, Resolver, call_of, refuse
from wbdist.server.gql.session import ProjectRef, page, page_info, user_of

_MAX_PAGE = 1000


def _models(
    _source: Any,
    info: Info,
    entityName: str | None = None,  # noqa: N803
    after: str | None = None,
    first: int | None = 50,
) -> dict[str, Any]:
    """In the order of their last sign of life, newest first."""
    call = call_of(info)
    entity = entityName or call.user.entity
    try:
        naming.entity(entity)
    except UsageError as error:
        raise refuse(400, str(error)) from None
    found = [
        row
        for row in call.app.store.list_projects()
        if row["entity"] == entity and access.may_read(call.user, entity, row["project"])
    ]
    start, stop = page(after, first, len(found), _MAX_PAGE)
    edges = [
        {"node": ProjectRef(entity, row["project"], row["created_at"]), "cursor": str(start + index + 1)}
        for index, row in enumerate(found[start:stop])
    ]
    return {"edges": edges, "pageInfo": page_info(stop, len(found))}


def _created_at(project: ProjectRef, info: Info) -> float:
    if project.created_at is not None:
        return project.created_at
    rows = call_of(info).app.store.list_projects()
    return next(float(row["created_at"]) for row in rows if (row["entity"], row["project"]) == (project.entity, project.name))


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Query": {"models": _models},
    "Project": {
        "createdAt": _created_at,
        "isBenchmark": lambda _project, _info: False,
        "user": lambda _project, info: user_of(call_of(info).user),
    },
}
