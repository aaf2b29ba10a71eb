"""Which exit code a run records, however its process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wbdist.run.journal import JournalReader, find_journals

HEAD = (
    "import sys, wbdist\nrun = wbdist.init(project='p', mode='offline', settings={'silent': True})\nrun.log({'a': 1}, step=3)\n"
)
IN_FUNCTION = "def f():\n    raise SystemExit(5)\nf()"
CAUGHT = "try:\n    sys.exit(3)\nexcept SystemExit:\n    pass"
CAUGHT_ERROR = "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass"


def end_of(directory: Path) -> Any:
    (path,) = find_journals(directory / "wandb")
    with JournalReader.open(path) as reader:
        rows = 0
        while records := reader.read():
            rows += sum(record.step is not None for record in records)
        assert rows == 1
        return reader.ended


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("1 / 0", 1),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('message')", 1),
        ("raise KeyboardInterrupt", 255),
        ("raise SystemExit(5)", 5),
        (IN_FUNCTION, 5),
        ("raise SystemExit", 0),
        ("exit(4)", 4),
        (CAUGHT, 0),
        (CAUGHT_ERROR, 0),
        (f"{CAUGHT}\nraise SystemExit(6)", 6),
        ("import atexit\natexit.register(lambda: print('hook'))\nprint('before')\nraise SystemExit(5)", 5),
    ],
)
def test_the_code_of_a_run_that_nobody_finished(script: Callable[..., Any], tmp_path: Path, ending: str, code: int) -> None:
    """Proves that the recorded code is the one the process ends with, for every way a Python program ends by itself."""
    done = script(HEAD + ending)
    assert end_of(tmp_path) == {"exit_code": code, "cause": "exit"}
    if code != 255:
        assert done.returncode == code, done.stderr
    if "hook" in ending:
        assert done.stdout.split() == ["before", "hook"]  # nothing ran or was printed twice


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", 1),
        ("sys.exit(0)", 0),
        ("sys.exit()", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('no')", 1),
    ],
)
def test_the_code_of_a_with_block(script: Callable[..., Any], tmp_path: Path, body: str, code: int) -> None:
    """Proves the with-block's rule: 0 without an exception, SystemExit's own code, 1 for every other exception."""
    script(f"{HEAD}with run:\n    {body}\n")
    assert end_of(tmp_path) == {"exit_code": code, "cause": "exit"}


@pytest.mark.parametrize(("error", "code"), [("1 / 0", 1), ("sys.exit(4)", 4), ("pass", 0)])
def test_finish_in_a_finally_knows_of_the_exception(script: Callable[..., Any], tmp_path: Path, error: str, code: int) -> None:
    """Proves that `finally: run.finish()` while an exception is in flight does not call the run a success."""
    script(f"{HEAD}try:\n    {error}\nfinally:\n    run.finish()\n")
    assert end_of(tmp_path) == {"exit_code": code, "cause": "exit"}


def test_hooks_of_others_still_run(script: Callable[..., Any], tmp_path: Path) -> None:
    """Proves that an excepthook installed before ours is still called, with the exception."""
    done = script("import sys\nsys.excepthook = lambda kind, error, trace: print('theirs', kind.__name__)\n" + HEAD + "1 / 0")
    assert done.stdout.strip() == "theirs ZeroDivisionError"
    assert end_of(tmp_path)["exit_code"] == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("1 / 0", 1), ("raise SystemExit(6)", 6)])
def test_children_of_multiprocessing_end_their_runs(
    script: Callable[..., Any], tmp_path: Path, method: str, ending: str, code: int
) -> None:
    """Proves that a run opened in a multiprocessing child, which leaves past `atexit`, still records how the child ended."""
    done = script(
        f"""
        import multiprocessing, sys, wbdist

        def work():
            wbdist.init(project="p", mode="offline", settings={{"silent": True}}).log({{"a": 1}}, step=3)
            {ending}

        if __name__ == "__main__":
            process = multiprocessing.get_context("{method}").Process(target=work)
            process.start()
            process.join(90)
            sys.exit(process.exitcode)
        """
    )
    assert done.returncode == code, done.stderr
    assert end_of(tmp_path) == {"exit_code": code, "cause": "exit"}


def test_a_killed_process_leaves_all_rows_and_no_end(tmp_path: Path) -> None:
    """Proves that SIGKILL right after the last `log` loses no row, and the journal tells of a writer gone without a word."""
    root = Path(__file__).resolve().parents[2]
    source = (
        "import os, signal, wbdist\n"
        "run = wbdist.init(project='p', mode='offline')\n"
        "for i in range(2000):\n    run.log({'i': i, 'x': i / 7})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=30,
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL
    (path,) = find_journals(tmp_path / "wandb")
    with JournalReader.open(path) as reader:
        seen = []
        while records := reader.read():
            seen += [record.data["i"] for record in records if record.step is not None]
        assert seen == list(range(2000))
        assert reader.ended is None
        assert not reader.writer_alive()
