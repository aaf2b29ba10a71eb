"""Shared by the run client's tests: a directory of its own for each, no run left open, and scripts in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.journals import read_all
from support.lingering import kill_all, processes_of

from wbdist import settings
from wbdist.run import lifecycle
from wbdist.run.journal import Record, find_journals

ROOT = Path(__file__).resolve().parents[2]

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory is the test's own; runs that it leaves open are ended, `setup()` is forgotten."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for run in lifecycle.active_runs():
        run.finish(1)
    settings.clear_setup()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WBDIST_MODE", "offline")


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs Python source in a process of its own, in the test's directory."""

    def run(source: str, *arguments: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(source))
        return subprocess.run(
            [sys.executable, str(path), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def journals(tmp_path: Path) -> Callable[[], list[list[Record]]]:
    """All records of every journal below the test's directory, journals by name."""

    def read() -> list[list[Record]]:
        return [read_all(path) for path in find_journals(tmp_path / "wandb")]

    return read


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Path]:
    """The data directory of an embedded server that a run will start; whatever was started for the test is ended after it."""
    yield tmp_path / "wbdist-data"
    kill_all(processes_of(tmp_path))  # their state dies with the test's directory: nothing to end gracefully
