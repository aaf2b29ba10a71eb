"""What W&B's SDK and our client send in the same scenarios, written down on the way, and held against each other.

Our client may send less than W&B's, and what is its own travels in fields of its own (`wbdist`, X-WBDIST-STAMP, BeginAttempt);
what both send has the same names and types, and the server answers both alike and comes to the same states.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.recording import Exchange, Recorder, shape
from support.seeding import CLIENTS, Client, Seeds, other
from support.waiting import until

SCENARIOS = """
import os
import wandb
fast = {}
def opened(run_id, **how):
    return wandb.init(project=os.environ["WHERE"], id=run_id, settings=wandb.Settings(**fast), **how)
with opened("plain", name="Plain", group="g", job_type="j", tags=["t"], notes="n", config={"lr": 0.1, "net": {"w": 3}}) as run:
    for i in range(20):
        run.log({"loss": 1 / (i + 1), "n": {"i": i}, "odd": float("nan")})
    print("a printed line")
    run.summary["best"] = 7
with opened("plain", resume="must", config={"more": 1}) as run:
    run.log({"loss": 0.5})
with opened("forked", fork_from="plain?_step=9") as run:
    run.log({"loss": 0.25})
with wandb.init(project=os.environ["WHERE"], resume_from="plain?_step=4") as run:
    run.log({"loss": 0.125})
with opened("defined") as run:
    run.define_metric("epoch")
    run.define_metric("acc", step_metric="epoch", summary="max")
    run.log({"epoch": 1, "acc": 0.5})
open("weights.bin", "wb").write(bytes(1000))
with opened("saved") as run:
    run.save("weights.bin")
    run.log({"a": 1})
    made = wandb.Artifact("made", type="model")
    made.add_file("weights.bin")
    run.log_artifact(made, aliases=["best"])
run = opened("marked")
run.log({"a": 1})
run.mark_preempting()
run.finish(exit_code=3)
run = opened("failed")
run.log({"a": 1})
run.finish(exit_code=1)
"""

CRASH = """
import os, signal, time
import wandb
run = wandb.init(project=os.environ["WHERE"], id="crashed")
run.log({"a": 1})
print("READY", flush=True)
time.sleep(60)
"""

STATES = {
    "plain": "finished",
    "forked": "finished",
    "defined": "finished",
    "saved": "finished",
    "marked": "preempted",
    "failed": "failed",
    "crashed": "crashed",
}


TELEMETRY = "/sdk/otel/"
"""W&B's client offers numbers about itself; our server has no place for them, and 404 makes it stop offering."""


class Record:
    """What one client said in all scenarios."""

    def __init__(
        self, exchanges: list[Exchange], states: dict[str, str], read: dict[str, Any], attempts: dict[str, Any]
    ) -> None:
        self.exchanges = exchanges
        self.states = states
        self.read = read
        """run id -> what the other client reads of it."""
        self.attempts = attempts
        """run id -> (number, rows, rows that show) of each of its attempts."""

    def operations(self, field: str) -> list[dict[str, Any]]:
        """The variables of each request with the mutation `field`; null and absent are the same."""
        found = []
        for exchange in self.exchanges:
            if exchange.path.endswith("/graphql") and f"{field}(" in exchange.sent["query"]:
                variables = exchange.sent.get("variables") or {}
                found.append({name: value for name, value in variables.items() if value is not None})
        return found

    def streams(self, run_id: str) -> list[Any]:
        """The bodies of the run's file_stream requests."""
        return [e.sent for e in self.exchanges if e.path.endswith(f"/{run_id}/file_stream") and isinstance(e.sent, dict)]

    def lines(self, run_id: str, file: str) -> list[Any]:
        return [
            json.loads(line)
            for body in self.streams(run_id)
            for line in (body.get("files") or {}).get(file, {}).get("content", ())
        ]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Client, Record]]:
    with Seeds(tmp_path_factory.mktemp("shapes"), "--silence-timeout", "5") as world:
        found = {}
        for client in CLIENTS:
            folder = world.place(f"by-{client}")
            with Recorder(world.server.url, times=2) as recorder:
                where = {"WANDB_BASE_URL": recorder.url, "WHERE": f"by-{client}", "WANDB_X_DISABLE_MACHINE_INFO": "false"}
                crashing = world.start(client, CRASH, world.place(f"crash-{client}"), **where)
                assert crashing.stdout is not None
                world.run(client, SCENARIOS, folder, **where)
                assert any("READY" in line for line in crashing.stdout)
                world.kill(crashing)

                def states(client: Client = client) -> dict[str, str]:
                    return dict(world.read("wbdist", f"[(r.id, r.state) for r in api.runs('local/by-{client}')]"))

                until(lambda: states().get("crashed") == "crashed", "the killed process to be noticed")
                read = {run["id"]: run for run in world.runs(other(client), f"by-{client}")}
                told = "[(r.id, [(a.attempt, a.rows, a.rows_live) for a in r.attempts()]) for r in api.runs('local/by-{}')]"
                attempts = dict(world.read("wbdist", told.format(client)))
                versions = "[(a.version, sorted(a.aliases)) for a in api.artifacts('model', 'local/by-{}/made')]"
                read["saved"]["artifacts"] = world.read("wandb", versions.format(client))
                files = "sorted([f.name, f.size] for f in api.run('local/by-{}/saved').files())"
                read["saved"]["files"] = dict(world.read(other(client), files.format(client)))
                found[client] = Record(list(recorder.exchanges), states(), read, attempts)
        yield found


def agree(ours: Any, theirs: Any, where: str) -> None:
    """Every name of ours is theirs as well, with the same type."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert set(ours) <= set(theirs), f"{where}: W&B's client does not send {set(ours) - set(theirs)}"
        for name in ours:
            agree(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list):
        if ours and theirs:
            agree(ours[0], theirs[0], f"{where}[]")
    else:
        assert ours == theirs, f"{where}: {ours} is not W&B's {theirs}"


def test_states(records: dict[Client, Record]) -> None:
    """Proves that the same script ends in the same states with either client, the killed one included."""
    assert records["wandb"].states == STATES
    assert records["wbdist"].states == STATES


@pytest.mark.parametrize("client", CLIENTS)
def test_every_request_came_twice(records: dict[Client, Record], client: Client) -> None:
    """Proves that a request posted again changes nothing more, whichever it is: here each one of both clients was."""
    read = records[client].read
    first = [1 / (i + 1) for i in range(20)]
    losses = {
        "plain": [*first[:5], 0.125],
        "forked": [*first[:10], 0.25],
        "defined": [None],
        "saved": [None],
        "marked": [None],
        "failed": [None],
    }
    for run_id, expected in losses.items():
        rows = read[run_id]["rows"]
        assert [(row["_step"], row.get("loss")) for row in rows] == list(enumerate(expected)), run_id
    assert (read["plain"]["config"], read["plain"]["group"]) == ({"lr": 0.1, "net": {"w": 3}, "more": 1}, "g")
    assert read["forked"]["config"] == {"lr": 0.1, "net": {"w": 3}, "more": 1}
    first_of_plain = 0 if client == "wandb" else 1  # W&B's client begins none with a new run
    expected_attempts = [(20, 5), (1, 0), (1, 1)]
    assert records[client].attempts["plain"] == [[first_of_plain + n, *counts] for n, counts in enumerate(expected_attempts)]
    assert records[client].attempts["forked"] == [[1, 1, 1]]
    assert read["plain"]["summary"]["loss"] == 0.125
    assert str(read["defined"]["summary"]["acc"]) == "{'max': 0.5}"
    assert read["saved"]["artifacts"] == [["v0", ["best", "latest"]]]
    assert read["saved"]["files"]["weights.bin"] == 1000


def test_everything_is_accepted(records: dict[Client, Record]) -> None:
    """Proves that no request of either client is refused, and that answers to file_stream have W&B's form."""
    for client, record in records.items():
        refused = [
            (e.method, e.path, e.status) for e in record.exchanges if e.status != 200 and not e.path.startswith(TELEMETRY)
        ]
        assert refused == [], client
        for exchange in record.exchanges:
            if exchange.path.endswith("/graphql"):
                assert not exchange.answer.get("errors"), (client, exchange.sent["query"][:80])
            elif exchange.path.endswith("/file_stream"):
                assert isinstance(exchange.answer, dict)
                assert exchange.answer.get("stopped", False) is False


def test_upsert_bucket(records: dict[Client, Record]) -> None:
    """Proves that the arguments of UpsertBucket are W&B's, and that what a run is told to be is said by both."""
    ours, theirs = (records[client].operations("upsertBucket") for client in ("wbdist", "wandb"))
    names = [{name for one in found for name in one} for found in (ours, theirs)]
    assert names[0] <= names[1], f"W&B's client does not send {names[0] - names[1]}"
    shapes = [{name: shape(value) for one in found for name, value in one.items()} for found in (ours, theirs)]
    agree(shapes[0], shapes[1], "UpsertBucket")
    given = {"displayName": "Plain", "groupName": "g", "jobType": "j", "tags": ["t"], "notes": "n"}
    for found in (ours, theirs):
        plain = [one for one in found if one.get("name") == "plain"]
        assert any(given.items() <= one.items() for one in plain)
        configs = [json.loads(one["config"]) for one in plain if "config" in one]
        assert any(
            {key: config.get(key, {}).get("value") for key in ("lr", "net")} == {"lr": 0.1, "net": {"w": 3}}
            for config in configs
        )
        assert all(
            set(entry) <= {"value", "desc"} for config in configs for entry in config.values() if isinstance(entry, dict)
        )


def test_history_lines(records: dict[Client, Record]) -> None:
    """Proves that rows have W&B's own keys, types and nesting, and the same steps and values, in every scenario."""
    for run_id in ("plain", "forked", "defined", "saved", "marked", "failed"):
        ours, theirs = (records[client].lines(run_id, "wandb-history.jsonl") for client in ("wbdist", "wandb"))
        assert _told(ours) == _told(theirs), run_id
        for row, their_row in zip(ours, theirs, strict=True):
            agree(shape(_times(row)), shape(_times(their_row)), f"{run_id}: a row")


def _times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("_timestamp", "_runtime")}


def _told(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Without times. `{"n": {"i": 0}}` and `{"n.i": 0}` are one metric to every reader."""
    found = []
    for row in rows:
        flat: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, dict):
                flat |= {f"{name}.{inner}": item for inner, item in value.items()}
            elif name not in {"_timestamp", "_runtime"}:
                flat[name] = value
        # NaN is not equal to itself, and 1 and 1.0 are one number in JSON.
        found.append({name: repr(float(value)) for name, value in sorted(flat.items())})
    return found


def test_file_stream_requests(records: dict[Client, Record]) -> None:
    """Proves the fields of file_stream: files by W&B's names with offset and lines, and a run's end."""
    for run_id, code in (("plain", 0), ("marked", 3), ("failed", 1)):
        for client in CLIENTS:
            bodies = records[client].streams(run_id)
            fields = {field for body in bodies for field in body}
            assert fields <= {"files", "complete", "exitcode", "uploaded", "preempting", "dropped", "wbdist"}, (client, fields)
            for body in bodies:
                for name, chunk in (body.get("files") or {}).items():
                    assert name in {"wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log"}, (
                        client,
                        name,
                    )
                    assert (type(chunk["offset"]), type(chunk["content"])) == (int, list), (client, name)
                    assert all(isinstance(line, str) for line in chunk["content"])
            ends = [body for body in bodies if body.get("complete")]
            assert [(end["complete"], end["exitcode"]) for end in ends][-1] == (True, code), client
    for client in CLIENTS:
        assert any(body.get("preempting") for body in records[client].streams("marked")), client
        assert not any(body.get("preempting") for body in records[client].streams("plain")), client


def test_saved_files(records: dict[Client, Record]) -> None:
    """Proves that `save` asks for an upload address with W&B's arguments, and PUTs the bytes there without the API key."""
    asked = {}
    for client, record in records.items():
        wanted = [one for one in record.operations("createRunFiles") if "weights.bin" in one["files"]]
        assert wanted, client
        asked[client] = shape(wanted[0])
        (put,) = [e for e in record.exchanges if e.method == "PUT" and "weights.bin" in e.path]
        assert (put.sent, "authorization" in put.headers) == (bytes(1000), False), client
    agree(asked["wbdist"], asked["wandb"], "CreateRunFiles")


def test_metric_definitions(records: dict[Client, Record]) -> None:
    """Proves that `define_metric` travels in the config under `_wandb.m`, in the same words."""
    found = {}
    for client, record in records.items():
        configs = [
            json.loads(one["config"])
            for one in record.operations("upsertBucket")
            if one.get("name") == "defined" and "config" in one
        ]
        found[client] = [
            config["_wandb"]["value"]["m"] for config in configs if config.get("_wandb", {}).get("value", {}).get("m")
        ][-1]
    by_name = {client: {metric["1"]: metric for metric in metrics} for client, metrics in found.items()}
    assert by_name["wbdist"]["acc"]["7"] == by_name["wandb"]["acc"]["7"]
    assert {"epoch", "acc"} <= set(by_name["wbdist"]) & set(by_name["wandb"])
