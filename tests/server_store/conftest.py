"""Real databases: SQLite files, and a PostgreSQL server of our own where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from wbdist.server.store import SqlStore, chunks, open_store

TINY = {"FAN": 2, "SEAL_ROWS": 16, "SEAL_CELLS": 64, "COLUMNAR_CELLS": 12}
"""Chunk sizes at which a dozen lines go through every level."""


def _postgres_programs() -> Path | None:
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Makes empty databases on a PostgreSQL server that lives as long as the tests; skips without one."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)")
    user: dict[str, object] = {}
    place = Path(tempfile.mkdtemp(prefix="wbdist-pg-"))
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            shutil.rmtree(place)
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(place, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    data = place / "data"

    def call(*command: object) -> None:
        done = subprocess.run([*map(str, command)], capture_output=True, timeout=60, cwd=place, check=False, **user)
        assert done.returncode == 0, f"{command}: {done.stdout.decode()}{done.stderr.decode()}"

    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        call(programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses= -c unix_socket_directories={place} -c fsync=off"
        call(programs / "pg_ctl", "-D", data, "-w", "-o", options, "-l", place / "log", "start")
        stack.callback(call, programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")

        def make() -> str:
            name = f"t{uuid.uuid4().hex}"
            with psycopg.connect(f"host={place} user=postgres dbname=postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            return f"postgresql://postgres@/{name}?host={place}"

        yield make


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database; every test that asks for it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    make: Callable[[], str] = request.getfixturevalue("postgres")
    return make()


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    opened = open_store(url)
    yield opened
    opened.close()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks merge and are sealed after a few lines."""
    for name, value in TINY.items():
        monkeypatch.setattr(chunks, name, value)
