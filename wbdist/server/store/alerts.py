"""What runs' `alert` calls said: lines of the stream ALERTS, so that history's cuts cut them and a repeated one is known."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from wbdist.core.position import ALERTS
from wbdist.server.store.interface import RunRow, Store

LEVELS = ("INFO", "WARN", "ERROR")
MOST = 1000
"""Alerts that a page or an answer shows: the newest."""
_WRITER = "sdk-alerts"
"""Who writes those that come by W&B's mutation, which says of itself neither who sends it nor which one it is."""


class Alert(msgspec.Struct, frozen=True):
    """One, as it is shown."""

    title: str
    text: str
    level: str
    time: float
    """Unix seconds."""
    step: int | None


class AlertBox:
    """Takes the alerts of W&B's mutation. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def put(self, store: Store, run: RunRow, title: str, text: str, level: str, *, wait: float, now: float) -> bool:
        """False when one with this title came within the last `wait` seconds: a repeated request adds nothing either."""
        with self._lock:
            if any(known.title == title and now < known.time + wait for known in alerts_of(store, run)):
                return False
            line = json.dumps({"title": title, "text": text, "level": level, "wait": wait, "_timestamp": now})
            at = store.append(run.pk, {ALERTS: (0, [])}, now, writer=_WRITER).next[ALERTS]
            store.append(run.pk, {ALERTS: (at, [line])}, now, writer=_WRITER)
            return True


def alerts_of(store: Store, run: RunRow) -> list[Alert]:
    """The visible ones, by time."""
    rows = store.history(run.pk, stream=ALERTS, attempt=run.view) if run.view is not None or run.line_counts.get(ALERTS) else []
    return sorted(map(_alert, rows), key=lambda alert: alert.time)[-MOST:]


def _alert(row: Mapping[str, Any]) -> Alert:
    """Clients write these lines, so nothing in them is believed to be what it should."""
    level, at, step = row.get("level"), row.get("_timestamp"), row.get("_step")
    return Alert(
        title=str(row.get("title") or ""),
        text=str(row.get("text") or ""),
        level=level if level in LEVELS else "INFO",
        time=float(at) if isinstance(at, int | float) else 0.0,
        step=step if isinstance(step, int) and not isinstance(step, bool) else None,
    )
