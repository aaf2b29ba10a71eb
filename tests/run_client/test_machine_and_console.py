"""Facts of machine and code, and what is printed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wbdist
from wbdist.errors import DiskFullError
from wbdist.run import console, machine
from wbdist.run.journal import JournalReader, Kind, Record, find_journals

pytestmark = pytest.mark.usefixtures("offline")

Journals = Callable[[], list[list[Record]]]


def git(where: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=where, check=True, capture_output=True, text=True, timeout=90).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    repo = tmp_path / "my-repo"
    repo.mkdir()
    git(repo, "init", "-q", "-b", "main")
    git(repo, "remote", "add", "origin", "https://user:secret@example.org/me/my-repo.git")
    git(repo, "commit", "-q", "--allow-empty", "-m", "one")
    return repo


@pytest.mark.parametrize("state", ["loose", "packed", "detached", "worktree", "unborn"])
def test_git_facts_equal_gits_own(checkout: Path, tmp_path: Path, state: str) -> None:
    """Proves that commit and remote read from files are what git says, in every layout; credentials are removed."""
    where = checkout
    if state == "packed":
        git(checkout, "pack-refs", "--all")
    elif state == "detached":
        git(checkout, "checkout", "-q", "--detach")
    elif state == "worktree":
        where = tmp_path / "tree"
        git(checkout, "worktree", "add", "-q", "-b", "side", str(where))
        git(where, "commit", "-q", "--allow-empty", "-m", "two")
    elif state == "unborn":
        git(checkout, "checkout", "-q", "--orphan", "empty")
    below = where / "src" / "pkg"
    below.mkdir(parents=True)
    found = machine.git(below)
    assert found is not None
    assert found.commit == ("" if state == "unborn" else git(where, "rev-parse", "HEAD"))
    assert found.remote == "https://example.org/me/my-repo.git"
    assert machine.default_project(found, below) == f"{where.name}-src_pkg"


def test_outside_a_checkout_there_are_no_git_facts(tmp_path: Path) -> None:
    """Proves that no checkout means no facts and the project `uncategorized`, without an error."""
    assert machine.git(tmp_path) is None
    assert machine.default_project(None, tmp_path) == "uncategorized"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h/x", "https://h/x"),
        ("https://token@h/x", "https://h/x"),
        ("git@h:x.git", "git@h:x.git"),
        ("ssh://git@h/x", "ssh://git@h/x"),
        ("ssh://git:p@h/x", "ssh://git@h/x"),
    ],
)
def test_credentials_never_leave(url: str, shown: str) -> None:
    """Proves that user and password are cut from remotes, and that an ssh address stays an address."""
    assert machine.without_credentials(url) == shown


def test_the_run_says_what_it_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch, journals: Journals) -> None:
    """Proves that host, program and commit are journaled with the run, and that disable_git leaves git out."""
    monkeypatch.chdir(checkout)
    with wbdist.init(project="p", dir=checkout.parent, id="a", name="n", group="g", tags="night", settings={"host": "box"}):
        pass
    (records,) = journals()
    facts = next(record.data for record in records if record.kind is Kind.RUN)
    assert facts["commit"] == git(checkout, "rev-parse", "HEAD")
    assert (facts["display_name"], facts["group"], facts["tags"], facts["host"]) == ("n", "g", ["night"], "box")
    environment = next(record.data for record in records if record.kind is Kind.CONFIG)["set"]["_wandb"]["e"]["rank0"]
    assert environment["args"] == sys.argv[1:]
    with wbdist.init(project="p", dir=checkout.parent, id="b", settings={"disable_git": True}):
        pass
    assert "commit" not in next(record.data for record in journals()[-1] if record.kind is Kind.RUN)


def test_printed_lines_are_kept_and_still_shown(journals: Journals, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that whole lines of both streams are kept in order; of a progress bar, its last state."""
    before = sys.stdout
    run = wbdist.init(project="p", settings={"silent": True})
    print("one\ntwo", end=" ")
    print("words")
    print("to stderr", file=sys.stderr)
    for i in range(3):
        print(f"\r{i} of 3", end="")
    print()
    print("no line end", end="")
    run.finish()
    print(" after")
    (records,) = journals()
    kept = [(r.data["stream"], r.data["text"]) for r in records if r.kind is Kind.CONSOLE]
    assert kept == [
        ("stdout", "one"),
        ("stdout", "two words"),
        ("stderr", "to stderr"),
        ("stdout", "2 of 3"),
        ("stdout", "no line end"),
    ]
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo words\n\r0 of 3\r1 of 3\r2 of 3\nno line end after\n"
    assert sys.stdout is before


def test_console_off_and_two_runs() -> None:
    """Proves that `console="off"` keeps nothing, and that each open run keeps what is printed while it is open."""
    quiet = {"silent": True}
    off = wbdist.init(project="p", id="off", reinit="create_new", settings={"console": "off", **quiet})
    first = wbdist.init(project="p", id="first", reinit="create_new", settings=quiet)
    print("a")
    second = wbdist.init(project="p", id="second", reinit="create_new", settings=quiet)
    print("b")
    first.finish()
    print("c")
    second.finish()
    off.finish()
    kept = {}
    for path in find_journals("wandb"):  # by the second in which each run was opened
        with JournalReader.open(path) as reader:
            kept[reader.header.run_id] = [record.data["text"] for record in reader.read() if record.kind is Kind.CONSOLE]
    assert kept == {"first": ["a", "b"], "off": [], "second": ["b", "c"]}


def test_printing_and_logging_threads_do_not_block_each_other(journals: Journals) -> None:
    """Proves that printing in one thread and warnings from `log` in another cannot deadlock, and that no line is lost."""
    run = wbdist.init(project="p", settings={"quiet": True})
    run.log({"a": 1}, step=10)

    def printing() -> None:
        for i in range(300):
            print("line", i)

    def logging() -> None:
        for _ in range(300):
            run._warned_at = -1e9  # every dropped row is said
            run.log({"a": 1}, step=1)

    threads = [threading.Thread(target=work, daemon=True) for work in (printing, logging)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads)
    run.finish()
    (records,) = journals()
    lines = [record.data["text"] for record in records if record.kind is Kind.CONSOLE and record.data["stream"] == "stdout"]
    assert lines == [f"line {i}" for i in range(300)]


def test_import_is_light(script: Callable[..., Any]) -> None:
    """Proves that importing wbdist and logging offline loads no HTTP library, no CLI library, no torch or numpy."""
    done = script(
        """
        import sys, wbdist
        with wbdist.init(project="p", mode="offline") as run:
            run.log({"a": 1})
        heavy = ["torch", "numpy", "requests", "http.client", "click", "rich", "psutil", "asyncio", "multiprocessing"]
        print([name for name in heavy if name in sys.modules])
        """
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_directory_that_cannot_be_written_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that an unusable `dir` costs a warning, not the run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    with wbdist.init(project="p", dir=tmp_path / "file") as run:
        run.log({"a": 1})
    assert "cannot be used" in capsys.readouterr().err
    assert run.dir.startswith(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("plain", "plain"),
        ("10%\r20%\r100%", "100%"),
        ("long text\rshort", "shorttext"),
        ("abcdef\r\x1b[Kxy", "xy"),
        ("abc\b\bX", "aXc"),
        ("\x1b[31mred\x1b[0m ok", "\x1b[31mred\x1b[0m ok"),
        ("\x1b[A\x1b[2K50%|###|\x1b[1B", "50%|###|"),
        ("\x1b]0;title\x07text", "text"),
        ("ab\x1b[5Gx\x1b[1Gy", "yb  x"),
        ("bar   \r", "bar"),
    ],
)
def test_what_a_terminal_shows(printed: str, kept: str) -> None:
    """Proves that progress bars, erasing and cursor moves leave in a line what they leave on a screen, and colours stay."""
    assert console.shown(printed) == kept


def test_a_bar_of_many_updates_is_one_line() -> None:
    """Proves that a bar redrawn thousands of times is one line: its last state, with the writer's label."""
    run = wbdist.init(project="p", settings={"quiet": True, "x_label": "rank3"})
    for done in range(5000):
        print(f"\r{done:5}|{'#' * 20}", end="")
    print("\rdone", end="\n")
    run.finish()
    assert run.journal_path is not None
    with JournalReader.open(run.journal_path) as reader:
        texts = [record.data["text"] for record in reader.read() if record.kind is Kind.CONSOLE]
    assert texts == ["[rank3] done9|" + "#" * 20]


def test_print_goes_on_when_the_disk_is_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that lines that no journal can take reach the terminal, without an error, also printed in pieces: `print("a", 1)`
    in a script that had caught the full disk was a RuntimeError. The console is given back, and another run keeps all."""

    def full(*_: object, **__: object) -> None:
        raise DiskFullError("no space")

    quiet = {"quiet": True, "reinit": "create_new"}
    run, other = (wbdist.init(project="p", settings=quiet) for _ in range(2))
    kept: list[str] = []
    keep = other.journal.append
    monkeypatch.setattr(run.journal, "append", full)
    monkeypatch.setattr(
        other.journal, "append", lambda kind, data, **more: kept.append(data.get("text")) or keep(kind, data, **more)
    )
    print("unfinished", end="", file=sys.stderr)
    print("step", 1)
    print("step", 2)
    monkeypatch.undo()
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    other.finish()
    assert sorted(line for line in kept if line) == ["step 1", "step 2", "unfinished"]
    assert not isinstance(sys.stdout, console._Tee)
    run.finish()


def test_a_run_that_gives_the_console_back_in_the_middle_of_a_line(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that `print`, whose stream is taken away while it prints, ends its line and does not end the process: Python holds
    that stream without a reference, and went on with freed memory (a segmentation fault on a full disk)."""
    monkeypatch.setenv("PYTHONMALLOC", "debug")  # freed memory is overwritten at once
    done = script(
        """
        import sys, wbdist
        from wbdist.errors import DiskFullError
        def full(*_, **__): raise DiskFullError("no space")
        for number in range(3):
            run = wbdist.init(project="p", mode="offline", settings={"quiet": True})
            run.journal.append, kept = full, run.journal.append
            for step in range(50):
                print("line", step, "of", number, *range(20), flush=True)
            run.journal.append = kept
            run.finish()
        print(type(sys.stdout).__name__)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[50] == "line 0 of 1 " + " ".join(map(str, range(20)))
    assert done.stdout.splitlines()[-1] == "TextIOWrapper"
