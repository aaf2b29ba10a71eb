"""Resuming: which run goes on, where, and with what; with a server, without one, and after SIGKILL."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wbdist
from wbdist.errors import JobAlreadyRunningError
from wbdist.run import lifecycle

KILLED = """
import os, signal, sys, wbdist
run = wbdist.init(project="p", {arguments}, config={{"lr": 0.1, "kept": 1}}, settings={{"silent": True}})
print(run.id, run.step, run.resumed, flush=True)
for i in range({first}, {last}):
    run.log({{"i": i}}, step=i)
    print("line", i)
run.summary["best"] = 7
{end}
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(params=["online", "offline"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, embedded: Path) -> str:
    del embedded
    monkeypatch.setenv("WBDIST_MODE", request.param)
    return str(request.param)


def steps_of(path: str) -> list[int]:
    return [row["_step"] for row in wbdist.Api().run(path).scan_history()]


def test_resume_true_continues_a_killed_run(mode: str, script: Callable[..., Any], tmp_path: Path) -> None:
    """Proves that a SIGKILLed run goes on in the next process of its directory: same id, the step behind its last row before
    any log, its config and summary; and that the server then shows every row once, its own and the unshipped ones.
    """
    killed = script(KILLED.format(arguments="resume=True", first=0, last=50, end=KILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_id = killed.stdout.split()[0]
    assert json.loads((tmp_path / "wandb" / "wandb-resume.json").read_text())["run_id"] == run_id
    run = wbdist.init(project="p", resume=True, config={"lr": 0.5, "new": 2})
    assert (run.id, run.step, run.starting_step, run.resumed, run.attempt) == (run_id, 50, 50, True, 2)
    assert run.config.as_dict() == {"lr": 0.5, "kept": 1, "new": 2}
    assert (run.summary["best"], run.summary["i"]) == (7, 49)
    before = run.position().runtime
    for i in range(50, 60):
        run.log({"i": i})
    run.finish()
    assert before > 0
    assert not (tmp_path / "wandb" / "wandb-resume.json").exists()
    if mode == "offline":
        sync(script)
    found = wbdist.Api().run(f"p/{run_id}")
    rows = list(found.scan_history())
    assert [(row["_step"], row["i"]) for row in rows] == [(i, i) for i in range(60)]
    assert [row["_runtime"] for row in rows] == sorted(row["_runtime"] for row in rows)
    assert (found.state, found.config, found.summary["best"]) == ("finished", {"lr": 0.5, "kept": 1, "new": 2}, 7)
    assert [attempt.rows_live for attempt in found.attempts()] == [50, 10]


def sync(script: Callable[..., Any], *arguments: str) -> str:
    """Runs `wbdist sync`; what it printed."""
    done = script("import sys; from wbdist.cli import main; main()", "sync", *arguments, WBDIST_MODE="online")
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_the_words_of_resume(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the table of resume words: exists or not, id given or not, and that a refusal creates nothing."""
    del mode
    with pytest.raises(wbdist.UsageError, match=r"'gone' does not exist .*allow"):
        wbdist.init(project="p", id="gone", resume="must")
    with pytest.raises(wbdist.UsageError, match="does not exist"):
        wbdist.init(project="p", resume="gone")
    with pytest.raises(wbdist.UsageError, match="needs the id"):
        wbdist.init(project="p", resume="must")
    assert lifecycle.active_runs() == []
    with wbdist.init(project="p", id="a b/c", resume="allow") as run:
        assert (run.id, run.resumed, run.step) == ("a-b-c", False, 0)
        run.log({"i": 0})
    for given in ({"id": "a b/c", "resume": "must"}, {"id": "a-b-c", "resume": "allow"}, {"resume": "a b/c"}):
        with wbdist.init(project="p", **given) as run:
            assert (run.id, run.resumed) == ("a-b-c", True)
            run.log({"i": run.step})
    assert run.step == 4
    with pytest.raises(wbdist.UsageError, match=r"'a-b-c' exists in .*never"):
        wbdist.init(project="p", id="a b/c", resume="never")
    with pytest.raises(wbdist.UsageError, match="exists already"):
        wbdist.init(project="p", id="a b/c")
    with wbdist.init(project="p", resume="allow") as run:
        assert not run.resumed
    monkeypatch.setenv("WANDB_RUN_ID", "a b/c")
    monkeypatch.setenv("WANDB_RESUME", "must")
    with wbdist.init(project="p") as run:
        assert (run.id, run.step) == ("a-b-c", 4)


def test_names_and_notes_stay_unless_given(mode: str, script: Callable[..., Any]) -> None:
    """Proves W&B's rules: name, tags, notes, group and job type stay, unless a resuming init gives others."""
    first = {"name": "first", "notes": "why", "tags": ["a"], "group": "g", "job_type": "train"}
    with wbdist.init(project="p", id="x", **first) as run:
        run.log({"i": 0})
    with wbdist.init(project="p", id="x", resume="must") as run:
        assert (run.name, run.notes, run.tags) == ("first", "why", ("a",))
    with wbdist.init(project="p", id="x", resume="must", notes="new", tags=["b"]) as run:
        run.log({"i": 1})
    if mode == "offline":
        sync(script)
    found = wbdist.Api().run("p/x")
    assert (found.name, found.notes, found.tags, found.group, found.job_type) == ("first", "new", ["b"], "g", "train")


@pytest.mark.usefixtures("offline")
def test_the_file_of_resume_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that the file is written, kept after a failure, gone after success and after another run, ignored and said to be
    when it is damaged or another project's, and that an explicit id wins over it."""
    path = tmp_path / "wandb" / "wandb-resume.json"
    run = wbdist.init(project="p", resume=True)
    assert json.loads(path.read_text())["run_id"] == run.id
    run.finish(1)
    assert path.exists()
    with wbdist.init(project="other", resume="auto") as other:
        assert other.id != run.id
        assert "not continued" in capsys.readouterr().err
    wbdist.init(project="p", id="mine", resume=True).finish(1)
    with wbdist.init(project="p", id="mine2", resume=True) as chosen:
        assert chosen.id == "mine2"
    assert not path.exists()
    path.write_text("{")
    capsys.readouterr()
    with wbdist.init(project="p", resume=True) as fresh:
        assert not fresh.resumed
        assert f"{path} does not say which run to continue" in capsys.readouterr().err
    wbdist.init(project="p", resume=True).finish(1)
    wbdist.init(project="p").finish()
    assert not path.exists()


@pytest.mark.usefixtures("offline")
def test_two_live_writers_are_refused(script: Callable[..., Any]) -> None:
    """Proves that a run that a live process of this machine writes is not resumed by any word: the
    script ends with 69 and one line that says who writes."""
    run = wbdist.init(project="p", id="x")
    source = "import wbdist; wbdist.init(project='p', id='x', {})"
    for arguments in ("resume='allow'", "resume='must'", "resume=True", "", "resume_from='x?_step=0'"):
        second = script(source.format(arguments).replace("id='x', resume_from", "resume_from"))
        assert second.returncode == 69
        assert f"wbdist: run 'x' is being written by process {lifecycle.os.getpid()}" in second.stderr
        assert "Traceback" not in second.stderr
    run.finish()
    with wbdist.init(project="p", id="x", resume="must") as again:
        assert again.attempt == 2
    assert JobAlreadyRunningError.exit_code == 69


def test_what_a_dead_machine_left_is_found_on_the_server(
    embedded: Path, script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Proves that a run goes on from the server alone when its journals are not here."""
    del embedded
    with wbdist.init(project="p", id="x", config={"a": 1}) as run:
        for i in range(5):
            run.log({"i": i})
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    with wbdist.init(project="p", id="x", resume="must", config={"b": 2}) as run:
        assert (run.step, run.attempt, run.summary["i"]) == (5, 2, 4)
        assert run.config.as_dict() == {"a": 1, "b": 2}
        run.log({"i": 5})
    assert steps_of("p/x") == list(range(6))


def test_an_online_run_takes_its_offline_segments_along(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that resuming online what was begun offline ships the earlier segments, too."""
    del embedded
    monkeypatch.setenv("WBDIST_MODE", "offline")
    for _ in range(2):
        with wbdist.init(project="p", id="x", resume="allow") as run:
            run.log({"i": run.step})
    monkeypatch.setenv("WBDIST_MODE", "online")
    with wbdist.init(project="p", id="x", resume="must") as run:
        run.log({"i": run.step})
    assert steps_of("p/x") == [0, 1, 2]


def test_journals_that_know_more_than_the_server(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that an online run goes on behind an offline segment that came after what the server has."""
    del embedded
    for mode in ("online", "offline", "online"):
        monkeypatch.setenv("WBDIST_MODE", mode)
        with wbdist.init(project="p", id="x", resume="allow") as run:
            for _ in range(2):
                run.log({"i": run.step})
    assert (run.attempt, run.starting_step) == (3, 4)
    assert steps_of("p/x") == list(range(6))
