"""One run, many writers: mode="shared"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import wbdist
from wbdist.run.artifact_record import ArtifactRecord
from wbdist.run.files import FileRecord
from wbdist.run.journal import Kind

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys, wbdist
n = int(sys.argv[1])
settings = wbdist.Settings(mode="shared", x_label=f"w{n}", x_primary=n == 0, x_update_finish_state=n == 0, silent=True)
run = wbdist.init(project="p", id="one", config={"writer": n}, settings=settings)
for i in range(100):
    run.log({f"m{n}": i}, step=4 * i + n)
    run.summary["set by"] = n
if n == 0:
    sys.stdin.readline()
run.finish()
"""


@pytest.mark.usefixtures("embedded")
def test_many_writers_of_one_run(tmp_path: Path) -> None:
    """Proves that every row of every writer is in the run, at its step, in order of steps; that the primary's config is the
    run's, that the run ends with it, and that the summary is of all, with what the primary sets by hand."""
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
    assert ({f"m{n}": 99 for n in range(4)} | {"set by": 0}).items() <= dict(run.summary.items()).items()


def test_what_excludes_shared(embedded: Path) -> None:
    """Proves that going on with a run and sharing it are not mixed."""
    del embedded
    for given in ({"resume": "allow"}, {"fork_from": "x?_step=1"}):
        with pytest.raises(wbdist.UsageError, match="shared"):
            wbdist.init(project="p", id="one", mode="shared", **given)


@pytest.mark.usefixtures("embedded")
def test_what_no_header_and_no_file_system_can_hold_keeps_no_other_file_back(
    own_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that files of a writer with a Korean label arrive, also behind one that cannot be looked for, which is said."""
    (own_directory / "notes.txt").write_text("kept")
    with wbdist.init(project="p", id="one", settings=wbdist.Settings(mode="shared", x_label="학습 😀")) as run:
        run.log({"m": 1}, step=0)
        odd = FileRecord(path="\0", name="odd.txt", policy="now", source="\0")
        run.journal.append(Kind.FILE, msgspec.to_builtins(odd))
        lost = ArtifactRecord("\0", "odd", "data", "c" * 32, "d")
        run.journal.append(Kind.ARTIFACT, msgspec.to_builtins(lost))
        run.save("notes.txt")
    found = wbdist.Api().run("p/one")
    assert "notes.txt" in [file.name for file in found.files()]
    assert [row["m"] for row in found.scan_history()] == [1]
    said = capsys.readouterr().err
    assert "odd.txt: a fault of the shipper (ValueError" in said
    assert "artifact odd: a fault of the shipper (ValueError" in said
