"""The mark beside a journal whose end its server has: later shippers of the root leave it alone."""

from __future__ import annotations

from pathlib import Path
from time import time

from wbdist.run.shipper.control import SHIPPED


def marked(journal: Path) -> bool:
    return _place(journal).exists()


def mark(journal: Path, outcome: str, base_url: str) -> None:
    """Raises OSError."""
    _place(journal).write_text(f"{outcome} {base_url} {time():.0f}\n", encoding="utf-8")


def _place(journal: Path) -> Path:
    return journal.with_name(journal.name + SHIPPED)
