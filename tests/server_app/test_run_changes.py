"""Delete, stop and set the state of runs over GraphQL."""

from __future__ import annotations

from typing import Any

import pytest

from wbdist.core.position import HISTORY
from wbdist.protocol import file_stream, operations
from wbdist.protocol.attempts import BeginAttempt, StreamStamp
from wbdist.protocol.file_stream import FileChunk, StreamRequest

DELETE = "mutation DeleteRun($id: ID!) { deleteRun(input: {id: $id}) { clientMutationId } }"
STOP = "mutation StopRun($id: ID!) { stopRun(input: {id: $id}) { success } }"
STATE = "mutation UpdateRunState($input: UpdateRunStateInput!) { updateRunState(input: $input) { success } }"


def new_run(server: Any, run: str, **fields: Any) -> str:
    answer = server.post("/graphql", data=operations.upsert_run(project="ch", entity="local", run_id=run, **fields).body())
    assert answer.status_code == 200, answer.text
    return operations.read_upserted(answer.json()["data"]).storage_id


def stream(server: Any, run: str, request: StreamRequest) -> Any:
    return server.post(file_stream.path("local", "ch", run), data=file_stream.encode_request(request))


def state(server: Any, run: str) -> Any:
    found = server.graphql('query($n: String!) { project(name: "ch") { run(name: $n) { state } } }', n=run)["project"]
    return found and found["run"] and found["run"]["state"]


def post(server: Any, query: str, **variables: Any) -> Any:
    return server.post("/graphql", json={"query": query, "variables": variables})


def test_a_deleted_run_cannot_come_back(server: Any) -> None:
    """Proves that its id is refused with 410 and W&B's words, that its client is told, and that deleting it again is a 404."""
    storage_id = new_run(server, "gone")
    new_run(server, "other")
    assert post(server, DELETE, id=storage_id).status_code == 200
    assert state(server, "gone") is None
    again = server.post("/graphql", data=operations.upsert_run(project="ch", entity="local", run_id="gone").body())
    assert (again.status_code, "was previously created and deleted" in again.text) == (410, True)
    lines = StreamRequest(files={HISTORY: FileChunk(content=['{"_step":0}'])})
    assert stream(server, "gone", lines).status_code in {400, 410}
    assert post(server, DELETE, id=storage_id).status_code == 404
    whole = "mutation D($id: ID!) { deleteRun(input: {id: $id, deleteArtifacts: true}) { clientMutationId } }"
    assert post(server, whole, id=new_run(server, "other")).status_code == 400


def test_stop_reaches_either_client(server: Any) -> None:
    """Proves that every answer says `stopped` from then on, to W&B's client and to ours, and that the run then is killed."""
    plain, ours = new_run(server, "plain"), new_run(server, "ours")
    begin = operations.begin_attempt("local", "ch", "ours", BeginAttempt(1, "n", "w"))
    assert server.post("/graphql", data=begin.body()).status_code == 200
    stamp = StreamStamp(1, "n", "w", {HISTORY: 0})
    assert "stopped" not in stream(server, "plain", StreamRequest()).json()
    for run_id in (plain, ours):
        assert post(server, STOP, id=run_id).json()["data"]["stopRun"]["success"] is True
    assert stream(server, "plain", StreamRequest()).json()["stopped"] is True
    assert stream(server, "ours", StreamRequest(wbdist=stamp)).json()["stopped"] is True
    stream(server, "plain", StreamRequest(complete=True, exitcode=255))
    assert state(server, "plain") == "killed"
    assert "stopped" not in stream(server, "plain", StreamRequest()).json()
    assert post(server, STOP, id=plain).json()["data"]["stopRun"]["success"] is False


@pytest.mark.parametrize(
    ("exit_code", "asked", "status"),
    [
        (None, "pending", 200),
        (None, "failed", 200),
        (1, "pending", 200),
        (1, "failed", 400),
        (0, "pending", 400),
        (0, "lost", 400),
    ],
)
def test_states_that_may_be_set(server: Any, exit_code: int | None, asked: str, status: int) -> None:
    """Proves W&B's table: to pending from running or failed, to failed from running, nothing of a finished run."""
    name = f"s{exit_code}{asked}"
    storage_id = new_run(server, name)
    if exit_code is not None:
        stream(server, name, StreamRequest(complete=True, exitcode=exit_code))
    before = state(server, name)
    answer = post(server, STATE, input={"id": storage_id, "state": asked})
    assert answer.status_code == status, answer.text
    assert state(server, name) == (asked if status == 200 else before)
