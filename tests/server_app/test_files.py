"""Run files: signed addresses, whole uploads, names that try to escape."""

from __future__ import annotations

import base64
import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.applications import Starlette
from starlette.testclient import TestClient

from wbdist.protocol import operations
from wbdist.server import transfers
from wbdist.server.context import AppContext
from wbdist.server.files import FileStore, normal_name
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
    folders = list((server.data_dir / "files").iterdir())
    assert len(list(folders[0].glob("*.blob"))) == 1, "replaced versions are removed"


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


def test_case_and_nesting_need_no_rule(tmp_path: Path) -> None:
    """Proves that `a`, `A` and `a/b` live side by side, and that uncommitted writes vanish."""
    files = FileStore(tmp_path)
    for name in ("a", "A", "a/b"):
        with files.writer(1, name) as writer:
            writer.write(name.encode())
            writer.commit(1.0)
    with files.writer(1, "a") as writer:
        writer.write(b"never")
    assert {record.name: files.path(1, record).read_text() for record in files.list(1)} == {"a": "a", "A": "A", "a/b": "a/b"}
    assert len(list((tmp_path / "1").iterdir())) == 6
