"""docs/seeds.md tells the truth about which test holds which row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_named_test_exists() -> None:
    """Proves that each test that the table names is there."""
    text = (TESTS.parent / "docs" / "seeds.md").read_text()
    named = re.findall(r"`(\S+\.py)::(\w+)`", text)
    assert len(named) > 50
    missing = [f"{file}::{name}" for file, name in named if name not in functions(TESTS / file)]
    assert missing == []


def functions(path: Path) -> set[str]:
    if not path.exists():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
