"""Runs that go to a server: the embedded one started on demand, what is read back, and servers that are away or say no."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.lingering import processes_of
from support.ports import free_port

import wbdist
from wbdist.run import backend, lifecycle
from wbdist.run.reader import RunNotFoundError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("embedded")


def test_a_run_from_init_to_the_servers_answer(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves the first online run: it starts the server, has name and page at once, and after finish the API has all of it."""
    run = wbdist.init(
        project="digits", config={"lr": 0.1, "net": {"width": 3}}, group="g", job_type="train", tags=["t"], notes="why"
    )
    assert run.name is not None
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d+", run.name)
    assert capsys.readouterr().err.count(f"run {run.name} at {run.url}") == 1
    for i in range(25):
        run.log({"loss": 1 / (i + 1), "nested": {"x": i}})
    run.log({"odd": float("nan")}, step=30)
    run.summary["best"] = 7
    print("a printed line")
    assert run.mark_preempting(timeout=20)
    assert wbdist.Api().run(run.path).state == "preempting"
    run.finish()
    assert "is complete at" in capsys.readouterr().err

    api = wbdist.Api()
    found = api.run(run.path)
    assert (found.id, found.name, found.state, found.url) == (run.id, run.name, "finished", run.url)
    assert found.config == {"lr": 0.1, "net": {"width": 3}}
    assert (found.group, found.job_type, found.tags, found.notes) == ("g", "train", ["t"], "why")
    rows = list(found.scan_history(page_size=7))
    assert [row["_step"] for row in rows] == [*range(25), 30]
    assert [row["loss"] for row in rows[:-1]] == [1 / (i + 1) for i in range(25)]
    assert rows[3]["nested.x"] == 3
    assert rows[-1]["odd"] != rows[-1]["odd"]
    assert list(found.scan_history(keys=["loss"], min_step=20, max_step=23)) == [
        {"loss": 1 / 21},
        {"loss": 1 / 22},
        {"loss": 1 / 23},
    ]
    assert (found.summary["best"], found.summary["loss"], found.lastHistoryStep) == (7, 1 / 25, 30)
    (attempt,) = found.attempts()
    assert (attempt.attempt, attempt.rows, attempt.rows_live, attempt.end_cause) == (1, 26, 26, "exit")
    assert len(found.history(samples=5, pandas=False)) == 5
    assert [set(row) for row in found.history(samples=5, keys=["loss"], pandas=False)] == [{"_step", "loss"}] * 5
    assert api.run(found.url).id == api.run(f"{run.project}/{run.id}").id == run.id
    with pytest.raises(RunNotFoundError, match="nosuchrun"):
        api.run("digits/nosuchrun")
    assert [process.pid for process in processes_of(embedded, "server", "--data-dir")]


def test_runs_are_paged_and_filtered() -> None:
    """Proves that `Api.runs` fetches lazily, keeps order, filters, and that an unknown project is empty; names count up."""
    names = []
    for i in range(5):
        with wbdist.init(project="many", group="even" if i % 2 == 0 else "odd", config={"i": i}) as run:
            names.append(str(run.name))
    api = wbdist.Api()
    runs = api.runs("many", per_page=2)
    assert len(runs) == 5
    assert [run.name for run in runs] == names
    assert [int(name.rpartition("-")[2]) for name in names] == [1, 2, 3, 4, 5]
    assert runs[4].config == {"i": 4}
    assert [run.config["i"] for run in api.runs("many", filters={"group": "even"}, order="-created_at")] == [4, 2, 0]
    assert list(api.runs("nothing-here")) == []
    with pytest.raises(wbdist.UsageError, match="project"):
        api.runs()


def test_an_id_that_exists_is_refused() -> None:
    """Proves that the same id is not silently written to again, and that nothing changed on the server."""
    with wbdist.init(project="p", id="fixed/id", name="first") as run:
        run.log({"a": 1})
    assert run.id == "fixed-id"
    with pytest.raises(wbdist.UsageError, match="exists already"):
        wbdist.init(project="p", id="fixed/id", name="second")
    assert lifecycle.active_runs() == []
    found = wbdist.Api().run("p/fixed-id")
    assert (found.name, found.state, len(list(found.scan_history()))) == ("first", "finished", 1)


def test_many_processes_start_one_server(tmp_path: Path, embedded: Path) -> None:
    """Proves that 8 ranks that init at once start exactly one embedded server, and that all their runs arrive."""
    source = (
        "import sys, wbdist\n"
        "with wbdist.init(project='p', group='ranks', settings={'silent': True}) as run:\n"
        "    run.log({'rank': int(sys.argv[1])})\n"
        "    print(run.url)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", source, str(rank)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
        for rank in range(8)
    ]
    pages = [process.communicate(timeout=60)[0].strip() for process in ranks]
    assert [process.returncode for process in ranks] == [0] * 8
    assert len({page.partition("/local")[0] for page in pages}) == 1
    assert len(processes_of(embedded, "server", "--data-dir")) == 1
    found = wbdist.Api().runs("p", filters={"group": "ranks"})
    assert sorted(run.summary["rank"] for run in found) == list(range(8))


def test_a_server_that_is_away_is_no_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that init against a dead address goes on with the journal, says so once, and finish leaves in time."""
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    began = time.monotonic()
    run = wbdist.init(project="p", settings={"finish_timeout": 0.2})
    said = capsys.readouterr().err
    assert said.count("wbdist:") == 1
    assert "training goes on" in said
    assert run.name is None
    run.log({"a": 1})
    run.finish()
    assert time.monotonic() - began < 60
    assert "wbdist sync" in capsys.readouterr().err
    with pytest.raises(wbdist.CommError):
        wbdist.init(project="p", force=True)


def test_rows_arrive_when_the_server_is_back(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a server killed during the run costs no row: they arrive when it is back, and training did not notice."""
    run = wbdist.init(project="p")
    run.log({"i": 0})
    assert run.flush(20)
    (server,) = processes_of(embedded, "server", "--data-dir")
    command, directory = server.cmdline(), server.cwd()
    server.kill()
    server.wait(10)
    began = time.monotonic()
    for i in range(1, 50):
        run.log({"i": i})
    assert time.monotonic() - began < 10  # a request that nobody answers takes 30
    port = str(run.url).split(":")[2].partition("/")[0]
    subprocess.Popen(
        [*command, "--port", port], cwd=directory, env=dict(os.environ, PYTHONPATH=str(ROOT)), start_new_session=True
    )
    run.finish()
    assert [row["i"] for row in wbdist.Api().run(run.path).scan_history()] == list(range(50))


def test_wrong_and_missing_keys_are_distinct(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves three distinct errors, none of them a hang: no key, a key that cannot be one, a key that is not accepted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with wbdist.init(project="p") as run:
        url = str(run.url).partition("/local")[0]
    monkeypatch.setenv("WANDB_BASE_URL", url)
    with pytest.raises(wbdist.AuthenticationError, match="no API key is known"):
        wbdist.init(project="p")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(wbdist.AuthenticationError, match="40 or more"):
        wbdist.init(project="p")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(wbdist.AuthenticationError, match="not accepted"):
        wbdist.init(project="p")
    assert lifecycle.active_runs() == []


def test_login_keeps_a_key_that_init_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: Path) -> None:
    """Proves that `wbdist login` checks and keeps a key in ~/.netrc (0600, other entries untouched), and init then uses it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    url = backend.embedded_url(embedded, 20)
    key = (embedded / "admin.key").read_text().strip()
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine example.org\n  login me\n  password secret\n")
    command = [sys.executable, "-m", "wbdist", "login", "-", "--host", url]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    refused = subprocess.run(command, input="y" * 40, env=env, text=True, capture_output=True, timeout=30, check=False)
    assert refused.returncode == 65
    assert "does not accept" in refused.stderr
    for _ in range(2):  # a second login replaces the first
        done = subprocess.run(
            [*command, "--relogin"], input=key, env=env, text=True, capture_output=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
    assert netrc.stat().st_mode & 0o777 == 0o600
    assert netrc.read_text().count("machine") == 2
    assert "password secret" in netrc.read_text()
    monkeypatch.setenv("WANDB_BASE_URL", url)
    with wbdist.init(project="p") as run:
        run.log({"a": 1})
    assert wbdist.Api().run(run.path).state == "finished"


def test_wbdist_runs_lists_and_shows(script: Callable[..., Any]) -> None:
    """Proves the command's table, its JSON, one run with its attempts, and an error as one line with its exit code."""
    with wbdist.init(project="p", name="shown", group="g") as run:
        run.log({"loss": 0.25})

    def runs(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "40"}
        return subprocess.run(
            [sys.executable, "-m", "wbdist", "runs", *arguments],
            env=env,
            text=True,
            capture_output=True,
            timeout=30,
            check=False,
        )

    table = runs("p", "--group", "g").stdout
    assert "shown" in table
    assert run.id in table, "names and ids are whole in a narrow terminal"
    assert "job type" not in table
    (facts,) = json.loads(runs("p", "--json").stdout)
    assert (facts["name"], facts["steps"], facts["summary"]["loss"]) == ("shown", 1, 0.25)
    one = json.loads(runs(facts["path"], "--json").stdout)
    assert [attempt["attempt"] for attempt in one["attempts"]] == [1]
    (project,) = json.loads(runs("--json").stdout)
    assert project["path"] == "local/p"
    assert runs().stdout.split()[0] == "local/p"
    assert "no runs in project typo" in runs("typo").stdout
    missing = runs("local/p/nothing")
    assert missing.returncode != 0
    assert "could not find run" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_another_directorys_server_is_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a server which has the port of ours that was killed is not taken for it: it would refuse the run."""
    with wbdist.init(project="p") as first:
        first.log({"a": 1})
    theirs = tmp_path / "wbdist-data"
    url = backend.running(theirs)
    own = tmp_path / "own"
    own.mkdir()
    (own / backend.SERVER_FILE).write_text(json.dumps({"url": url, "pid": 1}))
    assert backend.running(own) is None
    monkeypatch.setenv("WBDIST_DATA_DIR", str(own))
    with wbdist.init(project="p") as run:
        run.log({"a": 1})
    assert wbdist.Api().run(run.path).state == "finished"
    assert backend.running(own) not in {None, url}
    assert backend.running(theirs) == url


def test_no_proxy_is_asked_about_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that http_proxy of the environment never sees requests to this machine."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        caught: list[Any] = []
        thread = threading.Thread(target=lambda: caught.append(_accept(trap)))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{trap.getsockname()[1]}")
        with wbdist.init(project="p") as run:
            run.log({"a": 1})
        assert wbdist.Api().run(run.path).state == "finished"
        thread.start()
        thread.join(60)
        assert caught == [None]


def _accept(trap: socket.socket) -> Any:
    try:
        return trap.accept()
    except TimeoutError:
        return None
