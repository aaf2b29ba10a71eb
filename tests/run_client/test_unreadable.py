"""Journals whose header cannot be read: nobody goes on with a run around what it may have done last, or without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.waiting import until

import wbdist
from wbdist.errors import JobAlreadyRunningError, JournalCorruptError
from wbdist.run import unreadable
from wbdist.run.journal_format import MAGIC
from wbdist.run.local_history import LocalRun
from wbdist.run.shipper.marks import marked

QUIET = {"console": "off", "x_disable_stats": True}


def log(run_id: str, **arguments: Any) -> wbdist.Run:
    """Five rows more of a run."""
    with wbdist.init(project="p", id=run_id, settings=QUIET, **arguments) as run:
        for _ in range(5):
            run.log({"i": run.step})
    return run


def journal_of(run: wbdist.Run) -> Path:
    assert run.journal_path is not None
    return Path(run.journal_path)


def flip(path: Path, at: int = 40) -> None:
    """A bit of its header, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 2]))


def renumber(path: Path) -> None:
    """A journal of a later wbdist."""
    flip(path, len(MAGIC))


def displace(path: Path) -> None:
    """What the file system does not let us read, for root as well."""
    path.unlink()
    path.mkdir()


def blank(path: Path) -> None:
    """As a machine that lost its power leaves what it had reserved."""
    path.write_bytes(bytes(1 << 20))


def unreadables(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """What was said of journals; nothing twice."""
    said = [line for line in capsys.readouterr().err.splitlines() if ".wbdj" in line]
    assert len(said) == len(set(said))
    return set(said)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("damage", "why"),
    [(flip, "the header is incomplete or damaged"), (renumber, "upgrade it"), (displace, "Is a directory")],
)
def test_the_newest_attempt_cannot_be_read(
    own_directory: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], why: str
) -> None:
    """Proves that no word of `init` goes on with a run from the attempt before, or begins it anew, that the error names file
    and reason and nothing is made; and that it goes on from there once the file is moved away, as the error says."""
    log("x", resume="allow")
    path = journal_of(log("x", resume="allow"))
    damage(path)
    there = sorted(own_directory.glob("wandb/*run-*"))
    for words in ({"resume": word} for word in ("allow", "must", "never", True, "")):
        with pytest.raises(JournalCorruptError, match=rf"'x' cannot go on: {path}.*{why}.* \(attempt 2\).* move it out of its"):
            wbdist.init(project="p", id="x", settings=QUIET, **words)  # type: ignore[arg-type]
    with pytest.raises(JournalCorruptError, match="cannot go on"):
        wbdist.init(project="p", resume_from="x?_step=2", settings=QUIET)
    assert sorted(own_directory.glob("wandb/*run-*")) == there
    assert unreadables(capsys) == set()  # the error says it
    path.rename(own_directory / path.name)
    again = log("x", resume="must")
    assert (again.attempt, again.starting_step) == (2, 5)
    assert unreadables(capsys) == set()


@pytest.mark.usefixtures("offline")
def test_what_is_left_out_is_said(own_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a run goes on where what cannot be read is an older attempt, or holds nothing, as a fork and `restore` do
    with what is left, and that each file is said once, with the reason; other runs', feeds, and what is no run's are not."""
    (own_directory / "f").write_text("first")
    old = log("x", resume="allow")
    with wbdist.init(project="p", id="x", resume="must", settings=QUIET) as run:
        run.save("f")
        run.log({"i": 5})
    begun = journal_of(log("x", resume="must"))
    second = journal_of(log("x-y", resume="allow"))
    flip(journal_of(old))
    blank(begun)
    flip(second)
    begun.with_name("feed0.a9.wbdj").mkdir()
    shutil.copytree(second.parent, second.parent.with_name("notes-run-x"))
    capsys.readouterr()
    for attempt in (3, 4):
        again = log("x", resume="must")
        assert (again.attempt, again.starting_step) == (attempt, 6 + 5 * (attempt - 3))
    assert wbdist.restore("f", "p/x", root="here").read() == b"first"  # type: ignore[union-attr]
    assert unreadables(capsys) == {
        f"wbdist: {journal_of(old)}: the header is incomplete or damaged; what it holds is left out",
        f"wbdist: {begun} is not a wbdist journal: it does not begin with {MAGIC!r}; it holds nothing",
    }
    third = journal_of(log("z", resume="allow"))
    flip(third)
    for _ in range(2):
        assert wbdist.restore("f", "p/z", root="here") is None
    assert unreadables(capsys) == {f"wbdist: {third}: the header is incomplete or damaged; what it holds is left out"}
    with wbdist.init(project="p", fork_from="x-y?_step=3", id="fork", settings=QUIET):
        assert unreadables(capsys) == {f"wbdist: {second}: the header is incomplete or damaged; what it holds is left out"}


@pytest.mark.usefixtures("offline")
def test_a_living_writer(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a journal that cannot be read yet, or any more, keeps others out for as long as its writer lives."""
    with wbdist.init(project="p", id="x", settings=QUIET) as run:
        path = journal_of(run)
        flip(path)
        local = LocalRun(path.parents[1], "p", "", "x")
        assert (local.journals, [one.path for one in local.unreadable]) == ([], [path])
        unreadable.tell(run.settings, local.unreadable)
        with pytest.raises(JobAlreadyRunningError, match=f"being written by another process on this machine: {path}"):
            unreadable.refuse(run.settings, "x", local.unreadable, 0)
        assert unreadables(capsys) == set()
        flip(path)


def test_what_the_server_has_of_it(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a journal of the newest attempt which is marked as sent stops nobody: the run goes on from the server, and
    that is said. Unmarked, it may hold what the server never got."""
    del embedded
    log("x", resume="allow")
    path = journal_of(log("x", resume="must"))
    until(lambda: marked(path), "the shipper to mark the journal as sent")
    mark = path.with_name(path.name + ".shipped")
    displace(path)
    aside = mark.rename(mark.with_suffix(".aside"))
    for words in ({"resume": "must", "id": "x"}, {"resume_from": "x?_step=7"}):
        with pytest.raises(JournalCorruptError, match="cannot go on"):
            wbdist.init(project="p", settings=QUIET, **words)  # type: ignore[arg-type]
    aside.rename(mark)
    capsys.readouterr()
    again = log("x", resume="must")
    assert (again.attempt, again.starting_step) == (3, 10)
    assert unreadables(capsys) == {f"wbdist: {path} cannot be read: Is a directory; what it holds is left out"}
