"""`wbdist server` as a process: one per data directory, its files, its port, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[2]


def cli(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wbdist.cli.server", *(str(part) for part in arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def test_what_a_running_server_leaves_to_find_it_by(server: Any) -> None:
    """Proves server.json, the port file, modes, `key` alone on stdout, `status`, and /healthz."""
    facts = json.loads((server.data_dir / "server.json").read_text())
    assert facts["url"] == server.url
    assert facts["pid"] == server.process.pid
    assert abs(facts["started_at"] - time.time()) < 600
    assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700
    assert cli("key", "--data-dir", server.data_dir).stdout == server.key + "\n"
    assert json.loads(cli("key", "--data-dir", server.data_dir, "--json").stdout) == {"key": server.key}
    status = cli("status", "--data-dir", server.data_dir)
    assert status.returncode == 0
    assert server.url in status.stdout
    health = requests.get(server.url + "/healthz", timeout=10).json()
    assert (health["ok"], health["name"], health["version"]) == (True, "wbdist", facts["version"])


def test_a_second_server_is_refused_with_the_first_ones_address(server: Any) -> None:
    """Proves that one data directory has one server, and that the refusal leaves the first one alone."""
    second = cli("--data-dir", server.data_dir, "--port", 0)
    assert second.returncode == 69
    assert server.url in second.stderr
    assert "Traceback" not in second.stderr
    assert requests.get(server.url + "/healthz", timeout=10).status_code == 200
    assert json.loads((server.data_dir / "server.json").read_text())["url"] == server.url


def test_a_taken_port_leads_to_the_next_free_one(server: Any, tmp_path: Path) -> None:
    """Proves that the port is stepped over and the new one is printed; then that SIGTERM ends it within seconds."""
    log = (tmp_path / "log").open("w+")
    command = [
        sys.executable,
        "-m",
        "wbdist.cli.server",
        "--data-dir",
        tmp_path / "d",
        "--port",
        server.port,
        "--port-file",
        tmp_path / "url",
    ]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "url").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        url = (tmp_path / "url").read_text().strip()
        assert int(url.rpartition(":")[2]) > server.port
        assert requests.get(url + "/healthz", timeout=10).status_code == 200
        # A client that hangs in the middle of a request must not hold up the end.
        hanging = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        hanging.sendall(b"POST /graphql HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        started = time.monotonic()
        stopped = cli("stop", "--data-dir", tmp_path / "d", "--json")
        assert json.loads(stopped.stdout)["stopped"] is True, stopped
        assert time.monotonic() - started < 60
        assert process.wait(60) == 0
        hanging.close()
    finally:
        process.kill()
        process.wait(10)
        log.seek(0)
        said = log.read()
        log.close()
    assert f"port {server.port} is taken; using {url.rpartition(':')[2]}" in said
    assert "Traceback" not in said
    assert not (tmp_path / "d" / "server.json").exists()
    nobody = cli("status", "--data-dir", tmp_path / "d", "--json")
    assert (nobody.returncode, json.loads(nobody.stdout)["running"]) == (3, False)
    assert cli("stop", "--data-dir", tmp_path / "d").returncode == 0


def test_ctrl_c_and_stale_facts(tmp_path: Path) -> None:
    """Proves that SIGINT stops cleanly without a traceback, and that a killed server's files fool nobody."""
    data = tmp_path / "d"
    log = tmp_path / "log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "wbdist.cli.server", "--data-dir", data, "--port", "0", "--port-file", tmp_path / "url"],
                cwd=ROOT, stdout=output, stderr=output,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (tmp_path / "url").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / "url").unlink()
        return process

    first = start()
    first.kill()
    first.wait(10)
    assert (data / "server.json").exists(), "SIGKILL leaves it"
    assert cli("status", "--data-dir", data).returncode == 3
    assert cli("stop", "--data-dir", data).returncode == 0
    second = start()
    os.kill(second.pid, signal.SIGINT)
    assert second.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """Proves clear one-line refusals with the exit code of bad input."""
    for arguments, word in (
        (("--files", "s3://bucket/x"), "object stores are not built yet"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--host", "203.0.113.7"), "cannot listen"),
    ):
        done = cli("--data-dir", tmp_path / "d", *arguments)
        assert (done.returncode, word in done.stderr) == (65, True), done
        assert "Traceback" not in done.stderr
    no_key = cli("key", "--data-dir", tmp_path / "nothing")
    assert no_key.returncode == 65
    assert "no server was ever started" in no_key.stderr
