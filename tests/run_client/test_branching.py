"""Forks and rewinds through `init`: grammar, what is kept, what begins anew; from a server, from journals, in any state."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.seeding import shown

import wbdist
from wbdist.core import branch
from wbdist.run import lifecycle
from wbdist.run.journal import JournalReader
from wbdist.run.reader import RunNotFoundError


@pytest.fixture(params=["online", "offline"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, embedded: Path) -> str:
    del embedded
    monkeypatch.setenv("WBDIST_MODE", request.param)
    return str(request.param)


@pytest.fixture
def upload(mode: str, script: Callable[..., Any]) -> Callable[[], str]:
    """Brings offline runs to the server."""

    def run() -> str:
        if mode == "online":
            return ""
        done = script("from wbdist.cli import main; main()", "sync", WBDIST_MODE="online")
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    return run


def make(run_id: str, rows: int, **arguments: Any) -> None:
    with wbdist.init(project="p", id=run_id, config={"kept": 1, "lr": 0.1}, **arguments) as run:
        print("an old line")
        for i in range(rows):
            run.log({"i": i, "old": -i})


@pytest.mark.parametrize(
    ("text", "source", "step"),
    [("abc?_step=0", "abc", 0), ("abc?_step=2.9", "abc", 2), ("a:3?_step=1e2", "a:3", 100), ("x-1?_step=200", "x-1", 200)],
)
def test_points_of_a_run(text: str, source: str, step: int) -> None:
    """Proves the grammar: a number may be whole or not, and the source may be an immutable id."""
    assert branch.parse(text) == branch.BranchPoint(source, step)


@pytest.mark.parametrize(
    "text",
    [
        *("abc", "abc?", "abc?_step", "abc?_step=", "?_step=1", "abc?_step=-5", "abc?_step=x", "abc?_step=nan", "abc?epoch=1"),
        *("abc?_step=1&x=2", "e/p/abc?_step=1", "abc?_step=1#f", "abc?_step=1?_step=2", "abc?_step=1e999", "abc?_step= 1"),
    ],
)
@pytest.mark.parametrize("argument", ["fork_from", "resume_from"])
@pytest.mark.usefixtures("offline")
def test_what_is_no_point_of_a_run(argument: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that each violation is a ValueError and a UsageError, quotes what was given, what is expected, and an example."""
    for given in ({argument: text}, {}):
        if not given:
            monkeypatch.setenv(f"WANDB_{argument.upper()}", text)
        with pytest.raises(ValueError, match=argument) as error:
            wbdist.init(project="p", **given)
        assert isinstance(error.value, wbdist.UsageError)
        for part in (repr(text), "<run id>?_step=<number>", branch.EXAMPLE):
            assert part in str(error.value)
    assert lifecycle.active_runs() == []


@pytest.mark.usefixtures("offline")
def test_what_excludes_each_other() -> None:
    """Proves that two of resume, fork_from and resume_from are refused, and ids that contradict them."""
    point = "abc?_step=1"
    for given in (
        {"resume": "allow", "fork_from": point},
        {"resume": True, "resume_from": point},
        {"fork_from": point, "resume_from": point},
    ):
        with pytest.raises(ValueError, match="at most one of"):
            wbdist.init(project="p", **given)
    with pytest.raises(ValueError, match="name the same run"):
        wbdist.init(project="p", id="abc", fork_from=point)
    with pytest.raises(ValueError, match="names another"):
        wbdist.init(project="p", id="other", resume_from=point)
    with pytest.raises(ValueError, match="names one run"):
        wbdist.init(project="p", id="other", resume="abc")


def test_a_fork(mode: str, upload: Callable[[], str]) -> None:
    """Proves that a fork shows the source's rows up to the step and its own behind it, inherits config, begins console and
    name anew, recomputes the summary, leaves the source as it was, and that forks can be forked.
    """
    make("src", 10, name="source", tags=["t"])
    with wbdist.init(project="p", fork_from="src?_step=4", config={"lr": 0.5, "new": 2}) as run:
        assert (run.step, run.starting_step, run.resumed, run.attempt) == (5, 5, False, 1)
        assert run.id != "src"
        assert (run.summary["i"], run.summary["old"]) == (4, -4)
        assert run.config.as_dict() == {"kept": 1, "lr": 0.5, "new": 2}
        for i in range(3):
            run.log({"i": 100 + i})
    with wbdist.init(project="p", id="deep", fork_from=f"{run.id}?_step=2.9") as deep:
        assert (deep.step, deep.summary["i"]) == (3, 2)
        deep.log({"i": 200})
    upload()
    api = wbdist.Api()
    found = api.run(f"p/{run.id}")
    assert shown(f"p/{run.id}", "i") == [(i, i) for i in range(5)] + [(5 + i, 100 + i) for i in range(3)]
    assert (found.summary["i"], found.summary["old"], found.config) == (102, -4, {"kept": 1, "lr": 0.5, "new": 2})
    assert (found.name == "source", found.tags, found.state) == (False, [], "finished")
    assert shown("p/deep", "i") == [(0, 0), (1, 1), (2, 2), (3, 200)]
    source = api.run("p/src")
    assert shown("p/src", "i") == [(i, i) for i in range(10)]
    assert (source.name, source.state, source.summary["i"], len(source.attempts())) == ("source", "finished", 9, 1)


def test_a_rewind(mode: str, upload: Callable[[], str]) -> None:
    """Proves that a rewound run keeps its id, name and rows up to the step, loses what came later from view and summary, and
    that each incarnation can still be forked and rewound to by its immutable id."""
    make("src", 10, name="source", tags=["t"], notes="why")
    with wbdist.init(project="p", resume_from="src?_step=4", config={"lr": 0.5}) as run:
        assert (run.id, run.step, run.resumed, run.attempt) == ("src", 5, False, 2)
        assert (run.summary["i"], run.config.as_dict()) == (4, {"kept": 1, "lr": 0.5})
        run.log({"i": 100})
    upload()
    found = wbdist.Api().run("p/src")
    assert shown("p/src", "i") == [(i, i) for i in range(5)] + [(5, 100)]
    assert (found.summary["i"], found.summary["old"]) == (100, -4)
    assert (found.name, found.tags, found.notes, found.state) == ("source", ["t"], "why", "finished")
    assert shown("local/p/src:1", "i") == shown("p/src:1", "i") == [(i, i) for i in range(10)]
    assert wbdist.Api({"project": "p"}).run("src:1").path == ["local", "p", "src:1"]
    with pytest.raises(RunNotFoundError, match="local/p/src:9 nor p/src/9"):
        shown("p/src:9", "i")
    with wbdist.init(project="p", resume_from="src?_step=2") as run:
        assert (run.step, run.attempt) == (3, 3)
    with wbdist.init(project="p", fork_from="src:1?_step=8", id="old") as fork:
        assert (fork.step, fork.summary["i"]) == (9, 8)
        fork.log({"i": 300})
    with wbdist.init(project="p", id="src", resume_from="src:1?_step=6") as run:
        assert (run.step, run.attempt, run.summary["i"]) == (7, 4, 6)
    upload()
    assert shown("p/old", "i") == [(i, i) for i in range(9)] + [(9, 300)]
    assert shown("p/src", "i") == [(i, i) for i in range(7)]
    assert shown("local/p/src:2", "i") == [(i, i) for i in range(5)] + [(5, 100)]


def test_steps_that_are_not_there(mode: str) -> None:
    """Proves that unknown sources and steps beyond the end are refused before anything is opened."""
    make("src", 10)
    for argument in ("fork_from", "resume_from"):
        with pytest.raises(wbdist.UsageError, match=r"ends with step 9.*from 0 to 9"):
            wbdist.init(project="p", **{argument: "src?_step=10"})
        if mode == "online":
            with pytest.raises(wbdist.UsageError, match="'gone' does not exist"):
                wbdist.init(project="p", **{argument: "gone?_step=0"})
    assert lifecycle.active_runs() == []


def test_a_killed_source(mode: str, upload: Callable[[], str], script: Callable[..., Any]) -> None:
    """Proves that a SIGKILLed run can be forked and rewound, with rows that had not reached the server."""
    killed = script(
        "import os, signal, wbdist\n"
        "run = wbdist.init(project='p', id='src')\n"
        "for i in range(20): run.log({'i': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert killed.returncode == -signal.SIGKILL
    with wbdist.init(project="p", id="fork", fork_from="src?_step=19") as fork:
        assert fork.step == 20
        fork.log({"i": 20})
    with wbdist.init(project="p", resume_from="src?_step=9") as run:
        run.log({"i": 10})
    upload()
    assert shown("p/fork", "i") == [(i, i) for i in range(21)]
    assert shown("p/src", "i") == [(i, i) for i in range(11)]


def test_branches_of_what_only_the_server_knows(
    embedded: Path, script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Proves that offline, far from the source's journals, both are accepted, and the server finds the cut at sync; once."""
    del embedded
    make("src", 10)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "far"))
    with wbdist.init(project="p", id="fork", fork_from="src?_step=4", mode="offline") as fork:
        assert fork.step == 5
        fork.log({"i": 50})
    with wbdist.init(project="p", resume_from="src?_step=6", mode="offline") as run:
        assert (run.id, run.step) == ("src", 7)
        run.log({"i": 70})
    (path,) = (tmp_path / "far" / "wandb").glob("offline-run-*-src/*.wbdj")
    with JournalReader.open(path) as reader:
        assert reader.header.at_step == 6
    for _ in range(2):
        done = script("from wbdist.cli import main; main()", "sync", str(tmp_path / "far" / "wandb"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert shown("p/fork", "i") == [(i, i) for i in range(5)] + [(5, 50)]
        assert shown("p/src", "i") == [(i, i) for i in range(7)] + [(7, 70)]


def test_a_source_that_goes_on(mode: str, upload: Callable[[], str]) -> None:
    """Proves that a fork of a run that is still being written does not get its later rows."""
    source = wbdist.init(project="p", id="src")
    for i in range(5):
        source.log({"i": i})
    if mode == "online":
        assert source.flush(20)
    with wbdist.init(project="p", id="fork", fork_from="src?_step=4", reinit="create_new") as fork:
        for i in range(5, 10):
            source.log({"i": i})
        fork.log({"i": 500})
    source.finish()
    upload()
    assert shown("p/fork", "i") == [(i, i) for i in range(5)] + [(5, 500)]
    assert shown("p/src", "i") == [(i, i) for i in range(10)]
