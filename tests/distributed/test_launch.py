"""`launch` and the main guard, as scripts that people start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from support.feeding import REPOSITORY
from support.waiting import until


def start(tmp_path: Path, text: str, **environment: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nfrom wbdist.distributed.bootstrap import launch\n" + text)
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(tmp_path: Path, text: str, **environment: str) -> tuple[int, str, str]:
    with start(tmp_path, text, **environment) as process:
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_unguarded_script_stops_with_one_message(tmp_path: Path) -> None:
    """Proves that a script without a guard ends with 65 within seconds, says how to mend it once, with the line, and before any
    process is started."""
    began = time.monotonic()
    process = start(tmp_path, "launch(lambda: print('ran'), nprocs=3)\n")
    most = 0
    while process.poll() is None:
        most = max(most, len(family(process)))
        time.sleep(0.005)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 65, err
    assert err.count("MainGuardError") == 1
    assert 'if __name__ == "__main__":' in err
    assert "Traceback" not in err
    assert "ran" not in out
    assert "line 3 of" in err
    assert most == 0
    assert time.monotonic() - began < 10


def test_functions_lambdas_and_closures(tmp_path: Path) -> None:
    """Proves that a script's own function, a lambda over names made under the guard, and a closure run on every rank, with the
    ranks' environment, and that one rank runs in the process itself without any."""
    code, out, err = run(
        tmp_path,
        """
ANSWER = 41
class Thing: pass
def train(thing, extra):
    print(type(thing) is Thing, ANSWER + extra, os.environ["RANK"], os.environ["WORLD_SIZE"], flush=True)
if __name__ == "__main__":
    made_here = 7
    launch(train, nprocs=2, args=(Thing(),), kwargs={"extra": 1})
    launch(lambda: print("lambda", made_here, flush=True), nprocs=2)
    def inner():
        return "closure"
    launch(lambda: print(inner(), flush=True), 2)
    me = os.getpid()
    launch(lambda: print("alone", os.environ.get("RANK"), os.getpid() == me), 1)
""",
    )
    assert code == 0, err
    lines = sorted(out.splitlines())
    assert lines == ["True 42 0 2", "True 42 1 2", "alone None True", "closure", "closure", "lambda 7", "lambda 7"]


def test_inside_a_rank_the_function_is_only_called(tmp_path: Path) -> None:
    """Proves that under another launcher (RANK is set) no processes are made."""
    text = "me = os.getpid()\nif __name__ == '__main__':\n"
    text += "    launch(lambda: print(os.environ['RANK'], os.getpid() == me), nprocs=4)\n"
    assert run(tmp_path, text, RANK="3", WORLD_SIZE="4")[:2] == (0, "3 True\n")


def test_exit_codes_come_through(tmp_path: Path) -> None:
    """Proves that an error of ours ends the job with its own exit code, not restarted, with the rank named."""
    code, _, err = run(
        tmp_path,
        """
from wbdist.errors import UsageError
def train():
    if os.environ["RANK"] == "1":
        raise UsageError("no such column")
if __name__ == "__main__":
    launch(train, nprocs=2)
""",
    )
    assert code == 65
    assert "no such column" in err
    assert "rank 1" in err


def test_what_cannot_be_sent_is_said(tmp_path: Path) -> None:
    """Proves that an argument that cannot be pickled is refused before any rank starts."""
    code, _, err = run(
        tmp_path,
        "import threading\nif __name__ == '__main__':\n    launch(print, 2, args=((i for i in range(3)),))\n",
    )
    assert code == 1
    assert "UsageError: the function or its arguments cannot be sent to another process" in err


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    """Proves that a bad nprocs, something that is no function and arguments that are none are refused with what was given."""
    text = "from wbdist.errors import UsageError\n"
    text += (
        "for bad in ((print, 0), (print, True), (print, 1.5), ('x', 2), (print, 2, 5), (print, 2, 'a'), (print, 2, (), [1])):\n"
    )
    text += "    try: launch(*bad)\n    except UsageError as error: print(error)\n"
    code, out, _ = run(tmp_path, text)
    assert code == 0
    assert len(out.splitlines()) == 7
    assert "nprocs=0" in out
    assert "nprocs=1.5" in out
    assert "str" in out.splitlines()[3]
    assert [line.partition(" must")[0] for line in out.splitlines()[4:]] == ["args=5", "args='a'", "kwargs=[1]"]


SLEEPER = """
def train():
    open(f"up{os.environ['RANK']}", "w").close()
    time.sleep(60)
if __name__ == "__main__":
    launch(train, nprocs=2)
"""


def test_ctrl_c_is_one_clean_stop(tmp_path: Path) -> None:
    """Proves that Ctrl-C (SIGINT to the whole process group) ends everything soon, without tracebacks or orphans."""
    process = start(tmp_path, SLEEPER)
    until(lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists(), "the ranks")
    children = family(process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)  # the ranks would sleep for 60 s
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, 30)[1]


def test_killed_launcher_leaves_no_ranks(tmp_path: Path) -> None:
    """Proves that SIGKILL of the launching process ends its ranks too."""
    process = start(tmp_path, SLEEPER)
    until(lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists(), "the ranks")
    children = family(process)
    process.kill()
    process.communicate(timeout=30)
    assert not psutil.wait_procs(children, 30)[1]


def test_values_and_errors_come_back(tmp_path: Path) -> None:
    """Proves for spawned and for forked ranks that what each returns comes back by rank, and that a rank's error is raised
    with its rank, class, traceback and exit code, also when the exception itself cannot be pickled."""
    code, out, err = run(
        tmp_path,
        """
import wbdist
class Odd(wbdist.UsageError):
    def __init__(self, a, b): super().__init__(f"{a} {b}")
def good(base):
    rank = int(os.environ["RANK"])
    return {"rank": rank, "value": base + rank, "f": (lambda: rank)}
def bad(kind, *arguments):
    if os.environ["RANK"] == "1":
        raise kind(*arguments)
if __name__ == "__main__":
    for method in ("spawn", "fork"):
        made = launch(good, 3, args=(10,), start_method=method)
        print([(m["rank"], m["value"], m["f"]()) for m in made])
    for call in ((wbdist.UsageError, "no such column"), (Odd, 1, 2)):
        try:
            launch(bad, 2, args=call, start_method="fork")
        except wbdist.JobFailedError as error:
            assert isinstance(error, wbdist.Error)
            print(error.code, error.rank, type(error.__cause__).__name__, "in bad" in error.traceback, end=" ")
            print(str(error).splitlines()[0])
""",
    )
    assert code == 0, err
    said = "the job ended with code 65: rank 1 raised "
    assert out.splitlines() == [
        "[(0, 10, 0), (1, 11, 1), (2, 12, 2)]",
        "[(0, 10, 0), (1, 11, 1), (2, 12, 2)]",
        f"65 1 UsageError True {said}wbdist.errors.UsageError: no such column",
        f"65 1 NoneType True {said}Odd: 1 2",
    ]
