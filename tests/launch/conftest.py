"""Starts launchers and ends what a failed test left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job.conftest import jobs, server
from support.launching import SCRIPT, Launch, Launched
from support.namespaces import two_hosts

__all__ = ["jobs", "server", "two_hosts"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """`launch(*script arguments, nproc=2, options=(...))` runs rank_script.py in tmp_path."""
    started: list[Launched] = []

    def start(*arguments: str, nproc: int = 2, options: tuple[str, ...] = (), **kwargs: Any) -> Launched:
        command = ["--nproc", str(nproc), *options, str(SCRIPT), *arguments]
        started.append(Launched(tmp_path, command, len(started), **kwargs))
        return started[-1]

    yield start
    for launched in started:
        launched.end()
