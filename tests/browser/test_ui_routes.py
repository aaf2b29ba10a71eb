"""What is behind the pages: logins, headers, limits, live updates. The real server, without a browser."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from browser import ui_seed

from wbdist.core.position import HISTORY, Watermark
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.ui import live, pages


@pytest.fixture
def http(served: Any) -> Any:
    """A session with the admin key; `get` and `post` take paths."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {served.key}"
    request = session.request
    session.request = lambda method, path, **options: request(method, served.url + path, timeout=10, **options)  # type: ignore[method-assign,assignment]
    return session


class Stream:
    """One live stream over a plain socket."""

    def __init__(self, served: Any, path: str, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(10)
        self.socket.connect(("127.0.0.1", served.port))
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {served.key}\r\n\r\n"
        self.socket.sendall(head.encode())
        self.text = b""

    def until(self, pattern: str) -> str:
        """Reads until `pattern` was sent; everything sent so far."""
        while not re.search(pattern.encode(), self.text):
            got = self.socket.recv(65536)
            assert got, f"the stream ended before {pattern!r}: {self.text!r}"
            self.text += got
        return self.text.decode()

    def close(self) -> None:
        self.socket.close()


PATHS = [
    ("GET", "/api/ui/projects"),
    ("GET", "/api/ui/local/p/runs"),
    ("GET", "/api/ui/local/p/runs/r"),
    ("GET", "/api/ui/local/p/runs/r/console"),
    ("POST", "/api/ui/local/p/series"),
    ("GET", "/api/ui/local/p/events"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_data_needs_a_login(served: Any, method: str, path: str) -> None:
    """Proves that every address with data refuses strangers and wrong keys, and does not make browsers ask for a password."""
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"{served.ctx.auth.cookie_name}=forged.forged"}):
        answer = requests.request(method, served.url + path, headers=headers, json={} if method == "POST" else None, timeout=60)
        assert answer.status_code == 401
        assert "WWW-Authenticate" not in answer.headers
        assert "wbdist server key" in answer.json()["errors"][0]["message"]


def test_no_page_of_another_site_can_read_or_act(served: Any) -> None:
    """Proves that a session's cookie counts neither with a foreign Origin nor under a foreign host name."""
    cookie = {"Cookie": f"{served.ctx.auth.cookie_name}={served.ctx.auth.login(served.key)}"}
    series = f"{served.url}/api/ui/local/p/series"
    body = {"runs": [], "keys": []}
    assert requests.post(series, json=body, headers={**cookie, "Origin": served.url}, timeout=60).status_code == 200
    assert requests.post(series, json=body, headers={**cookie, "Origin": "http://evil.example"}, timeout=60).status_code == 401
    assert requests.post(series, json=body, headers=cookie, timeout=60).status_code == 401
    rebound = {**cookie, "Host": "evil.example"}
    assert requests.get(f"{served.url}/api/ui/projects", headers=rebound, timeout=60).status_code == 401


def test_pages_carry_a_strict_policy_and_load_nothing_from_elsewhere(served: Any) -> None:
    """Proves the headers of the page and its files, that files are cached for ever, and that the page names no other host."""
    page = requests.get(f"{served.url}/local/p/runs/r", timeout=60)
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["Cache-Control"] == "no-cache"
    assert not re.search(r"(src|href)=\"(?!/static/)", page.text)
    assert not re.search(r"<script(?![^>]* src=)|<style| on\w+=", page.text)
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
    assert len(files) == 3
    for path in files:
        file = requests.get(served.url + path, timeout=60)
        assert file.status_code == 200
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        assert "immutable" in file.headers["Cache-Control"]
    for path in ("/static/../pages.py", "/static/%2e%2e/pages.py", "/static/none.js", "/api/nothing", "/a/b/c", "/files/x"):
        assert requests.get(served.url + path, timeout=60).status_code == 404


def test_a_server_without_pages_says_so(served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves that an installation without the built pages answers with what to do."""
    monkeypatch.setattr(pages, "STATIC", tmp_path)
    answer = requests.get(f"{served.url}/", timeout=60)
    assert answer.status_code == 503
    assert "python hatch_build.py" in answer.text


def test_series_are_exact_when_short_and_bounded_when_long(served: Any, http: Any) -> None:
    """Proves that a short series comes value by value, a long one in buckets with the right extremes, counts and last value."""
    run = ui_seed.SeededRun(served.store, "series", "r1", time.time())
    run.begin()
    values = [math.sin(step / 50) + step % 7 for step in range(5000)]
    run.log([{"x": value, "_step": step} for step, value in enumerate(values)])
    body = {"runs": ["r1", "unknown"], "keys": ["x", "unknown"], "buckets": 100}
    (long,) = http.post("/api/ui/local/series/series", json=body).json()["series"]
    assert len(long["lo"]) <= 100
    assert sum(long["count"]) == 5000
    assert (min(long["min"]), max(long["max"]), long["last"][-1]) == (min(values), max(values), values[-1])
    (short,) = http.post("/api/ui/local/series/series", json={**body, "buckets": 5000}).json()["series"]
    assert short == {"run": "r1", "key": "x", "lo": list(range(5000)), "mean": values}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        json.dumps({"runs": ["r"], "keys": ["k"], "buckets": 1}).encode(),
        json.dumps({"runs": ["r"], "keys": ["k"], "buckets": 10**6}).encode(),
        json.dumps({"runs": "r", "keys": ["k"]}).encode(),
        json.dumps({"runs": ["r"] * 40, "keys": ["k"] * 40}).encode(),
        json.dumps({"runs": ["r"] * 2000, "keys": []}).encode(),
    ],
)
def test_senseless_requests_for_series_are_refused(http: Any, body: bytes) -> None:
    """Proves that malformed and oversized requests are a 400 with a reason, not a 500 and not hours of work."""
    answer = http.post("/api/ui/local/p/series", data=body)
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["message"]


def test_a_console_is_read_from_its_end_or_from_a_line_on(served: Any, http: Any) -> None:
    """Proves the two ways to read console lines, their bounds, and the refusal of anything that is no number."""
    run = ui_seed.SeededRun(served.store, "console", "r1", time.time())
    run.begin()
    run.print(*(f"line {i}" for i in range(20)))
    path = "/api/ui/local/console/runs/r1/console"
    assert http.get(f"{path}?last=2").json() == {"first": 18, "total": 20, "lines": ["line 18", "line 19"]}
    assert http.get(f"{path}?first=19").json()["lines"] == ["line 19"]
    assert http.get(f"{path}?first=99").json()["lines"] == []
    for wrong in ("last=-1", "last=x", "last=5001", "first=1e9", "last="):
        assert http.get(f"{path}?{wrong}").status_code == 400


def test_attempts_outside_the_line_that_is_shown_are_marked(served: Any, http: Any) -> None:
    """Proves that of a run that was taken up again from its first attempt, the second attempt is known as not shown."""
    run = ui_seed.SeededRun(served.store, "aside", "r1", time.time())
    run.begin()
    run.log([ui_seed.row(step) for step in range(10)])
    run.begin(keep_rows=8, last_step=7, cause="lost")
    run.log([ui_seed.row(step) for step in range(8, 12)])
    third = BeginAttempt(3, "n3", "rank0", Watermark(1, {HISTORY: {"rank0": 5}}, 4), "rewind")
    assert served.store.begin_attempt(run.pk, third, time.time()).accepted
    attempts = http.get("/api/ui/local/aside/runs/r1").json()["run"]["attempts"]
    assert [(row["attempt"], row["live"], row["rows_live"], row["base_step"]) for row in attempts] == [
        (1, True, 5, -1),
        (2, False, 0, 7),
        (3, True, 0, 4),
    ]
    assert "nonce" not in attempts[0], "whoever has it can write as this attempt"


def test_open_streams_end_with_the_server(served: Any) -> None:
    """Proves that a stop ends the streams of open pages properly, after the grace at the latest."""
    stream = Stream(served, "/api/ui/local/stopped/events")
    stream.until("retry: 1000")
    served.stop()
    try:
        stream.until(r"\r\n0\r\n\r\n")
    finally:
        served.start()
    stream.close()


def test_numbers_no_json_has_do_not_break_answers(served: Any, http: Any) -> None:
    """Proves that runs with NaN, infinities and huge integers in config, summary and `_runtime` can still be listed."""
    config = {"a": math.nan, "b": {"c": [math.inf]}, "rank": 10**30}
    run = ui_seed.SeededRun(served.store, "huge", "r1", time.time(), config=config)
    run.begin()
    run.log([{"x": math.nan, "n": 10**25, "_step": 0, "_runtime": math.inf}])
    (listed,) = http.get("/api/ui/local/huge/runs").json()["runs"]
    assert listed["summary"]["x"] == "NaN"
    page = http.get("/api/ui/local/huge/runs/r1").json()["run"]
    assert page["config"]["b"]["c"] == ["Infinity"]
    assert http.post("/api/ui/local/huge/series", json={"runs": ["r1"], "keys": ["x", "n"]}).status_code == 200


def test_a_stream_tells_all_versions_and_then_the_changed_one(served: Any) -> None:
    """Proves that a stream begins with every run's version and goes on with those that change, new runs included."""
    runs = [ui_seed.SeededRun(served.store, "told", f"r{i}", time.time(), group="g" if i else "") for i in range(3)]
    for run in runs:
        run.begin()
    whole, group = Stream(served, "/api/ui/local/told/events"), Stream(served, "/api/ui/local/told/events?group=g")
    assert set(json.loads(re.findall(r"data: (.*)", whole.until(r"data: .*\n\n"))[0])) == {"r0", "r1", "r2"}
    assert set(json.loads(re.findall(r"data: (.*)", group.until(r"data: .*\n\n"))[0])) == {"r1", "r2"}
    runs[2].log([{"x": 1.0, "_step": 0}])
    for stream in (whole, group):
        (told,) = re.findall(r"data: (.*)", stream.until(r"(?s)data: .*data: .*\n\n"))[1:]
        assert set(json.loads(told)) == {"r2"}
    ui_seed.SeededRun(served.store, "told", "r9", time.time())
    assert '"r9"' in whole.until('"r9":')
    whole.close()
    group.close()


def test_a_quiet_stream_beats_and_ends_after_its_time(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that silence is filled with beats that carry the server's time, and that a stream ends so logins count anew."""
    monkeypatch.setattr(live, "_BEAT", 0.05)
    monkeypatch.setattr(live, "_LIFE", 0.5)
    stream = Stream(served, "/api/ui/local/quiet/events")
    text = stream.until(r"event: beat\ndata: {}\n\n")
    assert abs(float(re.findall(r"id: ([\d.]+)", text)[0]) - time.time()) < 5
    assert "cache-control: no-store" in text.lower()
    stream.until(r"\r\n0\r\n\r\n")
    stream.close()


def test_clients_that_do_not_read_hold_back_nobody(served: Any, http: Any) -> None:
    """Proves that 40 streams nobody reads do not delay another page's updates, and that all share one look at the store."""
    run = ui_seed.SeededRun(served.store, "slow", "r1", time.time())
    run.begin()
    looks = 0
    before = live.Watched.versions

    def counted(watched: live.Watched, store: Any) -> dict[str, int]:
        nonlocal looks
        looks += watched.project == "slow"
        return before(watched, store)

    live.Watched.versions = counted  # type: ignore[method-assign]
    idle = [Stream(served, "/api/ui/local/slow/events?run=r1", receive_buffer=1024) for _ in range(40)]
    try:
        reader = Stream(served, "/api/ui/local/slow/events?run=r1")
        reader.until("data: ")
        began, looked = time.monotonic(), looks
        for step in range(3):
            run.log([{"x": float(step), "_step": step}])
            version = served.store.get_run_by_pk(run.pk).version
            reader.until(f'"r1":{version}')
        elapsed = time.monotonic() - began
        assert elapsed < 4.5
        assert looks - looked <= elapsed / live._INTERVAL + 2, "one look per interval for all 41 pages"
        assert http.get("/api/ui/projects").elapsed.total_seconds() < 2
        reader.close()
    finally:
        live.Watched.versions = before  # type: ignore[method-assign]
        for stream in idle:
            stream.close()


def test_too_many_streams_are_refused_and_free_again_when_closed(
    served: Any, http: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that the number of streams is bounded, says so with a 503, and that closed ones stop counting and watching."""
    monkeypatch.setattr(live, "_MAX_STREAMS", 3)
    deadline = time.monotonic() + 60
    streams = []
    while len(streams) < 3:  # those of the tests before may still be closing
        stream = Stream(served, "/api/ui/local/bound/events")
        if " 200 " in stream.until(r"\r\n\r\n"):
            streams.append(stream)
        else:
            stream.close()
            assert time.monotonic() < deadline, "older streams did not end within 60 s"
            time.sleep(0.02)
    refused = http.get("/api/ui/local/bound/events")
    assert refused.status_code == 503
    assert "not live" in refused.json()["errors"][0]["message"]
    for stream in streams:
        stream.close()
    while True:
        again = Stream(served, "/api/ui/local/bound/events")
        status = again.until(r"\r\n\r\n")
        again.close()
        if " 200 " in status:
            break
        assert time.monotonic() < deadline, "closed streams still counted after 10 s"
        time.sleep(0.02)


def test_a_stream_survives_a_database_that_is_away(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a failing look at the store is tried again, and that the stream goes on."""
    run = ui_seed.SeededRun(served.store, "flaky", "r1", time.time())
    failed = threading.Event()
    before = live.Watched.versions

    def flaky(watched: live.Watched, store: Any) -> dict[str, int]:
        if watched.project == "flaky" and not failed.is_set():
            failed.set()
            raise OSError("the database is away")
        return before(watched, store)

    monkeypatch.setattr(live.Watched, "versions", flaky)
    stream = Stream(served, "/api/ui/local/flaky/events")
    assert run.run_id in stream.until('"r1":')
    assert failed.is_set()
    stream.close()
