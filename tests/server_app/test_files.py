"""Run files: signed addresses, whole uploads, names that try to escape."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
from starlette.applications import Starlette
from starlette.testclient import TestClient
from support.serving import Server

from wbdist.core.position import FILES as STREAM
from wbdist.core.position import Watermark
from wbdist.protocol import operations
from wbdist.protocol.attempts import STAMP_HEADER, BeginAttempt
from wbdist.server import transfers
from wbdist.server.context import AppContext
from wbdist.server.files import normal_name
from wbdist.server.store.interface import RunFields

FILES = """
query RunFiles($names: [String], $pattern: String) { project(name: "files", entityName: "local") { run(name: "r") {
  fileCount files(names: $names, pattern: $pattern) { edges { node { name url sizeBytes md5 mimetype } } } } } }"""


@pytest.fixture(scope="module")
def slots(server: Any) -> Any:
    """Asks for upload addresses as our client does."""
    upsert = operations.upsert_run(project="files", run_id="r")
    assert server.post("/graphql", data=upsert.body()).status_code == 200

    def ask(*names: str) -> dict[str, str]:
        answer = server.post("/graphql", data=operations.create_run_files("local", "files", "r", names).body())
        return operations.read_upload_slots(answer.json()["data"]).urls

    return ask


def listed(server: Any, **variables: Any) -> dict[str, Any]:
    run = server.graphql(FILES, **variables)["project"]["run"]
    return {edge["node"]["name"]: edge["node"] for edge in run["files"]["edges"]}


def test_a_file_goes_up_and_comes_down(server: Any, slots: Any) -> None:
    """Proves PUT without Authorization, GET with Range, md5 and size, replacement, and that the address is absolute."""
    content = bytes(range(256)) * 9000
    for body in (b"old", b"", content):
        url = slots("media/a b%.bin")["media/a b%.bin"]
        assert url.startswith(server.url)
        assert requests.put(url, data=body, timeout=10).status_code == 200
    node = listed(server)["media/a b%.bin"]
    assert (node["sizeBytes"], node["md5"]) == (len(content), base64.b64encode(hashlib.md5(content).digest()).decode())
    answer = requests.get(node["url"], timeout=10)
    assert answer.content == content
    assert answer.headers["content-disposition"].startswith("attachment")
    part = requests.get(node["url"], headers={"Range": "bytes=10-19"}, timeout=10)
    assert (part.status_code, part.content) == (206, content[10:20])
    head = requests.head(node["url"], timeout=10)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(content)))
    assert not list((server.data_dir / "files" / "tmp").iterdir())


def test_addresses_are_good_for_one_thing(server: Any, slots: Any) -> None:
    """Proves that a signature does not carry over to another method, file or time, and that none is needed with a key."""
    url = slots("one.txt")["one.txt"]
    assert requests.put(url, data=b"1", timeout=10).status_code == 200
    assert requests.get(url, timeout=10).status_code == 403
    assert requests.get(url.replace("method=PUT", "method=GET"), timeout=10).status_code == 403
    assert requests.put(url.replace("one.txt", "two.txt"), data=b"1", timeout=10).status_code == 403
    assert requests.put(url.replace("until=", "until=9"), data=b"1", timeout=10).status_code == 403
    assert requests.put(url.replace("until=", "until=x"), data=b"1", timeout=10).status_code == 403
    bare = server.url + "/files/local/files/r/content/one.txt"
    assert requests.get(bare, timeout=10).status_code == 403
    assert requests.get(bare, auth=("api", server.key), timeout=10).content == b"1"
    assert (
        requests.get(server.url + "/files/local/files/nosuch/content/x", auth=("api", server.key), timeout=10).status_code
        == 404
    )


def test_a_name_that_does_not_exist_is_a_node_with_md5_0(server: Any, slots: Any) -> None:
    """Proves the contract of W&B's restore(), `./x` meaning `x`, and LIKE patterns."""
    requests.put(slots("./sub/x.txt")["./sub/x.txt"], data=b"x", timeout=10)
    nodes = listed(server, names=["nope.txt", "sub/x.txt"])
    assert nodes["nope.txt"]["md5"] == "0"
    assert nodes["sub/x.txt"]["md5"] != "0"
    assert list(listed(server, pattern="sub/%.tx_")) == ["sub/x.txt"]


def test_a_broken_upload_leaves_the_old_version(server: Any, slots: Any) -> None:
    """Proves that a connection cut inside the body stores nothing."""
    url = slots("torn.txt")["torn.txt"]
    requests.put(url, data=b"whole", timeout=10)
    path = url.removeprefix(server.url)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf".encode())
    assert requests.get(listed(server, names=["torn.txt"])["torn.txt"]["url"], timeout=10).content == b"whole"


@pytest.mark.parametrize("name", ["", ".", "/", "..", "a/../../b", "/etc/passwd", "a\nb", "\\..\\x", "x" * 2000])
def test_names_that_are_none(name: str) -> None:
    """Proves that escaping and empty names are refused."""
    with pytest.raises(ValueError, match="file"):
        normal_name(name)


def test_an_address_ends(ctx: AppContext, clock: Any) -> None:
    """Proves that a signed address works until its time and not after."""
    run, _ = ctx.store.upsert_run("local", "p", "r", RunFields(), clock.now)
    url = transfers.transfer_url(ctx, "", run, "x", "PUT")
    client = TestClient(Starlette(routes=transfers.routes(ctx)))
    assert client.put(url, content=b"1").status_code == 200
    clock.now += ctx.settings.transfer_seconds + 1
    assert client.put(url, content=b"2").status_code == 403


def test_case_and_nesting_need_no_rule(server: Any, slots: Any) -> None:
    """Proves that `a`, `A` and `a/b` live side by side."""
    for name in ("case/a", "case/A", "case/a/b"):
        assert requests.put(slots(name)[name], data=name, timeout=10).status_code == 200
    nodes = listed(server, pattern="case/%")
    assert {name: requests.get(node["url"], timeout=10).text for name, node in nodes.items()} == {name: name for name in nodes}
    assert sorted(nodes) == ["case/A", "case/a", "case/a/b"]


def test_a_content_lies_on_disk_once(server: Any, slots: Any) -> None:
    """Proves that the same bytes, under whatever name and however often sent, take their place once."""
    content = b"the same" * 1000
    place = server.data_dir / "files" / "blobs" / hashlib.sha256(content).hexdigest()[:2] / hashlib.sha256(content).hexdigest()
    for name in ("once/1", "once/2", "once/1"):
        assert requests.put(slots(name)[name], data=content, timeout=10).status_code == 200
    assert place.read_bytes() == content
    assert len([blob for blob in (server.data_dir / "files").rglob("*") if blob.is_file() and blob.samefile(place)]) == 1


def test_deleting_and_marking(server: Any, slots: Any) -> None:
    """Proves deleteFiles by id, that it may be repeated, and that markRunFilesUploaded says what is there."""
    requests.put(slots("gone.txt")["gone.txt"], data=b"1", timeout=10)
    mark = (
        'mutation($f: [String!]!) { markRunFilesUploaded(input: {projectName: "files", runName: "r", files: $f}) { success } }'
    )
    assert server.graphql(mark, f=["./gone.txt"])["markRunFilesUploaded"]["success"] is True
    query = '{ project(name: "files") { internalId run(name: "r") { files(names: ["gone.txt"]) { edges { node { id } } } } } }'
    project = server.graphql(query)["project"]
    node = project["run"]["files"]["edges"][0]["node"]
    delete = "mutation($f: [ID!]!, $p: Int) { deleteFiles(input: {files: $f, projectId: $p}) { success } }"
    for _ in range(2):
        assert server.graphql(delete, f=[node["id"]], p=int(project["internalId"]))["deleteFiles"]["success"] is True
    assert "gone.txt" not in listed(server)
    assert listed(server, names=["gone.txt"])["gone.txt"]["md5"] == "0"
    assert server.graphql(mark, f=["gone.txt"])["markRunFilesUploaded"]["success"] is False
    refused = server.post("/graphql", json={"query": delete, "variables": {"f": ["File:x:1"]}})
    assert refused.status_code == 404


def test_a_stamped_upload_belongs_to_its_attempt(server: Any) -> None:
    """Proves the stamp header over HTTP: repeats, a fenced attempt (409), an unknown one (404), nonsense (400), and that the
    archived attempt's file is downloaded by its immutable id and cannot be written to."""
    server.post("/graphql", data=operations.upsert_run(project="files", run_id="att").body())

    def begin(attempt: int, base: Watermark | None = None) -> None:
        begun = server.post(
            "/graphql",
            data=operations.begin_attempt("local", "files", "att", BeginAttempt(attempt, f"n{attempt}", "w", base)).body(),
        )
        assert begun.json()["data"]["beginAttempt"]["accepted"] is True

    def put(content: str, stamp: str, run: str = "att") -> requests.Response:
        address = f"{server.url}/files/local/files/{run}/content/ck"
        return requests.put(address, data=content, headers={STAMP_HEADER: stamp}, auth=("api", server.key), timeout=10)

    def read(run: str) -> str:
        query = 'query($r: String!) { project(name: "files") { run(name: $r) { files { edges { node { url } } } } } }'
        edges = server.graphql(query, r=run)["project"]["run"]["files"]["edges"]
        return requests.get(edges[0]["node"]["url"], timeout=10).text

    begin(1)
    for seq, content in enumerate(["one", "two"]):
        for _ in range(2):
            assert put(content, f'{{"attempt":1,"nonce":"n1","writer":"w","seq":{seq}}}').status_code == 200
    begin(2, Watermark(1, {STREAM: {"w": 1}}))
    assert (read("att"), read("att:1"), read("att:2")) == ("one", "two", "one")
    fenced = put("late", '{"attempt":1,"nonce":"n1","writer":"w","seq":2}')
    assert (fenced.status_code, fenced.json()["wbdist"]) == (409, {"code": "fenced", "attempt": 2})
    assert (read("att"), read("att:1")) == ("one", "late")
    assert put("x", '{"attempt":9,"nonce":"n","writer":"w","seq":0}').status_code == 404
    for nonsense in (
        "",
        "[]",
        "{",
        '{"attempt":1,"nonce":"n1","writer":"w","seq":-1}',
        '{"attempt":1,"nonce":"","writer":"w","seq":1}',
    ):
        assert put("x", nonsense).status_code == 400, nonsense
    assert put("x", '{"attempt":1,"nonce":"n1","writer":"w","seq":9}', "att:1").status_code == 403
    assert read("att:1") == "late"


def test_an_oversized_file_is_refused_before_it_is_sent(ctx: AppContext, clock: Any) -> None:
    """Proves 413 by the declared length and by what really arrives, with nothing kept of it."""
    small = msgspec.structs.replace(ctx.settings, max_file_bytes=10)
    ctx = dataclasses.replace(ctx, settings=small)
    run, _ = ctx.store.upsert_run("local", "p", "r", RunFields(), clock.now)
    url = transfers.transfer_url(ctx, "", run, "x", "PUT")
    client = TestClient(Starlette(routes=transfers.routes(ctx)))
    assert client.put(url, content=b"x" * 11).status_code == 413
    assert client.put(url, content=iter([b"x" * 6, b"x" * 6])).status_code == 413
    assert client.put(url, content=b"x" * 10).status_code == 200
    assert [version.size for version in ctx.store.files.live(run)] == [10]
    root = ctx.files.path("ab").parents[2]
    assert not list((root / "tmp").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB; skips where it cannot be made (it takes root)."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_a_507_and_the_server_lives(small_disk: Path, tmp_path: Path) -> None:
    """Proves that a file that does not fit is refused with a message, leaves nothing behind, and the next one is stored."""
    with Server(tmp_path / "data", "--files", str(small_disk)) as server:
        server.post("/graphql", data=operations.upsert_run(project="files", run_id="r").body())
        address = server.url + "/files/local/files/r/content/"

        def put(name: str, size: int) -> requests.Response:
            return requests.put(address + name, data=b"x" * size, auth=("api", server.key), timeout=20)

        for _ in range(2):
            refused = put("big", 3 * 2**20)
            assert refused.status_code == 507
            assert "full" in refused.json()["errors"][0]["message"]
            assert not list((small_disk / "tmp").iterdir())
        assert put("small", 1000).status_code == 200
        run = server.graphql(FILES)["project"]["run"]
        assert [edge["node"]["name"] for edge in run["files"]["edges"]] == ["small"]
