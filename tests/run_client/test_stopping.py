"""A stop that is asked for on the server reaches the script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import wbdist
from wbdist.run import stopping

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_stop_interrupts_the_script(embedded: Path, own_directory: Path, *, ignored: bool) -> None:
    """Proves that a script gets a KeyboardInterrupt when its run is stopped through the API, that what it logs then still
    arrives, also when it is stopped as soon as the server knows of it, and when it was started in the background, where SIGINT
    is ignored; and that the run is killed."""
    source = """
import time, wbdist
run = wbdist.init(project="p", id="r")
try:
    while True:
        run.log({"x": 1})
        time.sleep(0.2)
except KeyboardInterrupt:
    run.log({"x": 2})
    raise
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = own_directory / "said"
    if ignored:
        source = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + source
    with said.open("w") as stderr:  # no pipe: the embedded server, which outlives the script, would keep it open
        process = subprocess.Popen([sys.executable, "-c", source], cwd=own_directory, env=env, stderr=stderr)
    try:
        deadline = time.monotonic() + 60
        while not (runs := [run for run in wbdist.Api().runs("p") if ignored or run.lastHistoryStep >= 0]):
            assert time.monotonic() < deadline, "the run did not reach the server"
            time.sleep(0.01)
        runs[0].stop()
        process.wait(90)
    finally:
        process.kill()
    assert process.returncode in {-signal.SIGINT, 1}
    assert "somebody asked on the server that it stop" in said.read_text()
    assert "KeyboardInterrupt" in said.read_text()
    found = wbdist.Api().run("p/r")
    assert (found.state, found.summary["x"]) == ("killed", 2)


def test_only_runs_that_are_watched_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a run which has ended is not asked about any more, that one stop is one interrupt, and that
    the setting `stop_fn` is called in its place."""
    monkeypatch.setattr(stopping, "INTERVAL", 0.01)
    asked = {"ended": 0, "open": 0}
    said: list[str] = []

    def count(name: str, answer: bool) -> bool:
        asked[name] += 1
        return answer

    stopping.watch(lambda: count("ended", False), lambda: said.append("ended"))()
    before = asked["ended"]
    with pytest.raises(KeyboardInterrupt):
        stopping.watch(lambda: count("open", True), lambda: said.append("open"))
        time.sleep(60)
    time.sleep(0.1)
    assert said == ["open"]
    called = threading.Event()
    stopping.watch(lambda: True, lambda: said.append("failing"), lambda: 1 / 0)  # what it raises ends no watching
    stopping.watch(lambda: said[-1] == "failing", lambda: said.append("own"), called.set)
    assert called.wait(60)
    assert said == ["open", "failing", "own"]
    assert asked["open"] == 1
    assert asked["ended"] - before <= 1
