"""GraphQL over HTTP: W&B's documents and our own, against a real server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from wbdist.core.position import CONSOLE, HISTORY, Watermark
from wbdist.protocol import attempts, file_stream, operations, reads
from wbdist.protocol.attempts import BeginAttempt, StreamStamp
from wbdist.protocol.file_stream import FileChunk, StreamRequest


def stream(server: Any, run: str, request: StreamRequest) -> Any:
    return server.post(file_stream.path("local", "gql", run), data=file_stream.encode_request(request))


def rows(count: int, start: int = 0) -> list[str]:
    return [
        json.dumps({"_step": step, "_timestamp": 100.0 + step, "_runtime": step, "loss": 1 / (1 + step)})
        for step in range(start, start + count)
    ]


def new_run(server: Any, run: str, lines: list[str] | None = None, **fields: Any) -> operations.UpsertedRun:
    upserted = operations.read_upserted(server.ask(operations.upsert_run(project="gql", run_id=run, **fields)))
    if lines:
        assert stream(server, run, StreamRequest(files={HISTORY: FileChunk(content=lines)})).status_code == 200
    return upserted


def test_session(server: Any) -> None:
    """Proves who we are, that attempts are announced, and that W&B's probes are answered as it expects."""
    assert operations.read_viewer(server.ask(operations.viewer())) == operations.Viewer("admin", "local")
    assert attempts.FEATURE in operations.read_server_features(server.ask(operations.server_features()))
    probe = """query OrganizationCoreWeaveOrganizationID ($entityName: String!) {
      entity(name: $entityName) { organization { coreWeaveOrganizationId } } }"""
    assert server.graphql(probe, entityName="local") == {"entity": {"organization": None}}
    assert server.post("/sdk/otel/v1/metrics", data=b"\0\1").status_code == 404
    health = server.post("/healthz")
    assert health.status_code == 405


def test_an_upsert_creates_then_changes_only_what_it_names(server: Any) -> None:
    """Proves creation on demand, `inserted`, untouched fields, `tags: []` as a value, and lookup by storage id."""
    first = new_run(server, "u1", config={"lr": {"value": 0.1}}, group="g", tags=["a"], display_name="one", notes="n")
    assert (first.inserted, first.entity, first.project, first.run_id, first.display_name) == (
        True,
        "local",
        "gql",
        "u1",
        "one",
    )
    again = new_run(server, "ignored", storage_id=first.storage_id, tags=[], summary={"x": float("nan")})
    assert (again.inserted, again.run_id) == (False, "u1")
    run = reads.read_run(server.ask(reads.run("local", "gql", "u1")))
    assert run is not None
    assert (run.config, run.group, run.tags, run.notes, run.state) == ({"lr": 0.1}, "g", [], "n", "running")
    assert run.summary["x"] != run.summary["x"]
    assert reads.read_run(server.ask(reads.run("local", "gql", "nosuch"))) is None
    assert reads.read_runs(server.ask(reads.runs("local", "nosuch"))) is None


def test_an_edit_does_not_revive_a_run_but_a_resuming_process_does(server: Any) -> None:
    """Proves that only an upsert that says where it runs (W&B's first one) starts an ended run, and never one of ours."""
    wandb = """mutation UpsertBucket($id: String, $host: String, $notes: String) {
      upsertBucket(input: {id: $id, host: $host, notes: $notes}) { bucket { state } } }"""
    run = new_run(server, "ended")
    stream(server, "ended", StreamRequest(complete=True, exitcode=0))

    def state(**variables: Any) -> str:
        return str(server.graphql(wandb, id=run.storage_id, **variables)["upsertBucket"]["bucket"]["state"])

    assert state(notes="edited") == "finished"
    new_run(server, "ended", host="h", program="p")
    assert state() == "finished"
    assert state(host="h") == "running"


def test_attempts_over_the_wire(server: Any) -> None:
    """Proves begin, fenced and gap answers, and the list of attempts, as our client sees them."""
    new_run(server, "att")

    def begin(number: int, nonce: str, base: Watermark | None = None) -> attempts.BegunAttempt:
        request = BeginAttempt(attempt=number, nonce=nonce, writer="rank0", base=base, cause="start")
        return operations.read_begun(server.ask(operations.begin_attempt(None, "gql", "att", request)))

    def send(number: int, seq: int, lines: list[str]) -> tuple[int, attempts.StreamAnswer | None]:
        stamp = StreamStamp(attempt=number, nonce=f"n{number}", writer="rank0", seq={HISTORY: seq})
        answer = stream(server, "att", StreamRequest(files={HISTORY: FileChunk(content=lines, offset=seq)}, wbdist=stamp))
        return answer.status_code, file_stream.decode_reply(answer.content).wbdist

    assert begin(1, "n1").accepted
    assert begin(1, "n1").accepted, "a retry"
    assert not begin(1, "rival").accepted
    status, reply = send(1, 0, rows(5))
    assert (status, reply and reply.next) == (200, {HISTORY: 5})
    begun = begin(2, "n2", Watermark(attempt=1, counts={HISTORY: {"rank0": 3}}, step=2))
    assert (begun.accepted, begun.attempt, begun.lines[HISTORY]) == (True, 2, 3)
    status, reply = send(1, 5, rows(1, 5))
    assert (status, reply and reply.code, reply and reply.attempt) == (409, "fenced", 2)
    status, reply = send(2, 4, rows(1, 4))
    assert (status, reply and reply.code, reply and reply.next.get(HISTORY, 0)) == (409, "gap", 0)
    send(2, 0, rows(2, 3))
    page = reads.read_history_page(server.ask(reads.history_page("local", "gql", "att", 0, 1000, rows=1000)))
    assert [row["_step"] for row in page] == [0, 1, 2, 3, 4]
    old = reads.read_history_page(server.ask(reads.history_page("local", "gql", "att", 0, 1000, rows=1000, attempt=1)))
    assert [row["_step"] for row in old] == [0, 1, 2, 3, 4, 5], "the archive keeps late rows"
    listed = reads.read_attempts(server.ask(reads.attempts("local", "gql", "att")))
    assert [(a.attempt, a.base_attempt, a.rows, a.rows_live) for a in listed] == [(1, None, 6, 3), (2, 1, 2, 2)]
    missing = operations.begin_attempt(None, "gql", "nosuch", BeginAttempt(attempt=1, nonce="n", writer="w"))
    assert server.post("/graphql", data=missing.body()).status_code == 404


def test_reading_history(server: Any) -> None:
    """Proves pages, samples, keys, NaN as W&B's client needs it, parquet's absence, and a scalar where a list is asked."""
    lines = rows(50)
    lines[3] = '{"_step": 3, "_timestamp": 103.0, "_runtime": 3, "loss": NaN, "text": "t"}'
    lines[4] = '{"_step": 4, "_timestamp": 104.0, "_runtime": 4, "loss": -Infinity}'
    new_run(server, "hist", lines)
    page = reads.read_history_page(server.ask(reads.history_page("local", "gql", "hist", 2, 6, rows=1000)))
    assert [row["_step"] for row in page] == [2, 3, 4, 5]
    assert page[1]["loss"] != page[1]["loss"]
    full = reads.read_full_history(server.ask(reads.full_history("local", "gql", "hist", 10)))
    assert [full[0]["_step"], full[-1]["_step"], len(full)] == [0, 49, 10]
    sampled = reads.read_sampled_history(server.ask(reads.sampled_history("local", "gql", "hist", ["_step", "loss"], 500)))
    assert (len(sampled), sampled[3], sampled[4]) == (50, {"_step": 3, "loss": "NaN"}, {"_step": 4, "loss": "-Infinity"})
    with_text = reads.read_sampled_history(server.ask(reads.sampled_history("local", "gql", "hist", ["_step", "text"], 500)))
    assert with_text == [{"_step": 3, "text": "t"}]
    query = """query Q($specs: [JSONString!]!) { project(name: "gql", entityName: "local") { run(name: "hist") {
      sampledHistory(specs: $specs) historyKeys parquetHistory(liveKeys: ["_step"]) { parquetUrls liveData }
      historyTail eventsTail historyLineCount } } }"""
    run = server.graphql(query, specs=json.dumps({"keys": ["_step"], "minStep": 10, "maxStep": 12}))["project"]["run"]
    assert run["sampledHistory"] == [[{"_step": 10}, {"_step": 11}, {"_step": 12}]]
    assert run["historyKeys"]["lastStep"] == 49
    assert run["historyKeys"]["keys"]["_step"] == {
        "typeCounts": [{"type": "number", "count": 50}],
        "monotonic": True,
        "previousValue": 49.0,
    }
    assert run["parquetHistory"] == {"parquetUrls": [], "liveData": [{"_step": step} for step in range(50)]}
    assert json.loads(json.loads(run["historyTail"])[-1])["_step"] == 49
    assert (run["eventsTail"], run["historyLineCount"]) == ("[]", 50)
    new_run(server, "empty")
    nothing = server.graphql(query.replace('"hist"', '"empty"'), specs=[])["project"]["run"]
    assert (nothing["historyKeys"], nothing["parquetHistory"]["liveData"]) == (None, [])


def test_listing_runs(server: Any) -> None:
    """Proves pages without gaps or repetitions, filters, order and counts."""
    for index in range(5):
        operation = operations.upsert_run(project="many", run_id=f"m{index}", group=f"g{index % 2}", summary={"loss": -index})
        server.ask(operation)
    found: list[str] = []
    cursor = None
    while True:
        page = reads.read_runs(
            server.ask(reads.runs("local", "many", per_page=2, cursor=cursor, order="+summary_metrics.loss"))
        )
        assert page is not None
        assert page.total == 5
        found += [run.run_id for run in page.runs]
        cursor = page.cursor
        if cursor is None:
            break
    assert found == ["m4", "m3", "m2", "m1", "m0"]
    group = reads.read_runs(server.ask(reads.runs("local", "many", filters={"group": "g1", "state": "running"})))
    assert group is not None
    assert [run.run_id for run in group.runs] == ["m1", "m3"]


def test_console(server: Any) -> None:
    """Proves that lines come back in pages with time, level and label taken from W&B's form."""
    new_run(server, "con")
    lines = ["2026-11-21T03:17:59.296781 hello", "ERROR 2026-11-21T03:17:59.296781 [rank1] oops", "no time at all"]
    stream(server, "con", StreamRequest(files={CONSOLE: FileChunk(content=lines)}))
    query = """query RunConsoleLogTail { project(name: "gql", entityName: "local") { run(name: "con") {
      logLineCount logLines(last: 2) { edges { node { number timestamp level label line } } } } } }"""
    run = server.graphql(query)["project"]["run"]
    assert run["logLineCount"] == 3
    assert [edge["node"] for edge in run["logLines"]["edges"]] == [
        {"number": 1, "timestamp": "2026-11-21T03:17:59.296781Z", "level": "error", "label": "rank1", "line": "oops"},
        {"number": 2, "timestamp": None, "level": "", "label": "", "line": "no time at all"},
    ]
    lines, cursor = reads.read_console_lines(server.ask(reads.console_page("local", "gql", "con", first=2)))
    assert [(line.number, line.level, line.label, line.content) for line in lines] == [
        (0, "", "", "hello"),
        (1, "error", "rank1", "oops"),
    ]
    rest = reads.read_console_lines(server.ask(reads.console_page("local", "gql", "con", first=2, after=cursor)))
    assert rest == ([reads.ConsoleLine(2, None, "", "", "no time at all")], None)
    newest = reads.read_console_lines(server.ask(reads.console_page("local", "gql", "con", last=1)))
    assert [line.number for line in newest[0]] == [2]


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("{ nosuch }", 400, 'Cannot query field "nosuch" on type "Query".'),
        ("{", 400, "Syntax Error"),
        ("{" * 5000, 400, ""),
        ("query A { viewer { id } } query B { viewer { id } }", 400, "operation name"),
        ('mutation { upsertBucket(input: {id: "zzz"}) { inserted } }', 404, "storage id"),
        ('mutation { upsertBucket(input: {name: "a/b"}) { inserted } }', 400, "not a run id"),
        ('mutation { upsertBucket(input: {name: "a", modelName: ".."}) { inserted } }', 400, "cannot be a name"),
        ('mutation { upsertBucket(input: {name: "a", config: "[]"}) { inserted } }', 400, "config must be a JSON object"),
        ('mutation { upsertBucket(input: {name: "a", description: "d"}) { inserted } }', 400, "use `notes`"),
        ('{ project(name: "gql") { runs(filters: "{\\"$near\\": 1}") { edges { cursor } } } }', 400, "$near"),
        ('{ project(name: "gql") { runs(after: "x") { edges { cursor } } } }', 400, "cursor"),
        ('{ project(name: "gql") { runs(first: -1) { edges { cursor } } } }', 400, "first"),
        ('{ project(name: "gql") { run(name: "hist") { sampledHistory(specs: ["3"]) } } }', 400, "spec"),
        ('{ project(name: "gql") { run(name: "hist") { history(samples: 0) } } }', 400, "samples"),
    ],
)
def test_errors_have_a_status_and_a_message(server: Any, query: str, status: int, message: str) -> None:
    """Proves that no error hides in a 200 and that the first message says what is wrong."""
    new_run(server, "hist")
    answer = server.post("/graphql", json={"query": query})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["errors"][0]["message"]
