"""A real server process, a real store in this process, and a client that speaks W&B's wire."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving import Server

from wbdist.server.auth import Auth
from wbdist.server.context import AppContext
from wbdist.server.files import FileStore
from wbdist.server.keys import open_key_ring
from wbdist.server.settings import ServerSettings
from wbdist.server.store import open_store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for a module's tests: they use projects of their own."""
    os.environ.pop("WBDIST_DATA_DIR", None)
    with Server(tmp_path_factory.mktemp("server") / "data") as process:
        yield process


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ctx(tmp_path: Path, clock: Clock) -> Iterator[AppContext]:
    """The app's context in this process, over a real store and a clock of the test's own."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    settings = ServerSettings()
    auth = Auth(open_key_ring(data_dir, settings.entity), settings, clock)
    store = open_store(f"sqlite:///{data_dir / 'wbdist.db'}")
    yield AppContext(store, auth, FileStore(data_dir / "files"), settings, clock, "http://127.0.0.1:1")
    store.close()
