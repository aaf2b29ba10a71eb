"""Fixtures for trials: whole jobs that are killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.plans import Plan
from support.trial import Trial
from support.uninterrupted import References


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    """Makes the trial of a plan, or of the given fields of one without blows; ends it with the test."""
    with ExitStack() as stack:

        def make(plan: Plan | None = None, **fields: Any) -> Trial:
            asked = {"seed": 0, "job": "light", "world_size": 2, "strategy": "rank0", "mode": "online", "steps": 60, **fields}
            return stack.enter_context(Trial(tmp_path / "trial", plan or Plan(**asked)))

        yield make
