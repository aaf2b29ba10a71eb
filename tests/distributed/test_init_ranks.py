"""`wbdist.init_ranks()`: one line on every rank of a script that tracks itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.feeding import PROGRAMS, REPOSITORY
from support.journals import rows_of

import wbdist
from wbdist.errors import UsageError
from wbdist.run import init as init_module
from wbdist.run.journal import JournalReader, find_journals


def play(root: Path, strategy: str, size: int = 2) -> dict[str, list[dict[str, object]]]:
    """run id's end -> its rows, of all runs that the ranks made."""
    (root / "keys").mkdir(parents=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC_", "SLURM_"))}
    started = []
    for rank in range(size):
        environment = {
            **clean,
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{PROGRAMS}"}
        command = [sys.executable, str(PROGRAMS / "init_ranks.py"), str(root / "keys"), strategy]
        started.append(subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [0] * size, said
    found: dict[str, list[dict[str, object]]] = {}
    for path in find_journals(root / "wandb"):
        with JournalReader.open(path) as reader:
            header = reader.header
        if header.role == "run":
            found.setdefault(header.run_id, []).extend(rows_of(path))
    return found


def test_one_run_of_all_ranks(tmp_path: Path) -> None:
    """Proves that the same line on every rank is one run: means, sums where that was said, and rank 0's config."""
    (rows,) = play(tmp_path / "one", "rank0").values()
    assert rows == [{"loss": 0.5, "tokens": 21, "lr": 0.1, "_step": step} for step in range(5)]


@pytest.mark.slow
def test_a_run_a_rank_in_one_group(tmp_path: Path) -> None:
    """Proves that per_rank gives each rank a run of its own whose id names the rank."""
    found = play(tmp_path / "each", "per_rank")
    assert {name.rpartition("-")[2]: rows[0]["tokens"] for name, rows in found.items()} == {"r0": 10, "r1": 11}
    assert len({name.rpartition("-")[0] for name in found}) == 1


def test_what_it_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a wrong argument and a resume are refused before anything is opened, with what to do instead."""
    with pytest.raises(UsageError, match="checkpoint_dir"):
        wbdist.init_ranks(project="p", resume="allow")
    monkeypatch.setenv("WANDB_RESUME", "allow")
    with pytest.raises(UsageError, match=r"wbdist\.job"):
        wbdist.init_ranks(project="p")


def test_an_id_that_there_is_gets_advice_that_can_be_taken(tmp_path: Path) -> None:
    """Proves that a second start by hand is not told to resume, which init_ranks refuses; `init`, which takes it, tells so."""
    wbdist.init_ranks(project="p", id="x", mode="offline", dir=tmp_path).finish()
    with pytest.raises(
        UsageError, match=r"'x' exists already.*leave `id` out, choose another, or use a wbdist\.job"
    ) as refusal:
        wbdist.init_ranks(project="p", id="x", mode="offline", dir=tmp_path)
    assert "resume" not in str(refusal.value)
    with pytest.raises(UsageError, match='continue it with resume="allow"'):
        wbdist.init(project="p", id="x", mode="offline", dir=tmp_path)


@pytest.mark.parametrize(
    ("rank", "group", "says"), [("1", None, True), ("0", None, False), ("1", "mine", False), ("2", None, False)]
)
def test_init_on_several_ranks_points_there(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    group: str | None,
    says: bool,
) -> None:
    """Proves that plain `init` on many ranks says what it does on one of them; nothing on rank 0, nor with a group."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(init_module, "_warned", set())
    with wbdist.init(project="p", dir=tmp_path, mode="offline", group=group):
        pass
    assert ("wbdist.init_ranks(...)" in capsys.readouterr().err) == says
