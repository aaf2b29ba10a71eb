"""How far property tests look."""

from __future__ import annotations

import os


def examples(few: int, many: int) -> int:
    """`few` of them in `make test`, `many` in `make test-all`, which searches (see tests/conftest.py)."""
    return many if os.environ.get("HYPOTHESIS_PROFILE") == "search" else few
