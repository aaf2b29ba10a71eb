"""Users, teams, public and private projects, on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from support.serving import Server

UPSERT = """mutation($e: String, $r: String!, $c: JSONString) { upsertBucket(input: {entityName: $e, modelName: "p", name: $r,
    config: $c, commit: "abc", jobRepo: "git@x", jobProgram: "secret.py", host: "box"}) {
    bucket { id project { entity { name } } } } }"""
READ = """query($e: String!) { project(name: "p", entityName: $e) { readOnly
    run(name: "r") { id commit jobRepo jobProgram host config wandbConfig
    files { edges { node { name directUrl } } } } runs { edges { node { commit } } } } }"""
CONFIG = json.dumps({"lr": {"value": 1}, "_wandb": {"value": {"t": {"1": 2}, "e": {"w": {"args": ["--password"]}}}}})


class World:
    """A server with alice (team lab), bob (team lab) and eve, and a run of lab's."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.keys = {"admin": server.key}
        for name, *teams in (("alice", "--team", "lab"), ("bob", "--team", "lab"), ("eve",)):
            self.keys[name] = self.command("user", "add", name, *teams).strip()
        self.ask("alice", UPSERT, e="lab", r="r", c=CONFIG)
        for name in ("wandb-metadata.json", "model.pt"):
            assert self.put("alice", name).status_code == 200

    def command(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "wbdist.cli.server", *words, "--data-dir", self.server.data_dir],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        return done.stdout

    def request(self, who: str, method: str, path: str, **how: Any) -> requests.Response:
        return requests.request(method, self.server.url + path, auth=("api", self.keys[who]), timeout=10, **how)

    def ask(self, who: str, query: str, **variables: Any) -> Any:
        answer = self.request(who, "POST", "/graphql", json={"query": query, "variables": variables})
        return answer.json()["data"] if answer.ok else (answer.status_code, answer.json()["errors"][0]["message"])

    def put(self, who: str, name: str) -> requests.Response:
        return self.request(who, "PUT", f"/files/lab/p/r/content/{name}", data=b"x")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Server(tmp_path_factory.mktemp("world") / "data") as server:
        yield World(server)


def test_three_refusals_say_three_things(world: World) -> None:
    """Proves the messages of no login, of no such entity, and of a project that is not yours; nothing is stored."""
    anonymous = requests.post(world.server.url + "/graphql", json={"query": UPSERT, "variables": {"r": "x"}}, timeout=10)
    nobody = (anonymous.status_code, anonymous.json()["errors"][0]["message"])
    missing = world.ask("eve", UPSERT, e="nowhere", r="x")
    foreign = world.ask("eve", UPSERT, e="lab", r="x")
    assert [nobody[0], missing[0], foreign[0]] == [401, 404, 403]
    assert "API key" in nobody[1]
    assert "'nowhere' does not exist" in missing[1]
    assert "may not write to project lab/p" in foreign[1]
    found = world.ask("admin", '{ project(name: "p", entityName: "lab") { run(name: "x") { id } } }')
    assert found["project"]["run"] is None


def test_own_entity_teams_and_admin(world: World) -> None:
    """Proves that a user's runs go to his own entity by default, that members write to their team's, and the admin to all."""
    own = world.ask("eve", UPSERT, r="mine")
    assert own["upsertBucket"]["bucket"]["project"]["entity"]["name"] == "eve"
    for who in ("bob", "admin"):
        assert world.ask(who, READ, e="lab")["project"]["run"]["commit"] == "abc"
        assert world.put(who, "model.pt").status_code == 200
    viewer = world.ask("bob", "{ viewer { entity teams { edges { node { name } } } } }")["viewer"]
    assert (viewer["entity"], [edge["node"]["name"] for edge in viewer["teams"]["edges"]]) == ("bob", ["bob", "lab"])


def test_a_private_project_is_not_there_for_others(world: World) -> None:
    """Proves of every way in: GraphQL, lists, pages, files, streams, a run's storage id."""
    run = world.ask("alice", READ, e="lab")["project"]["run"]
    assert world.ask("eve", READ, e="lab")["project"] is None
    assert world.ask("eve", '{ models(entityName: "lab") { edges { node { name } } } }')["models"]["edges"] == []
    for path in ("/api/ui/lab/p/runs", "/api/ui/lab/p/runs/r", "/api/ui/lab/p/events", "/files/lab/p/r/content/model.pt"):
        assert world.request("eve", "GET", path).status_code == 404, path
    listed = world.request("eve", "GET", "/api/ui/projects").json()["projects"]
    assert "lab" not in {project["entity"] for project in listed}
    assert world.request("eve", "GET", "/artifactsV2/default/lab/p/x//00/x").status_code == 403
    refused = [
        world.put("eve", "model.pt").status_code,
        world.request("eve", "POST", "/files/lab/p/r/file_stream", data=b"{}").status_code,
        world.ask("eve", "mutation($i: ID!) { deleteRun(input: {id: $i}) { clientMutationId } }", i=run["id"])[0],
        world.ask("eve", "mutation($i: ID!) { stopRun(input: {id: $i}) { success } }", i=run["id"])[0],
        world.ask("eve", 'mutation { deleteFiles(input: {files: ["File:1:model.pt"]}) { success } }')[0],
    ]
    assert refused == [403] * 5


def test_a_public_project_is_read_but_not_how_it_ran(world: World) -> None:
    """Proves that outsiders read config and files, but neither commit, repository, program, arguments nor metadata."""
    world.command("project", "public", "lab/p")
    try:
        project = world.ask("eve", READ, e="lab")["project"]
        run = project["run"]
        assert project["readOnly"] is True
        assert [run[key] or "" for key in ("commit", "jobRepo", "jobProgram", "host")] == [""] * 4
        assert project["runs"]["edges"][0]["node"]["commit"] in {"", None}
        assert json.loads(run["config"]) == {"lr": {"value": 1}, "_wandb": {"value": {"t": {"1": 2}}}}
        assert "password" not in json.dumps(project)
        assert [edge["node"]["name"] for edge in run["files"]["edges"]] == ["model.pt"]
        assert requests.get(run["files"]["edges"][0]["node"]["directUrl"], timeout=10).content == b"x"
        assert world.request("eve", "GET", "/files/lab/p/r/content/wandb-metadata.json").status_code == 404
        page = world.request("eve", "GET", "/api/ui/lab/p/runs/r").json()["run"]
        assert [page[key] for key in ("commit", "repo", "program", "host")] == [""] * 4
        assert world.ask("eve", UPSERT, e="lab", r="x")[0] == 403
        assert world.put("eve", "model.pt").status_code == 403
        assert world.ask("bob", READ, e="lab")["project"]["run"]["jobProgram"] == "secret.py"
    finally:
        world.command("project", "private", "lab/p")
    assert world.ask("eve", READ, e="lab")["project"] is None


def test_a_removed_users_key_ends(world: World) -> None:
    """Proves that adding and removing take effect on a running server, that a key is long enough for W&B's client, and `ls`."""
    key = world.command("user", "add", "carol").strip()
    assert len(key) >= 40
    world.keys["carol"] = key
    assert world.ask("carol", "{ viewer { username } }") == {"viewer": {"username": "carol"}}
    assert {"name": "carol", "entity": "carol", "teams": [], "admin": False} in json.loads(
        world.command("user", "ls", "--json")
    )
    world.command("user", "rm", "carol")
    assert world.ask("carol", "{ viewer { username } }")[0] == 401
