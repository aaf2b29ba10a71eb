"""Forks, rewinds, positions, lineage and immutable ids over GraphQL."""

from __future__ import annotations

import json
from typing import Any

import pytest

from wbdist.core.position import CONSOLE, EVENTS, HISTORY, RunPosition, Watermark
from wbdist.protocol import file_stream, operations
from wbdist.protocol.attempts import BeginAttempt, StreamStamp
from wbdist.protocol.file_stream import FileChunk, StreamRequest

READ = """query Read($name: String!) { project(name: "br", entityName: "local") { run(name: $name) {
  id name attempt historyLineCount summaryMetrics lineage historyKeys tail: historyTail
  history(minStep: 0, maxStep: 1000) logLines(first: 10) { edges { node { line } } } } } }"""


def begin(server: Any, run: str, attempt: int, **how: Any) -> Any:
    operation = operations.begin_attempt("local", "br", run, BeginAttempt(attempt, f"n{attempt}", "w", **how))
    return operations.read_begun(server.ask(operation))


def new_run(server: Any, run: str) -> None:
    server.ask(operations.upsert_run(project="br", entity="local", run_id=run))


def log(server: Any, run: str, attempt: int, steps: range, first: int = 0) -> None:
    lines = [json.dumps({"_step": step, "_runtime": step / 4, "x": step * attempt}) for step in steps]
    stamp = StreamStamp(attempt, f"n{attempt}", "w", {HISTORY: first, CONSOLE: 0})
    request = StreamRequest(
        files={HISTORY: FileChunk(content=lines), CONSOLE: FileChunk(content=[f"of {attempt}"])}, wbdist=stamp
    )
    answer = server.post(file_stream.path("local", "br", run), data=file_stream.encode_request(request))
    assert answer.status_code == 200, answer.text


def read(server: Any, name: str) -> Any:
    return server.graphql(READ, name=name)["project"]["run"]


def position(server: Any, name: str, step: int | None = None) -> tuple[int, RunPosition]:
    found = operations.read_position(server.ask(operations.run_position("local", "br", name, step=step)))
    assert found is not None
    return found


def test_rewind_fork_and_reading_by_immutable_id(server: Any) -> None:
    """Proves the three over the wire: rewind by step with fresh streams, fork of an incarnation, reading it by its id."""
    new_run(server, "a")
    begin(server, "a", 1)
    log(server, "a", 1, range(8))
    assert begin(server, "a", 2, at_step=4, fresh=(CONSOLE, EVENTS)).lines == {HISTORY: 5}
    log(server, "a", 2, range(5, 7))
    new_run(server, "b")
    begin(server, "b", 1, base_run="a:1", at_step=6, fresh=(CONSOLE, EVENTS))
    steps = {name: [json.loads(row)["_step"] for row in read(server, name)["history"]] for name in ("a", "a:1", "b")}
    assert steps == {"a": list(range(7)), "a:1": list(range(8)), "b": list(range(7))}
    old, now = read(server, "a:1"), read(server, "a")
    assert (old["name"], old["attempt"], old["historyLineCount"]) == ("a:1", 1, 8)
    assert (json.loads(old["summaryMetrics"])["x"], json.loads(now["summaryMetrics"])["x"]) == (7, 12)
    assert old["historyKeys"]["lastStep"] == 7
    assert [json.loads(json.loads(r["tail"])[0])["_step"] for r in (old, now)] == [7, 6]
    lines = [[edge["node"]["line"] for edge in r["logLines"]["edges"]] for r in (old, now, read(server, "b"))]
    assert lines == [["of 1"], ["of 2"], []]
    assert now["lineage"] == [{"run": "a", "attempt": 1, "step": 4, "kind": "rewind"}]
    assert read(server, "b")["lineage"] == [{"run": "a", "attempt": 1, "step": 6, "kind": "fork"}]
    by_id = """query($name: String!) { project(name: "br") { run(name: $name) { id } } }"""
    assert server.graphql(by_id, name="a:1")["project"]["run"]["id"] == old["id"]
    assert server.graphql(by_id, name="a:9")["project"]["run"] is None


def test_the_position_is_what_a_next_attempt_begins_on(server: Any) -> None:
    """Proves position() at the end and at a step, and that the client's reading of it makes a base."""
    new_run(server, "p")
    begin(server, "p", 1)
    log(server, "p", 1, range(6))
    attempt, whole = position(server, "p")
    assert (attempt, whole.watermark) == (1, Watermark(1, {HISTORY: {"w": 6}, CONSOLE: {"w": 1}}, 5))
    attempt, at_step = position(server, "p", 3)
    assert (at_step.watermark, at_step.runtime, at_step.summary["x"]) == (Watermark(1, {HISTORY: {"w": 4}}, 3), 0.75, 3)
    begin(server, "p", attempt + 1, base=at_step.watermark)
    assert read(server, "p")["historyLineCount"] == 4
    gone = operations.run_position("local", "br", "nosuch")
    assert operations.read_position(server.ask(gone)) is None


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ({"at_step": 9}, 400, "run e has no step 9: its steps end at 3"),
        ({"at_step": -1}, 400, "run e has no step -1"),
        ({"at_step": 1, "base_run": "nosuch"}, 404, "run local/br/nosuch does not exist"),
        ({"at_step": 1, "base": Watermark(1, {})}, 400, "not on both"),
        ({"base": Watermark(2, {})}, 400, "only on an older one"),
    ],
)
def test_senseless_branches_are_refused(server: Any, how: dict[str, Any], status: int, message: str) -> None:
    """Proves the status and the words of each refusal, and that the run stays as it was."""
    new_run(server, "e")
    begin(server, "e", 1)
    log(server, "e", 1, range(4))
    before = read(server, "e")
    operation = operations.begin_attempt("local", "br", "e", BeginAttempt(2, "n2", "w", **how))
    answer = server.post("/graphql", data=operation.body())
    assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert read(server, "e") == before


def test_an_immutable_id_is_for_reading(server: Any) -> None:
    """Proves that nothing is written, begun or made under such a name."""
    new_run(server, "w")
    begin(server, "w", 1)
    operation = operations.begin_attempt("local", "br", "w:1", BeginAttempt(2, "n2", "w"))
    assert server.post("/graphql", data=operation.body()).status_code == 400
    upsert = operations.upsert_run(project="br", entity="local", run_id="w:1")
    assert server.post("/graphql", data=upsert.body()).status_code == 400
    answer = server.post(file_stream.path("local", "br", "w:1"), data=b"{}")
    assert answer.status_code == 400
