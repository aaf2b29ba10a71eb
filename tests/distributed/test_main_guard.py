"""The main guard: scripts without it, `@wbdist.main`, and sessions that need none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.feeding import REPOSITORY


def run(tmp_path: Path, text: str, *command: str, stdin: bool = False, **environment: str) -> tuple[int, str, str]:
    script = tmp_path / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, *(command or (() if stdin else (str(script),)))],
        input=text if stdin else None,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


DECORATED = """
import os, wbdist
print("loaded", __name__, flush=True)
def helper(): return os.environ.get("RANK")
@wbdist.main(nprocs=2)
def train():
    print(f"rank {helper()}\\n", end="", flush=True)  # in one piece: torchrun's ranks are unbuffered
"""


def test_decorated_function_is_the_script(tmp_path: Path) -> None:
    """Proves that the decorated function runs when the file is the program, on ranks of its own; as this rank's call under
    other launchers; and not when the file is imported."""
    code, out, err = run(tmp_path, DECORATED)
    assert code == 0, err
    assert sorted(out.splitlines()) == ["loaded __main__", "loaded __mp_main__", "loaded __mp_main__", "rank 0", "rank 1"]
    code, out, err = run(tmp_path, DECORATED, RANK="1", WORLD_SIZE="2")
    assert (code, out) == (0, "loaded __main__\nrank 1\n"), err
    code, out, err = run(tmp_path, DECORATED, "-c", "import script; print(script.train.__name__)")
    assert (code, out) == (0, "loaded script\ntrain\n"), err


@pytest.mark.slow
def test_decorated_function_under_launchers(tmp_path: Path) -> None:
    """Proves that `wbdist launch` and torchrun run the decorated function once on each of their ranks."""
    for launcher in (["-m", "wbdist", "launch", "--nproc", "2"], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]):
        code, out, err = run(tmp_path, DECORATED, *launcher, "script.py")
        assert code == 0, err
        lines = sorted(line[-6:] for line in out.splitlines() if not line.endswith("loaded __main__"))
        assert lines == ["rank 0", "rank 1"]


def test_decorated_function_must_be_last(tmp_path: Path) -> None:
    """Proves that what the decorated function would miss, or a second start, is refused with its line."""
    for later in ("def late(): ...", 'if __name__ == "__main__":\n    go()'):
        code, _, err = run(tmp_path, f"import wbdist\n@wbdist.main\ndef go():\n    print('ran')\n{later}\n")
        assert code == 1
        assert "UsageError: line 5 of" in err


UNGUARDED = {
    "at once": ("import wbdist\nwbdist.launch(print, nprocs=2)\n", 2),
    "in a function": ("import wbdist\ndef go():\n    wbdist.launch(print, nprocs=2)\ntry:\n    go()\nfinally: pass\n", 5),
    "under another condition": ("import sys, wbdist\nif len(sys.argv) < 9:\n    wbdist.launch(print, nprocs=2)\n", 3),
}


@pytest.mark.parametrize("kind", UNGUARDED)
def test_unguarded_line_is_named(tmp_path: Path, kind: str) -> None:
    """Proves that the line to guard is named once, by the parent where the source tells, else by one child."""
    text, line = UNGUARDED[kind]
    code, out, err = run(tmp_path, text)
    assert (code, out) == (65, "")
    assert err.count("MainGuardError: ") == 1, err
    assert f"line {line} of {tmp_path / 'script.py'} is not under a main guard" in err
    assert f"    {line} | " in err
    assert "Traceback" not in err


def test_guards_of_all_kinds_are_seen(tmp_path: Path) -> None:
    """Proves that guards other than the usual one are taken for what they are."""
    start = "wbdist.launch(print, nprocs=2, args=('ran',))"
    for text in (
        f"import wbdist\nif __name__ != '__main__':\n    x = 1\nelse:\n    {start}\n",
        f"import wbdist\ndef main():\n    {start}\nif 'main' in __name__ and __name__ != '__mp_main__':\n    main()\n",
    ):
        code, out, err = run(tmp_path, text)
        assert (code, out.split()) == (0, ["ran", "ran"]), err


def test_sessions_without_a_file_need_no_guard(tmp_path: Path) -> None:
    """Proves that functions, lambdas and classes of a session without a file (as a notebook's) reach the ranks, and values come
    back."""
    text = """
import os, wbdist
class Thing:
    def __init__(self, x): self.x = x
def work(thing): return Thing(thing.x + int(os.environ["RANK"]))
print([t.x for t in wbdist.launch(work, 2, args=(Thing(5),))], wbdist.launch(lambda: os.environ["RANK"], nprocs=2))
"""
    code, out, err = run(tmp_path, text, stdin=True)
    assert (code, out) == (0, "[5, 6] ['0', '1']\n"), err


def test_no_run_is_opened_while_a_child_loads_the_script(tmp_path: Path) -> None:
    """Proves that an `init` outside of the guard opens one run, and not one more in a spawned child, which says so."""
    text = """
import multiprocessing, wbdist
run = wbdist.init(project="p")
def work(): print("worked")
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    child.join()
    print("child", child.exitcode)
"""
    code, out, err = run(tmp_path, text, WBDIST_MODE="offline")
    assert (code, out) == (0, "child 1\n"), err
    assert "MainGuardError: wbdist.init() in line 3" in err
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
