"""Contents of artifacts: PUT of files and manifests, GET of a content, under addresses that authenticate themselves."""

from __future__ import annotations

import base64
import binascii
import hmac
import math
import mimetypes
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from wbdist.server import access, uploads
from wbdist.server.context import AppContext
from wbdist.server.store.artifacts import PENDING, Artifact
from wbdist.server.transfers import SAFE_HEADERS

MANIFEST = "manifest"


def upload_url(ctx: AppContext, base_url: str, artifact: int, md5: str) -> str:
    """The address for PUTting the content with this MD5 (base64), or the MANIFEST, of a pending artifact."""
    return f"{base_url}/artifacts/{artifact}/content?{_signed(ctx, 'artifact-put', str(artifact), md5)}"


def download_url(ctx: AppContext, base_url: str, sha256: str, name: str) -> str:
    """The address of a content, as a file of this name."""
    last = name.rpartition("/")[2]
    return f"{base_url}/artifacts/content/{sha256}/{quote(last, safe='')}?{_signed(ctx, 'artifact-get', sha256, last)}"


def _signed(ctx: AppContext, kind: str, subject: str, detail: str) -> str:
    until = str(math.ceil(ctx.clock() + ctx.settings.transfer_seconds))
    signature = ctx.auth.sign(kind, subject, detail, until)
    return f"of={quote(detail, safe='')}&until={until}&signature={signature}"


def _check(ctx: AppContext, request: Request, kind: str, subject: str) -> str:
    """What the address is signed for; refuses with 403."""
    query = request.query_params
    detail, until = query.get("of", ""), query.get("until", "")
    expected = ctx.auth.sign(kind, subject, detail, until)
    if not hmac.compare_digest(query.get("signature", "").encode(), expected.encode()) or int(until) <= ctx.clock():
        raise HTTPException(403, "this file address is not signed, or no longer good; ask for a new one")
    return detail


def routes(ctx: AppContext) -> list[BaseRoute]:
    """PUT /artifacts/{artifact}/content; GET and HEAD /artifacts/content/{sha256}/{name}, and W&B's own form of it with an API
    key, /artifactsV2/{region}/{entity}/{project}/{collection}/{birth artifact}/{MD5 in hex}/{name}."""

    async def put(request: Request) -> Response:
        pk = request.path_params["artifact"]
        md5 = _check(ctx, request, "artifact-put", str(pk))
        artifact = await run_in_threadpool(ctx.store.artifacts.get, pk)
        if artifact is None:
            raise HTTPException(404, "the artifact does not exist any more")
        content = await uploads.receive(ctx, request)
        if md5 == MANIFEST:
            if artifact.state == PENDING:
                await run_in_threadpool(ctx.store.artifacts.set_manifest, pk, content.sha256, ctx.clock())
            return Response(status_code=200)
        if content.md5 != md5:
            raise HTTPException(400, f"the file has MD5 {content.md5}, and {md5} was announced; it may have changed meanwhile")
        entity = await run_in_threadpool(_entity, ctx, artifact)
        await run_in_threadpool(ctx.store.artifacts.add_content, entity, md5, content.sha256, content.size)
        return Response(status_code=200)

    async def get(request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        return _answer(ctx, sha256, _check(ctx, request, "artifact-get", sha256))

    async def get_by_digest(request: Request) -> Response:
        user = ctx.auth.check_request(request)
        entity, project = request.path_params["entity"], request.path_params["project"]
        # By digest alone any file of the entity: that is for its members.
        if user is None or not access.member(user, entity):
            raise HTTPException(403, f"send the API key of a member of {entity}; {project} gives others signed addresses")
        _, _, rest = request.path_params["rest"].partition("/")
        digest, _, name = rest.partition("/")
        try:
            md5 = base64.b64encode(binascii.unhexlify(digest)).decode()
        except (binascii.Error, ValueError):
            raise HTTPException(404, f"{digest[:40]!r} is not an MD5") from None
        found = await run_in_threadpool(ctx.store.artifacts.known_contents, entity, [md5])
        if md5 not in found:
            raise HTTPException(404, f"no artifact of {entity} has this file")
        return _answer(ctx, found[md5][0], name.rpartition("/")[2] or digest)

    return [
        Route("/artifacts/{artifact:int}/content", put, methods=["PUT"]),
        Route("/artifacts/content/{sha256}/{name}", get, methods=["GET", "HEAD"]),
        Route("/artifactsV2/{region}/{entity}/{project}/{collection}/{rest:path}", get_by_digest, methods=["GET", "HEAD"]),
    ]


def _entity(ctx: AppContext, artifact: Artifact) -> str:
    collection = ctx.store.artifacts.collection(artifact.collection_pk)
    assert collection is not None
    return collection.entity


def _answer(ctx: AppContext, sha256: str, name: str) -> Response:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return FileResponse(ctx.files.path(sha256), headers=SAFE_HEADERS, media_type=kind, filename=name)
