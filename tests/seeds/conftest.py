"""One server a module; every test has a project and a directory of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.seeding import Seeds

from wbdist import settings
from wbdist.run import lifecycle


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Seeds]:
    """The real server, and both clients in processes of their own. A module's SERVER_ARGUMENTS go to the server."""
    with Seeds(tmp_path_factory.mktemp("seeds"), *getattr(request.module, "SERVER_ARGUMENTS", ())) as world:
        yield world


@pytest.fixture
def project(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name).strip("-")


@pytest.fixture
def here(seeds: Seeds, project: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process logs to the server, into `project`, from a directory of its own; what it leaves open is ended."""
    folder = seeds.place(f"here-{project}")
    monkeypatch.chdir(folder)
    for name, value in {
        "HOME": str(folder),
        "WANDB_BASE_URL": seeds.server.url,
        "WANDB_API_KEY": seeds.server.key,
        "WANDB_PROJECT": project,
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield folder
    for run in lifecycle.active_runs():
        run.finish(1)
    settings.clear_setup()
