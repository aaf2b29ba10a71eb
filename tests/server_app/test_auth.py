"""Keys, sessions and their limits, against a real server."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from wbdist.errors import UsageError
from wbdist.server.auth import Auth, User
from wbdist.server.keys import digest, open_key_ring
from wbdist.server.settings import ServerSettings

VIEWER = {"query": "query Viewer { viewer { username entity } }"}


def test_keys_at_rest(tmp_path: Path) -> None:
    """Proves the key's form, the files' modes, that auth.json has hashes only, and that deleting admin.key replaces the key."""
    ring = open_key_ring(tmp_path, "local")
    key = (tmp_path / "admin.key").read_text().strip()
    assert re.fullmatch("[A-Za-z0-9]{40,}", key), "W&B's client refuses other forms"
    for name in ("admin.key", "auth.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert key not in (tmp_path / "auth.json").read_text()
    assert open_key_ring(tmp_path, "local") == ring
    (tmp_path / "admin.key").unlink()
    renewed = open_key_ring(tmp_path, "local")
    assert renewed.secret == ring.secret
    assert renewed.keys[0].sha256 == digest((tmp_path / "admin.key").read_text().strip()) != ring.keys[0].sha256


@pytest.mark.parametrize(
    ("name", "content"), [("auth.json", "{"), ("auth.json", '{"secret": 1}'), ("admin.key", "short"), ("admin.key", "x y" * 20)]
)
def test_broken_key_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    """Proves that a damaged key file stops the start with its name, instead of silently making new keys."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=name):
        open_key_ring(tmp_path, "local")


def test_programs_need_a_key(server: Any) -> None:
    """Proves Basic and Bearer with the right key, and 401 in W&B's error form for everything else."""
    url = server.url + "/graphql"
    for headers in (
        {},
        {"Authorization": "Bearer " + "x" * 40},
        {"Authorization": "Basic !"},
        {"Authorization": "Digest x"},
        {"Authorization": ""},
    ):
        answer = requests.post(url, json=VIEWER, headers=headers, timeout=10)
        assert answer.status_code == 401
        assert answer.json()["errors"][0]["message"]
    assert requests.post(url, json=VIEWER, auth=("root", server.key), timeout=10).status_code == 401
    for ok in ({"auth": ("api", server.key)}, {"headers": {"Authorization": f"Bearer {server.key}"}}):
        answer = requests.post(url, json=VIEWER, timeout=10, **ok)
        assert answer.json() == {"data": {"viewer": {"username": "admin", "entity": "local"}}}
    assert requests.post(server.url + "/files/a/b/c/file_stream", data="{}", timeout=10).status_code == 401


def test_a_browser_logs_in_once_by_a_printed_address(server: Any) -> None:
    """Proves the one-time address: it sets an HttpOnly, SameSite=Strict cookie once, and the second visitor gets nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "wbdist.cli.server", "status", "--data-dir", server.data_dir, "--json"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    import json

    address = json.loads(done.stdout)["login_url"]
    assert address.startswith(server.url)
    first, second = requests.Session(), requests.Session()
    answer = first.get(address, timeout=10, allow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert first.post(server.url + "/graphql", json=VIEWER, headers={"Origin": server.url}, timeout=10).status_code == 200
    second.get(address, timeout=10, allow_redirects=False)
    assert second.post(server.url + "/graphql", json=VIEWER, headers={"Origin": server.url}, timeout=10).status_code == 401


def test_sessions_count_only_from_our_own_pages(server: Any) -> None:
    """Proves that a stolen ride on a session fails: foreign Origin, no Origin on a change, foreign Host (DNS rebinding)."""
    session = requests.Session()
    answer = session.post(server.url + "/api/ui/login", json={"key": server.key}, headers={"Origin": server.url}, timeout=10)
    assert answer.status_code == 200
    url = server.url + "/graphql"
    assert session.post(url, json=VIEWER, headers={"Origin": server.url}, timeout=10).status_code == 200
    assert session.post(url, json=VIEWER, headers={"Origin": "http://evil.example"}, timeout=10).status_code == 401
    assert session.post(url, json=VIEWER, headers={"Origin": "null"}, timeout=10).status_code == 401
    assert session.post(url, json=VIEWER, timeout=10).status_code == 401
    rebound = {"Host": f"evil.example:{server.port}", "Origin": f"http://evil.example:{server.port}"}
    cookie = {"Cookie": "; ".join(f"{name}={value}" for name, value in session.cookies.items())}
    own = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    assert requests.post(url, json=VIEWER, headers=own | cookie, timeout=10).status_code == 200
    assert requests.post(url, json=VIEWER, headers=rebound | cookie, timeout=10).status_code == 401
    login = requests.post(server.url + "/api/ui/login", json={"key": server.key}, headers=rebound, timeout=10)
    assert login.status_code == 403
    wrong = requests.post(server.url + "/api/ui/login", json={"key": "x" * 48}, headers={"Origin": server.url}, timeout=10)
    assert wrong.status_code == 401


@pytest.mark.parametrize("page", ["//evil.example", "http://evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_a_login_never_leads_to_a_foreign_page(server: Any, page: str) -> None:
    """Proves that the address of a login cannot be used to forward elsewhere."""
    answer = requests.get(server.url + "/login/once", params={"token": "x", "next": page}, timeout=10, allow_redirects=False)
    assert answer.headers["location"] == "/"


def test_sessions_and_tokens_end(tmp_path: Path, clock: Any) -> None:
    """Proves that a session ends by time, by forging and with its key, and a token by time and use."""
    from starlette.requests import Request

    settings = ServerSettings(session_seconds=100, login_token_seconds=10)
    auth = Auth(open_key_ring(tmp_path, "local"), settings, clock)

    def visit(value: str, of: Auth = auth) -> User | None:
        headers = [(b"host", b"localhost:1"), (b"cookie", f"{of.cookie_name}={value}".encode())]
        return of.check_request(Request({"type": "http", "method": "GET", "path": "/", "headers": headers}))

    value = auth.login((tmp_path / "admin.key").read_text())
    assert value is not None
    assert visit(value) == User("admin", "local", admin=True)
    for forged in (
        "",
        ".",
        "x.y",
        value[:-2],
        value.replace(".", "!."),
        "YWRtaW46OTk5OTk5OTk5OTk5OQ." + value.partition(".")[2],
    ):
        assert visit(forged) is None
    token = auth.login_token(User("admin", "local", admin=True))
    assert auth.redeem(token)
    assert auth.redeem(token) is None
    late = auth.login_token(User("admin", "local", admin=True))
    clock.now += 11
    assert auth.redeem(late) is None
    assert visit(value) is not None
    (tmp_path / "admin.key").unlink()
    assert visit(value, Auth(open_key_ring(tmp_path, "local"), settings, clock)) is None, "its key was replaced"
    clock.now += 100
    assert visit(value) is None
