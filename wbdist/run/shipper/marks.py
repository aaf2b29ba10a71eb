"""Marks beside journals: that its server has all of one, so that later shippers of the root leave it alone; that all of a feed
is in journals of its run."""

from __future__ import annotations

from pathlib import Path
from time import time

from wbdist.run.shipper.control import SHIPPED


def marked(journal: Path) -> bool:
    return _place(journal).exists()


def mark(journal: Path, outcome: str, base_url: str) -> None:
    """Raises OSError."""
    _place(journal).write_text(f"{outcome} {base_url} {time():.0f}\n", encoding="utf-8")


def settled(feed: Path) -> bool:
    return _settlement(feed).exists()


def settle(feed: Path) -> None:
    """Raises OSError."""
    _settlement(feed).touch()


def _settlement(feed: Path) -> Path:
    return feed.with_name(feed.name + ".settled")


def _place(journal: Path) -> Path:
    return journal.with_name(journal.name + SHIPPED)
