"""The server is SIGKILLed again and again while clients of both kinds log and upload: nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from wbdist.core.position import HISTORY
from wbdist.protocol import file_stream, operations
from wbdist.protocol.attempts import STAMP_HEADER, BeginAttempt, StreamStamp
from wbdist.protocol.file_stream import FileChunk, StreamRequest
from wbdist.server.store import open_store


class Client:
    """Posts rows and files in small portions; repeats each request until it is answered, as every client of the wire does."""

    def __init__(self, server: Any, number: int, portions: int) -> None:
        self.run_id = f"c{number}"
        self._server = server
        self._ours = number % 2 == 0
        self._portions = portions
        self._key = server.key
        self._session = requests.Session()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.failure = ""
        self.done = 0

    def _send(self, method: str, path: str, data: bytes, **headers: str) -> requests.Response:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(requests.RequestException):
                answer = self._session.request(
                    method, self._server.url + path, data=data, headers=headers, auth=("api", self._key), timeout=5
                )
                if answer.status_code < 500:
                    assert answer.ok, (path, answer.status_code, answer.text)
                    return answer
            time.sleep(0.02)
        raise AssertionError(f"{path} was not answered within 60 s")

    def _work(self) -> None:
        try:
            self._send("POST", "/graphql", operations.upsert_run(project="k", run_id=self.run_id).body())
            if self._ours:
                begin = operations.begin_attempt("local", "k", self.run_id, BeginAttempt(1, "n", "w"))
                self._send("POST", "/graphql", begin.body())
            for portion in range(self._portions):
                self._portion(portion)
                self.done = portion + 1
        except AssertionError as error:
            self.failure = str(error)

    def _portion(self, portion: int) -> None:
        first = portion * 5
        rows = [f'{{"_step": {step}, "x": {step}}}' for step in range(first, first + 5)]
        stamp = StreamStamp(1, "n", "w", {HISTORY: first}) if self._ours else None
        request = StreamRequest(files={HISTORY: FileChunk(offset=first, content=rows)}, wbdist=stamp)
        path = file_stream.path("local", "k", self.run_id)
        body = file_stream.encode_request(request)
        self._send("POST", path, body)
        if portion % 3 == 0:
            self._send("POST", path, body)
        stamped = {STAMP_HEADER: f'{{"attempt":1,"nonce":"n","writer":"w","seq":{portion}}}'} if self._ours else {}
        content = f"{self.run_id} at {portion} ".encode() * 5000
        self._send("PUT", f"/files/local/k/{self.run_id}/content/state", content, **stamped)


def hammer(server: Any, *, kills: int, portions: int) -> None:
    chance = random.Random(4)
    clients = [Client(server, number, portions) for number in range(8)]
    for client in clients:
        client.thread.start()
    for kill in range(kills):
        goal = (kill + 1) * portions // (kills + 1)
        while min(client.done for client in clients) < goal and all(client.thread.is_alive() for client in clients):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)
        server.kill()
        server.start()
    for client in clients:
        client.thread.join(120)
    assert [client.failure for client in clients] == [""] * 8
    assert [client.done for client in clients] == [portions] * 8


def check(server: Any, *, portions: int) -> None:
    store = open_store(f"sqlite:///{server.data_dir / 'wbdist.db'}")
    try:
        for number in range(8):
            run = store.get_run("local", "k", f"c{number}")
            assert run is not None
            rows = store.history(run.pk)
            assert [(row["_step"], row["x"]) for row in rows] == [(step, step) for step in range(portions * 5)]
            [file] = store.files.live(run)
            blob = server.data_dir / "files" / "blobs" / file.sha256[:2] / file.sha256
            assert blob.read_bytes() == f"c{number} at {portions - 1} ".encode() * 5000
            versions = store.position(run).watermark.counts["files"]
            assert versions == {"w" if number % 2 == 0 else "sdk": portions}
    finally:
        store.close()


@pytest.mark.parametrize(
    ("kills", "portions"), [(2, 8), pytest.param(60, 400, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_server_that_dies_again_and_again(server: Any, kills: int, portions: int, tmp_path: Path) -> None:
    """Proves with eight clients (four with our stamps, four as W&B's SDK): after each SIGKILL all rows are there once
    and in order, and each upload is one version, the last of them live and whole."""
    hammer(server, kills=kills, portions=portions)
    check(server, portions=portions)
