"""What a rank says about its own end, in files, because an exit code may be hidden (torchrun returns 1 for everything) or
never sent. The supervisor names the directory in WBDIST_INTENT_DIR; without it, nothing is written.

    rank-<n>.json    the verdict of rank n
    rank-<n>.durable what rank n has to lose is on disk all the time: it may be killed when a peer was
    progress.json    the newest committed step, by rank 0
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

VARIABLE = "WBDIST_INTENT_DIR"
Word = Literal["finished", "preempted", "failed", "failed_for_good", "fenced"]


class Verdict(msgspec.Struct, frozen=True):
    """How one rank ended, in its own words."""

    verdict: Word
    exit_code: int
    message: str = ""


class Progress(msgspec.Struct, frozen=True):
    """How far the job has got, durably."""

    step: int


def word_for(exit_code: int) -> Word:
    """The verdict that an exit code of the contract stands for."""
    words: dict[int, Word] = {0: "finished", 65: "failed_for_good", 69: "fenced", 75: "preempted"}
    return words.get(exit_code, "failed")


def supervised() -> bool:
    """Whether somebody reads the verdicts, and says what they say."""
    return bool(os.environ.get(VARIABLE))


def write(rank: int, verdict: Verdict, directory: str | None = None) -> None:
    """Any rank, at its end: leaves its verdict where the supervisor looks. Nothing without a supervisor. Raises OSError."""
    where = directory or os.environ.get(VARIABLE)
    if where:
        _replace(Path(where) / f"rank-{rank}.json", msgspec.json.encode(verdict))


def write_durable(rank: int, directory: str | None = None) -> None:
    """Any rank whose rows and checkpoints are a job's. Nothing without a supervisor. Raises OSError."""
    where = directory or os.environ.get(VARIABLE)
    if where:
        (Path(where) / f"rank-{rank}.durable").touch()


def is_durable(rank: int, directory: Path) -> bool:
    """Whether rank `rank` has said so."""
    return (directory / f"rank-{rank}.durable").exists()


def write_progress(step: int, directory: str | None = None) -> None:
    """Rank 0, after each committed checkpoint. Nothing without a supervisor. Raises OSError."""
    where = directory or os.environ.get(VARIABLE)
    if where:
        _replace(Path(where) / "progress.json", msgspec.json.encode(Progress(step)))


def read_all(directory: Path) -> dict[int, Verdict]:
    """The verdicts that were left, by rank; torn or foreign files are left out."""
    found = {}
    for path in directory.glob("rank-*.json"):
        try:
            found[int(path.stem.removeprefix("rank-"))] = msgspec.json.decode(path.read_bytes(), type=Verdict)
        except (ValueError, OSError):
            continue
    return found


def read_progress(directory: Path) -> int:
    """The newest committed step, -1 when there is none."""
    try:
        return msgspec.json.decode((directory / "progress.json").read_bytes(), type=Progress).step
    except (ValueError, OSError):
        return -1


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
