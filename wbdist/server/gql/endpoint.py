"""POST /graphql."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from importlib import resources
from typing import Any, TypeGuard

import msgspec
import orjson
from graphql import (
    ExecutionResult,
    GraphQLError,
    GraphQLInterfaceType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    build_schema,
    execute,
)
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from wbdist.server import http
from wbdist.server.clients import is_shared
from wbdist.server.context import AppContext
from wbdist.server.gql import (
    alerts,
    artifact_nodes,
    artifacts,
    file_node,
    history,
    projects,
    run_changes,
    run_files,
    runs,
    scalars,
    session,
)
from wbdist.server.gql.call import Call
from wbdist.server.gql.documents import DocumentCache

_log = logging.getLogger(__name__)


class GraphQLRequest(msgspec.Struct, frozen=True, rename="camel"):
    """`operationName` is often empty, with the one operation named in the document."""

    query: str
    variables: dict[str, Any] | None = None
    operation_name: str | None = None


def make_schema() -> GraphQLSchema:
    """The schema of schema.graphql with its resolvers; a resolver for a field that the SDL lacks is a KeyError here."""
    schema = build_schema(resources.files("wbdist.server.gql").joinpath("schema.graphql").read_text())
    scalars.install(schema)
    for part in (session, projects, runs, run_changes, history, run_files, file_node, artifacts, artifact_nodes, alerts):
        for type_name, fields in part.RESOLVERS.items():
            kind = schema.type_map[type_name]
            assert isinstance(kind, GraphQLObjectType)
            for field_name, resolver in fields.items():
                kind.fields[field_name].resolve = resolver
    collection, creator = schema.type_map["ArtifactCollection"], schema.type_map["ArtifactCreator"]
    assert isinstance(collection, GraphQLInterfaceType)
    assert isinstance(creator, GraphQLUnionType)
    collection.resolve_type = artifact_nodes.type_of_collection
    creator.resolve_type = artifact_nodes.type_of_creator
    return schema


def routes(ctx: AppContext) -> list[BaseRoute]:
    """The endpoint; needs an API key or a browser session."""
    schema = make_schema()
    documents = DocumentCache(schema)

    def respond(body: bytes, call: Call) -> Response:
        try:
            request = msgspec.json.decode(body, type=GraphQLRequest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return http.refusal(400, f"not a GraphQL request: {error}")
        document = documents.get(request.query)
        if isinstance(document, list):
            # W&B's server quotes with ", and its client looks for `Cannot query field "x" on type "Y"` to fall back.
            return http.refusal(400, document[0].message.replace("'", '"'))
        result = execute(
            schema,
            document,
            context_value=call,
            variable_values=request.variables or {},
            operation_name=request.operation_name or None,
            is_awaitable=_never,
        )
        assert isinstance(result, ExecutionResult)
        if result.errors:
            return _refusal(result.errors[0])
        return Response(orjson.dumps({"data": result.data}), media_type="application/json")

    async def post(request: Request) -> Response:
        user = ctx.auth.check_request(request)
        if user is None:
            return http.refusal(401, "no valid API key: send it as the password of user `api`, or as a Bearer token")
        body = await http.read_body(request, ctx.settings.max_graphql_bytes)
        return await run_in_threadpool(respond, body, Call(ctx, user, str(request.base_url).rstrip("/"), is_shared(request)))

    return [Route("/graphql", post, methods=["POST"])]


def _never(_value: Any) -> TypeGuard[Awaitable[Any]]:
    """No resolver is a coroutine: they run in a worker thread and may block."""
    return False


def _refusal(error: GraphQLError) -> Response:
    """The first error as a whole answer; W&B's client reads no partial data."""
    cause = error.original_error
    while isinstance(cause, GraphQLError):
        cause = cause.original_error
    if cause is None:
        return http.refusal(400, error.message)
    if isinstance(cause, HTTPException):
        return http.refusal(cause.status_code, cause.detail)
    _log.error("GraphQL resolver %s failed", error.path, exc_info=cause)
    return http.refusal(500, "the server failed to answer; its log has the reason")
