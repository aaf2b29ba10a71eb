"""One run, many writers: mode="shared"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import wbdist

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys, wbdist
n = int(sys.argv[1])
settings = wbdist.Settings(mode="shared", x_label=f"w{n}", x_primary=n == 0, x_update_finish_state=n == 0, silent=True)
run = wbdist.init(project="p", id="one", config={"writer": n}, settings=settings)
for i in range(100):
    run.log({f"m{n}": i}, step=4 * i + n)
if n == 0:
    sys.stdin.readline()
run.finish()
"""


@pytest.mark.usefixtures("embedded")
def test_many_writers_of_one_run(tmp_path: Path) -> None:
    """Proves that every row of every writer is in the run, at its step, in order of steps; that the primary's config is the
    run's, that the run ends with it, and that the summary is of all."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(n)], cwd=tmp_path, env=env, stdin=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    for writer in writers[1:]:
        assert writer.wait(90) == 0
    assert wbdist.Api().run("p/one").state == "running"
    writers[0].communicate("end\n", timeout=90)
    assert writers[0].returncode == 0
    run = wbdist.Api().run("p/one")
    rows = [{key: row[key] for key in row if key == "_step" or key.startswith("m")} for row in run.scan_history()]
    assert rows == [{"_step": step, f"m{step % 4}": step // 4} for step in range(400)]
    assert (run.config["writer"], run.state) == (0, "finished")
    assert {f"m{n}": 99 for n in range(4)}.items() <= dict(run.summary.items()).items()


def test_what_excludes_shared(embedded: Path) -> None:
    """Proves that going on with a run and sharing it are not mixed."""
    del embedded
    for given in ({"resume": "allow"}, {"fork_from": "x?_step=1"}):
        with pytest.raises(wbdist.UsageError, match="shared"):
            wbdist.init(project="p", id="one", mode="shared", **given)
