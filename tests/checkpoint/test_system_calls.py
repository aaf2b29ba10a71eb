"""SIGKILL at every call of a save into the C library that touches the disk, whoever makes it: not only at our file layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "support" / "native" / "crash.c"


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc): the calls cannot be intercepted here")
    target = tmp_path_factory.mktemp("native") / "crash.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(target), str(SOURCE), "-ldl"], check=True, timeout=60
    )
    return target


def crash(preload: Path, directory: Path, what: str, mode: str) -> list[tuple[str, int]]:
    """For each disk call: its name, and what the next attempt found."""
    env = {**os.environ, "LD_PRELOAD": str(preload), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.crashing", str(directory), what, mode]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [(name, found) for name, found in json.loads(done.stdout)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["before", "after", "torn"])
def test_killed_at_every_disk_call_of_a_save(preload: Path, tmp_path: Path, mode: str) -> None:
    """Before the rename the checkpoint before loads, from it on the new one; everything that is there verifies; nothing is left
    over. `torn`: half of a write reached the disk."""
    found = crash(preload, tmp_path, "save", mode)
    names, steps = [name for name, _ in found], [step for _, step in found]
    if mode == "torn":
        assert len(found) >= 4
        assert set(steps) == {2}
        return
    assert {"mkdir", "open64", "write", "fsync", "rename", "unlinkat"} <= {*names}
    assert len(found) > 25
    assert steps == sorted(steps)
    # Step 3 is there from its rename on; the next rename is that of step 1, which goes.
    first = steps.index(3)
    assert names[first if mode == "after" else first - 1] == "rename"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["claim", "claim again"])
def test_killed_at_every_disk_call_of_a_claim(preload: Path, tmp_path: Path, what: str) -> None:
    """No number of an attempt is taken twice or left out, and the directory stays one run's."""
    for mode in ("before", "after", "torn"):
        found = crash(preload, tmp_path / mode, what, mode)
        taken = [before for _, before in found]
        assert len(found) >= (1 if mode == "torn" else 5)
        assert taken == sorted(taken)
        assert {*taken} <= ({1, 2} if what.endswith("again") else {0, 1})
