"""One server a module; every test has a project of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.seeding import Seeds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeds]:
    """The real server, and both clients in processes of their own."""
    with Seeds(tmp_path_factory.mktemp("seeds")) as world:
        yield world
