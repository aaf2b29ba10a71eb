"""Files of a run: upload addresses, and the list with download addresses."""

from __future__ import annotations

import re
from typing import Any

from wbdist.core.position import CONSOLE
from wbdist.server import access
from wbdist.server.files import normal_name
from wbdist.server.gql.call import Call, Info, Resolver, call_of, check_writing, refuse, run_or_404, storage_id
from wbdist.server.gql.file_node import FileNode
from wbdist.server.gql.session import page, page_info
from wbdist.server.store.files import FileVersion
from wbdist.server.store.interface import RunRow
from wbdist.server.transfers import transfer_url

_MAX_FILES = 10_000


def _create_run_files(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, Any]:
    """One slot a name, names unchanged: the client finds its local file by it."""
    call = call_of(info)
    run = run_or_404(call, input.get("entityName"), input["projectName"], input["runName"])
    if len(input["files"]) > _MAX_FILES:
        raise refuse(400, f"at most {_MAX_FILES} files at a time")
    slots = [{"name": name, "uploadUrl": _url(call, run, _checked(name), "PUT")} for name in input["files"]]
    return {"runID": storage_id(run), "uploadHeaders": [], "files": slots}


def _checked(name: str) -> str:
    try:
        return normal_name(name)
    except ValueError as error:
        raise refuse(400, str(error)) from None


def _url(call: Call, run: RunRow, name: str, method: str) -> str:
    return transfer_url(call.app, call.base_url, run, name, method)


def _files(
    run: RunRow,
    info: Info,
    *,
    names: list[str | None] | None = None,
    after: str | None = None,
    first: int | None = 50,
    pattern: str | None = None,
) -> dict[str, Any]:
    call = call_of(info)
    wanted = [name for name in names or () if name is not None][:_MAX_FILES]
    if wanted:
        # A name that does not exist is still one node, with md5 "0": so W&B's restore() finds out.
        nodes = [_node(call, run, name, _file(call, run, _checked(name))) for name in wanted]
    else:
        like = _like(pattern) if pattern else None
        nodes = [_node(call, run, file.name, file) for file in _all(call, run) if not like or like.fullmatch(file.name)]
    nodes = [node for node in nodes if access.may_read_file(call.user, run.entity, node.name)]
    start, stop = page(after, first, len(nodes), 1000)
    edges = [{"node": node, "cursor": str(start + index + 1)} for index, node in enumerate(nodes[start:stop])]
    return {"edges": edges, "pageInfo": page_info(stop, len(nodes)), "totalCount": len(nodes)}


def _file(call: Call, run: RunRow, name: str) -> FileVersion | None:
    found = call.app.store.files.get(run, name)
    return call.app.console_files.of(call.app, run) if found is None and name == CONSOLE else found


def _all(call: Call, run: RunRow) -> list[FileVersion]:
    """By name."""
    console = call.app.console_files.of(call.app, run)
    found = [*call.app.store.files.live(run), *([] if console is None else [console])]
    return sorted(found, key=lambda version: version.name)


def _node(call: Call, run: RunRow, name: str, version: FileVersion | None) -> FileNode:
    from_lines = version is not None and not version.sha256
    printed = f"&lines={run.line_counts[CONSOLE]}" if from_lines else ""
    return FileNode(
        id=f"File:{run.pk}:{name}",
        name=name,
        size=version.size if version else 0,
        md5=version.md5 if version else "0",
        url=lambda method: _address(call, run, _checked(name), method) + printed,
        mimetype=version.mimetype if version else None,
        updated_at=version.updated_at if version else None,
    )


def _like(pattern: str) -> re.Pattern[str]:
    """SQL's LIKE: % any text, _ any character."""
    if len(pattern) > 256 or pattern.count("%") > 4:
        raise refuse(400, "pattern: at most 256 characters and four %")
    parts = {"%": ".*", "_": "."}
    return re.compile("".join(parts.get(char) or re.escape(char) for char in re.sub("%+", "%", pattern)), re.DOTALL)


def _address(call: Call, run: RunRow, name: str, method: str) -> str:
    if method == "PUT":
        check_writing(call, run.entity, run.project)
    return _url(call, run, name, method)


def _mark_uploaded(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, bool]:
    """Nothing to do: a PUT that was answered is stored. Says whether all of these are there."""
    call = call_of(info)
    run = run_or_404(call, input.get("entityName"), input["projectName"], input["runName"])
    names = {_checked(name) for name in input["files"][:_MAX_FILES]}
    return {"success": names <= {version.name for version in _all(call, run)}}


def _delete_files(_source: Any, info: Info, input: dict[str, Any]) -> dict[str, bool]:
    """A deletion is a version too: what an older attempt had, its incarnation still has."""
    call = call_of(info)
    found = [_named_by(call, given) for given in input["files"][:_MAX_FILES]]
    for run, name in found:
        gone = FileVersion(name=name, sha256="", md5="", size=0, mimetype="", updated_at=call.app.clock())
        call.app.store.files.add(run.pk, gone)
    return {"success": True}


def _named_by(call: Call, given: str) -> tuple[RunRow, str]:
    kind, _, rest = given.partition(":")
    number, _, name = rest.partition(":")
    known = kind == "File" and number.isdecimal() and len(number) < 18
    run = call.app.store.get_run_by_pk(int(number)) if known else None
    if run is None:
        raise refuse(404, f"no file has the id {given[:80]!r}")
    check_writing(call, run.entity, run.project)
    return run, _checked(name)


RESOLVERS: dict[str, dict[str, Resolver]] = {
    "Mutation": {
        "createRunFiles": _create_run_files,
        "markRunFilesUploaded": _mark_uploaded,
        "deleteFiles": _delete_files,
    },
    "Run": {
        "files": _files,
        "fileCount": lambda run, info: len(_all(call_of(info), run)),
    },
}
