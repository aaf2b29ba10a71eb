"""Every endpoint under generated requests: no 5xx, no hang, and a refused request changes nothing of the store."""

# ruff: noqa: E501  (tables of values)

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLScalarType,
    GraphQLUnionType,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from wbdist.protocol.attempts import STAMP_HEADER
from wbdist.server.app import create_app
from wbdist.server.context import AppContext
from wbdist.server.gql.endpoint import make_schema

SCHEMA = make_schema()
STRANGE = [
    "",
    ".",
    "..",
    "../..",
    "\x00",
    "\ud800",
    "a" * 3000,
    "💥",
    "%2e%2e",
    "a/b",
    "a:b",
    "-1",
    "null",
    "\n",
    "v0",
    "r:1",
    "r:9",
]
NAMES = {
    "entity": ["local"], "project": ["p"], "model": ["p"], "run": ["r", "r:1", "sdk"], "name": ["r", "p", "art", "art:latest"],
    "collection": ["art"], "portfolio": ["art", "shelf"], "type": ["model", "dataset"], "alias": ["latest", "best"],
    "state": ["running", "pending", "crashed"], "files": ["a.txt", "b/c"], "nonce": ["n1", "n2"], "writer": ["w"], "order": ["-created_at", "+config.a.value"],
    "filters": ['{"$or": [{"state": "running"}]}', "{}", '{"config.a": {"$gt": 1}}', '{"$not": []}', '{"display_name": {"$regex": "("}}'],
    "cursor": ["0", "3"], "after": ["0", "99"], "digest": ["d1", "d2"], "md5": ["1B2M2Y8AsgTpgAmY7PhCfg=="], "host": ["h"],
}  # fmt: skip
JSON_TEXTS = ["{}", "[]", "1", "{", '{"a": NaN}', '{"_wandb": {"value": {"t": {}}}}', '{"a": {"value": 1e400}}', "[" * 5000]
LEAVES = (GraphQLScalarType, GraphQLEnumType)
SIZES = st.one_of(st.integers(-2, 5), st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63, -(2**63), 10**30]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), SIZES, st.floats(), st.sampled_from(STRANGE)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "_step", "attempt", "counts"]), inner)),
    max_leaves=6,
)  # fmt: skip


def text(name: str, ids: list[str]) -> st.SearchStrategy[str]:
    """Mostly something that exists, so that the garbage elsewhere gets past the first check."""
    known = next((values for key, values in NAMES.items() if key in name.lower()), ["r", "p", "local"])
    if name.lower().endswith("id") or name == "id":
        known = ids
    return st.one_of(st.sampled_from(known), st.sampled_from(known), st.sampled_from(known), st.sampled_from(STRANGE))


def value(kind: Any, name: str, ids: list[str], depth: int = 0) -> st.SearchStrategy[Any]:
    if isinstance(kind, GraphQLNonNull):
        return value(kind.of_type, name, ids, depth)
    if isinstance(kind, GraphQLList):
        inner = value(kind.of_type, "id" if name == "files" and "File" in str(ids) else name, ids, depth + 1)
        return st.one_of(st.none(), st.lists(inner, max_size=3)) if depth else st.lists(inner, max_size=3)
    if isinstance(kind, GraphQLEnumType):
        return st.sampled_from(list(kind.values))
    if isinstance(kind, GraphQLInputObjectType):
        fields = {key: value(field.type, key, ids, depth + 1) for key, field in kind.fields.items()}
        required = {key: strategy for key, strategy in fields.items() if isinstance(kind.fields[key].type, GraphQLNonNull)}
        optional = {key: strategy for key, strategy in fields.items() if key not in required}
        return st.fixed_dictionaries(required, optional=optional)
    scalars: dict[str, st.SearchStrategy[Any]] = {
        "Int": SIZES, "Int64": SIZES, "Float": st.floats(), "Boolean": st.booleans(), "JSON": VALUES,
        "JSONString": st.one_of(st.sampled_from(JSON_TEXTS), text(name, ids)),
    }  # fmt: skip
    return scalars.get(kind.name, text(name, ids))


def named(kind: Any) -> Any:
    while isinstance(kind, GraphQLNonNull | GraphQLList):
        kind = kind.of_type
    return kind


def selection(kind: Any, draw: Any, depth: int = 3) -> str:
    """All leaves of a type, and some of what lies below; arguments only where they are required."""
    kind = named(kind)
    if isinstance(kind, LEAVES):
        return ""
    if isinstance(kind, GraphQLUnionType):
        return " { __typename }"
    assert isinstance(kind, GraphQLObjectType | GraphQLInterfaceType)
    parts = ["__typename"]
    for name, field in kind.fields.items():
        if any(isinstance(argument.type, GraphQLNonNull) for argument in field.args.values()):
            continue
        if isinstance(named(field.type), LEAVES):
            parts.append(name)
        elif depth > 0 and draw(st.booleans()):
            parts.append(name + selection(field.type, draw, depth - 1))
    return " { " + " ".join(parts) + " }"


@st.composite
def operations(draw: Any, ids: list[str]) -> tuple[str, dict[str, Any]]:
    """A document with one field of Query or Mutation, below a project or run for half of the queries, and its variables."""
    root = draw(st.sampled_from(["query", "mutation"]))
    parent = SCHEMA.query_type if root == "query" else SCHEMA.mutation_type
    assert parent is not None
    wrap = "%s"
    if root == "query" and draw(st.booleans()):
        deeper = draw(st.sampled_from(["Project", "Run"]))
        parent = SCHEMA.type_map[deeper]
        wrap = 'project(name: "p", entityName: "local") { %s }' if deeper == "Project" else wrap
        if deeper == "Run":
            run = draw(st.sampled_from(["r", "r:1", "sdk"]))
            wrap = 'project(name: "p", entityName: "local") { run(name: "' + run + '") { %s } }'
    name = draw(st.sampled_from(sorted(parent.fields)))
    field = parent.fields[name]
    variables = {}
    for key, argument in field.args.items():
        if isinstance(argument.type, GraphQLNonNull) or draw(st.booleans()):
            variables[key] = draw(value(argument.type, key, ids))
    declared = ", ".join(f"${key}: {field.args[key].type}" for key in variables)
    given_arguments = ", ".join(f"{key}: ${key}" for key in variables)
    call = name + (f"({given_arguments})" if variables else "") + selection(field.type, draw)
    return f"{root} Fuzz{f'({declared})' if declared else ''} {{ {wrap % call} }}", variables


LINES = st.one_of(
    st.sampled_from(
        ['{"_step": 0}', '{"_step": 1, "x": NaN}', "x", "", "[]", '{"_step": "a"}', '{"_step": -5}', "\x00", "\ud800"]
    ),
    VALUES.map(lambda found: json.dumps({"_step": 1, "v": found})),
)
STREAMS = ["wandb-history.jsonl", "wandb-events.jsonl", "output.log", "wandb-summary.json", "../x"]
SMALL = st.one_of(st.integers(0, 2), st.integers(0, 2), SIZES)
CHUNKS = st.fixed_dictionaries({}, optional={"offset": SMALL, "content": st.lists(LINES, max_size=4)})
STAMPS = st.fixed_dictionaries(
    {"attempt": SMALL, "nonce": st.sampled_from(["n1", "other", ""]), "writer": st.sampled_from(["w", "", "\ud800"])},
    optional={
        "seq": st.dictionaries(st.sampled_from(STREAMS), SMALL, max_size=3),
        "ended": st.one_of(st.none(), st.just({"cause": "lost"}), st.just({"cause": "exit"}), VALUES),
    },
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "files": st.dictionaries(st.sampled_from(STREAMS), CHUNKS, max_size=4),
        "uploaded": st.lists(st.sampled_from(STRANGE), max_size=2),
        "preempting": st.booleans(),
        "complete": st.booleans(),
        "exitcode": SMALL,
        "wbdist": STAMPS,
    },
)  # fmt: skip


class Target:
    """The app in this process, with a run of ours, one of W&B's client, a file and an artifact; and its store's fingerprint."""

    def __init__(self, ctx: AppContext) -> None:
        self.app = create_app(ctx)
        self.client = TestClient(self.app, raise_server_exceptions=False)
        self._key = next(iter(ctx.auth._users))
        self._db = ctx.store._db  # type: ignore[attr-defined]
        self.headers: dict[str, str] = {}

    def fingerprint(self) -> str:
        found = hashlib.sha256()
        with self._db.read() as db:
            for table in sa.inspect(db).get_table_names():
                found.update(repr((table, db.exec_driver_sql(f'SELECT * FROM "{table}"').all())).encode())
        return found.hexdigest()

    def check(self, method: str, path: str, **how: Any) -> int:
        """Sends it; the status, which is none of 5xx, and of a refusal the store as it was."""
        before = self.fingerprint()
        answer = self.client.request(method, path, headers={**self.headers, **how.pop("headers", {})}, **how)
        assert answer.status_code < 500, (method, path, how, answer.text)
        if answer.status_code >= 400 and answer.status_code != 409:
            assert self.fingerprint() == before, (method, path, how, answer.text)
        return answer.status_code


@pytest.fixture
def target(ctx: AppContext) -> Iterator[Target]:
    made = Target(ctx)
    key = (ctx.files.path("ab").parents[3] / "admin.key").read_text().strip()
    made.headers = {"Authorization": f"Bearer {key}"}

    def ask(query: str, **variables: Any) -> Any:
        answer = made.client.post("/graphql", json={"query": query, "variables": variables}, headers=made.headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    for run in ("r", "sdk"):
        ask('mutation($r: String) { upsertBucket(input: {modelName: "p", name: $r, config: "{}"}) { inserted } }', r=run)
    ask('mutation { beginAttempt(input: {projectName: "p", runName: "r", attempt: 1, nonce: "n1", writer: "w"}) { accepted } }')
    made.client.put("/files/local/p/r/content/a.txt", content=b"1", headers=made.headers)
    body = {"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"_step": 0, "x": 1}']}}}
    made.client.post("/files/local/p/sdk/file_stream", json=body, headers=made.headers)
    made_artifact = ask(
        'mutation { createArtifact(input: {entityName: "local", projectName: "p", runName: "r", artifactTypeName: "model", '
        'artifactCollectionName: "art", digest: "d1"}) { artifact { id } } }'
    )["createArtifact"]["artifact"]["id"]
    manifest = ask(
        'mutation($a: ID!) { createArtifactManifest(input: {artifactID: $a, name: "m", digest: "d1", entityName: "local", '
        'projectName: "p"}) { artifactManifest { file { uploadUrl } } } }', a=made_artifact,
    )["createArtifactManifest"]["artifactManifest"]["file"]["uploadUrl"]  # fmt: skip
    assert made.client.put(manifest, content=b'{"version": 1, "contents": {}}').status_code == 200
    ask("mutation($a: ID!) { commitArtifact(input: {artifactID: $a}) { artifact { id } } }", a=made_artifact)
    made.ids = [made_artifact, "File:1:a.txt", "UnVuOnYxOnI6cDpsb2NhbA=="]  # type: ignore[attr-defined]
    yield made
    made.client.close()


def quick(examples: int) -> Any:
    """The same requests every time."""
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=ignored)


def fuzz_graphql(target: Target, examples: int) -> None:
    @quick(examples)
    @given(operations(target.ids))  # type: ignore[attr-defined]
    def run(operation: tuple[str, dict[str, Any]]) -> None:
        query, variables = operation
        body = json.dumps({"query": query, "variables": variables}, allow_nan=False, default=str) if _plain(variables) else None
        if body is not None:
            target.check("POST", "/graphql", content=body.encode("utf-8", "surrogatepass"))

    run()


def _plain(found: Any) -> bool:
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        return False
    return True


def fuzz_streams(target: Target, examples: int) -> None:
    numbers = itertools.count()

    @quick(examples)
    @given(BODIES, st.sampled_from(["r", "sdk", "new", "r:1"]))
    def run(body: dict[str, Any], run_id: str) -> None:
        content = json.dumps(body).encode("utf-8", "surrogatepass")
        if run_id == "new":
            run_id = f"new{next(numbers)}"
        target.check("POST", f"/files/local/p/{run_id}/file_stream", content=content)

    run()


def addresses(target: Target) -> st.SearchStrategy[str]:
    """Those of every route that the app has, whichever are added, with names that exist and names that are none."""
    values = {
        "entity": "local",
        "project": "p",
        "run": "r",
        "name": "a.txt",
        "artifact": "1",
        "region": "default",
        "collection": "art",
    }
    made = []
    for route in target.app.routes:
        parts = re.split(r"\{(\w+)(?::\w+)?\}", getattr(route, "path", ""))
        if parts[-1] == "/events":
            continue  # a good request for these never ends: tests/browser
        names = [
            st.sampled_from([values.get(name, "x")] * 3 + STRANGE[:-1]).map(lambda text: quote(text, errors="replace"))
            for name in parts[1::2]
        ]
        made.append(
            st.tuples(*names).map(
                lambda given, fixed=parts[::2]: "".join(itertools.chain(*itertools.zip_longest(fixed, given, fillvalue="")))
            )
        )
    assert len(made) > 20
    return st.one_of(made)


def fuzz_paths(target: Target, examples: int) -> None:
    paths = st.one_of(
        addresses(target),
        st.sampled_from(["/files/local/p/r/content/a.txt", "/artifacts/1/content", "/artifacts/content/ab/x", "/api/ui/local/p/runs"]),
        st.sampled_from(["/api/ui/local/p/runs/r/console", "/api/ui/local/p/series", "/api/ui/me", "/api/ui/login", "/login/once"]),
        st.sampled_from(["/artifactsV2/default/local/p/art//00/x", "/artifactsV2/a/b/c/d/e", "/files/local/p/r/content/../../x"]),
        st.lists(st.sampled_from(["files", "local", "p", "r", "content", "%00", "%ff", "..", "%2e%2e", "a" * 300, "💥"]), max_size=7).map(
            lambda parts: "/" + "/".join(parts)
        ),
    )  # fmt: skip
    queries = st.dictionaries(
        st.sampled_from(["method", "until", "signature", "of", "first", "last", "run", "group", "token", "next"]),
        st.sampled_from(["PUT", "GET", "1", "-1", "99999999999999999999", "x", "", "%", "🙂", "²"]),
        max_size=4,
    )
    headers = st.dictionaries(
        st.sampled_from([STAMP_HEADER, "Range", "Content-Encoding", "Content-Type", "Cookie", "Origin", "Host", "If-Range"]),
        st.sampled_from(["", "bytes=5-1", "bytes=0-99999999999", "gzip", "{}", "[]", '{"attempt":1,"nonce":"n","writer":"w","seq":1}', "x" * 5000]),
        max_size=3,
    )  # fmt: skip
    methods = st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH"])

    @quick(examples)
    @given(methods, paths, queries, headers, st.sampled_from([b"", b"{}", b"\xff", b"[" * 3000]), st.booleans())
    def run(method: str, path: str, query: dict[str, str], head: dict[str, str], content: bytes, anonymous: bool) -> None:
        if anonymous:
            head = {**head, "Authorization": ""}
        target.check(method, path, params=query, headers=head, content=content)

    run()


FUZZES = [fuzz_graphql, fuzz_streams, fuzz_paths]


@pytest.mark.parametrize("fuzz", FUZZES)
def test_generated_requests(target: Target, fuzz: Any) -> None:
    """Proves of at least 150 requests each: no 5xx, and no trace of what was refused."""
    fuzz(target, 200 if fuzz is fuzz_paths else 150)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fuzz", FUZZES)
def test_many_generated_requests(target: Target, fuzz: Any) -> None:
    """The same, for minutes."""
    fuzz(target, 8000)


@pytest.mark.parametrize(
    "body",
    [
        {"files": {"wandb-history.jsonl": {"offset": 0, "content": ["x"]}}},
        {"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"_step": 7}']}}, "complete": True, "exitcode": 2**40},
        {"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"_step": 7}']}}, "exitcode": 10**30},
        {"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"_step": 7}']}, "wandb-summary.json": {"offset": 0, "content": ["["]}}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("run_id", ["sdk", "never-heard-of"])
def test_refused_streams_leave_no_run_and_no_line(target: Target, body: dict[str, Any], run_id: str) -> None:
    """Proves of requests that are half right: nothing of them is stored, not even the run they name."""
    assert target.check("POST", f"/files/local/p/{run_id}/file_stream", json=body) == 400
