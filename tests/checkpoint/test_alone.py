"""The checkpointer without a run, in real processes: under torchrun, and on two hosts that do not see one directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.ports import free_port
from support.torchrun import torchrun

from wbdist.checkpoint.manifest import committed

PROGRAM = Path(__file__).parent / "programs" / "alone.py"
pytestmark = pytest.mark.slow


def train(directory: Path, steps: int, dies_after: int = 0) -> list[str]:
    """What the two ranks said; that once which both said."""
    directory.mkdir(exist_ok=True)
    said = torchrun(2, PROGRAM, steps, dies_after, cwd=directory, exit_code=1 if dies_after else 0).splitlines()
    return list(dict.fromkeys(line for line in said if line.partition(" ")[0] in {"restored", "note", "weights"}))


def test_under_torchrun(tmp_path: Path) -> None:
    """Two DDP ranks, one of them killed: the same command goes on and ends with the weights of a training never killed."""
    whole = train(tmp_path / "whole", 10)
    assert whole[0] == "restored nothing"
    train(tmp_path / "cut", 10, dies_after=8)
    (step,) = {manifest.step for manifest in committed(tmp_path / "cut" / "ckpt")[:1]}
    assert step in {3, 6}
    assert train(tmp_path / "cut", 10) == [f"restored step-{step}.a1", whole[-1]]
    assert committed(tmp_path / "cut" / "ckpt")[0].name == "step-10.a2"


def test_two_hosts_that_do_not_see_one_directory(tmp_path: Path) -> None:
    """Behind the path lies another disk for rank 1, with a copy in which a bit has flipped: both ranks go back to the
    checkpoint that is whole for both, and the next save says what is wrong."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("giving a process a mount of its own needs root and unshare")
    train(tmp_path, 4)
    shutil.copytree(tmp_path / "ckpt", tmp_path / "other")
    damaged = tmp_path / "other" / "step-4.a1" / "shared" / "state.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"0.1", b"0.2", 1))
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    env |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    mounting = ["unshare", "-m", "sh", "-c", 'mount --bind other ckpt && exec "$0" "$@"']
    ranks = [
        subprocess.Popen(
            [*before, sys.executable, str(PROGRAM), "6", "0"],
            cwd=tmp_path,
            env={**os.environ, **env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, before in enumerate([[], mounting])
    ]
    try:
        for said, problem in [rank.communicate(timeout=250) for rank in ranks]:
            assert "restored step-3.a1\nnote step-4.a1 is not whole for all ranks: rank 1 on " in said, problem
            assert "shared/state.json has another content" in said
            assert "must be one directory for all ranks, across hosts too" in problem
    finally:
        for rank in ranks:
            rank.kill()
    assert [manifest.name for manifest in committed(tmp_path / "ckpt")] == ["step-4.a1", "step-3.a1"]
