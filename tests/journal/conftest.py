"""Journals for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from wbdist.errors import DiskFullError
from wbdist.run.journal import JournalHeader, JournalWriter


@pytest.fixture(params=["mapped", "written"])
def storage(request: pytest.FixtureRequest) -> str:
    """Both ways of storing frames."""
    return str(request.param)


@pytest.fixture
def make_writer(tmp_path: Path) -> Iterator[Callable[..., JournalWriter]]:
    """Makes writers in the test's directory and closes what the test leaves open."""
    made: list[JournalWriter] = []

    def make(name: str = "rank0.a1.wbdj", *, storage: str | None = None, directory: Path | None = None) -> JournalWriter:
        header = JournalHeader(run_id="r1", project="p", entity="", attempt=1, nonce="n", writer="rank0", created=1000.0)
        writer = JournalWriter.create((directory or tmp_path) / name, header, storage=storage)
        made.append(writer)
        return writer

    yield make
    for writer in made:
        with suppress(DiskFullError):  # whether the last word of a test of full disks fits is chance
            writer.close(0)
