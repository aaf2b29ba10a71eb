"""An offline run that goes on with a run of which its machine has no journals: its rows go behind what the server has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import wbdist
from wbdist.run import backend
from wbdist.run.journal import JournalReader, find_journals
from wbdist.run.shipper.oneshot import Synced, Wanted, ship
from wbdist.run.shipper.remote import Remote

QUIET = {"console": "off", "x_disable_stats": True, "silent": True}


def log(values: range, **arguments: Any) -> wbdist.Run:
    with wbdist.init(project="p", id="x", resume="allow", settings=QUIET, **arguments) as run:
        for i in values:
            run.log({"i": i})
        return run


@pytest.fixture
def sync(embedded: Path) -> Any:
    """Sends all journals of a machine, in one go."""

    def send(machine: Path, wanted: Wanted | None = None) -> list[Synced]:
        key = (embedded / "admin.key").read_text().strip()
        url = str(backend.running(embedded))
        return list(
            ship(
                find_journals(machine / "wandb" if machine.is_dir() else machine),
                lambda _: Remote(url, key),
                30,
                logging.getLogger("test"),
                wanted,
            )
        )

    return send


def rows() -> list[tuple[int, int]]:
    return [(row["_step"], row["i"]) for row in wbdist.Api().run("p/x").scan_history()]


def test_rows_go_behind_what_the_server_has(
    embedded: Path, own_directory: Path, sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that two offline segments on a machine without journals follow the online history in their order, each as an
    attempt of its own with steps that go on, that steps given by the user beyond it are kept, that alerts and files come along,
    and that sending all of it again changes nothing."""
    log(range(5), config={"a": 1})
    monkeypatch.setenv("WBDIST_MODE", "offline")
    away, far = own_directory / "away", own_directory / "far"
    away.mkdir()
    far.mkdir()
    (own_directory / "note.txt").write_text("from away")
    with wbdist.init(project="p", id="x", resume="allow", settings=QUIET, dir=away, config={"b": 2}) as first:
        assert (first.step, first.resumed) == (0, False)
        first.log({"i": 5})
        first.alert("away", "text")
        first.save("note.txt")
        first.log({"i": 6})
    second = log(range(7, 9), dir=away)
    assert (second.starting_step, second.resumed) == (2, True)
    late = next(path for path in find_journals(away / "wandb") if JournalReader.open(path).header.attempt == 2)
    [refused] = sync(late)
    assert (refused.outcome, "first attempt" in refused.error) == ("failed", True)
    assert [result.outcome for result in sync(away)] == ["complete", "complete"]
    assert rows() == [(i, i) for i in range(9)]
    with wbdist.init(project="p", id="x", resume="allow", settings=QUIET, dir=far) as run:
        run.log({"i": 100}, step=100)
    assert [result.outcome for result in sync(far)] == ["complete"]
    for machine in (away, far, away):
        assert all(result.outcome != "failed" for result in sync(machine))
        assert rows() == [(i, i) for i in range(9)] + [(100, 100)]
    found = wbdist.Api().run("p/x")
    assert (found.state, found.config, found.summary["i"]) == ("finished", {"a": 1, "b": 2}, 100)
    assert [(one.attempt, one.rows, one.rows_live) for one in found.attempts()] == [(1, 5, 5), (2, 2, 2), (3, 2, 2), (4, 1, 1)]
    assert [(alert.title, alert.step) for alert in found.alerts()] == [("away", 6)]
    with found.file("note.txt").download(root=str(own_directory / "back")) as file:
        assert file.read() == b"from away"


def test_a_run_that_is_being_written_is_not_taken_away(
    embedded: Path, own_directory: Path, sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that such rows wait, and say so, while somebody writes the run; afterwards they go behind what he wrote."""
    monkeypatch.setenv("WBDIST_MODE", "offline")
    (own_directory / "away").mkdir()
    log(range(10, 12), dir=own_directory / "away")
    monkeypatch.setenv("WBDIST_MODE", "online")
    with wbdist.init(project="p", id="x", settings=QUIET) as run:
        run.log({"i": 0})
        assert run.flush(30)
        [refused] = sync(own_directory / "away")
        assert (refused.outcome, "is being written now" in refused.error) == ("failed", True)
        run.log({"i": 1})
    [sent] = sync(own_directory / "away")
    assert sent.outcome == "complete"
    assert rows() == [(0, 0), (1, 1), (2, 10), (3, 11)]


def test_appending_by_hand(embedded: Path, own_directory: Path, sync: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that an offline run of an id which the server has, made without `resume`, goes behind with `append`, once, with
    its tags renamed where that is asked."""
    log(range(3), tags=["first"])
    monkeypatch.setenv("WBDIST_MODE", "offline")
    away = own_directory / "away"
    away.mkdir()
    with wbdist.init(project="p", id="x", settings=QUIET, dir=away, tags=["night", "b"]) as run:
        for i in (3, 4):
            run.log({"i": i})
    [sent] = sync(away, Wanted(append=True, tags={"night": "day"}))
    assert sent.outcome == "complete", sent
    assert sorted(wbdist.Api().run("p/x").tags) == ["b", "day"]
    [again] = sync(away, Wanted(append=True, tags={"night": "day"}))
    assert again.outcome == "complete"
    assert rows() == [(i, i) for i in range(5)]
    assert len(wbdist.Api().run("p/x").attempts()) == 2


def test_a_run_that_nobody_has_begins(embedded: Path, own_directory: Path, sync: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that resume="allow" offline is a plain start where the server has no such run."""
    wbdist.Api()
    (own_directory / "away").mkdir()
    monkeypatch.setenv("WBDIST_MODE", "offline")
    with wbdist.init(project="p", id="fresh", resume="allow", settings=QUIET, dir=own_directory / "away") as run:
        run.log({"i": 0})
    [sent] = sync(own_directory / "away")
    assert sent.outcome == "complete"
    assert [one.attempt for one in wbdist.Api().run("p/fresh").attempts()] == [1]
