"""What a run's row says of its live history: line counts, last step, metric names, summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa

from wbdist.core.position import HISTORY
from wbdist.server.store import definitions
from wbdist.server.store.chunks import load_many
from wbdist.server.store.columns import steps_of
from wbdist.server.store.lines import visible_keys
from wbdist.server.store.views import View, chunks_of

_SHOWN = frozenset({"_step", "_timestamp", "_runtime"})
"""Internal keys that belong to a summary."""


def recount(db: sa.Connection, view: View, *, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Columns of `runs` as the view has them; with `config` (the run's, for its metric definitions) the summary too."""
    numeric, reached, latest = _scan(db, view, summary=config is not None)
    change: dict[str, Any] = {
        "line_counts": json.dumps({stream: view.total(stream) for stream in view.streams()}),
        "metrics": json.dumps(sorted(visible_keys(numeric))),
        "last_step": reached,
    }
    if config is not None:
        change |= {"summary": json.dumps(definitions.apply(db, view, config, latest)), "summary_given": False}
    return change


def summary_of(db: sa.Connection, view: View, config: Mapping[str, Any]) -> dict[str, Any]:
    """The last visible value that is not None of every key, or what `define_metric` asked for instead."""
    return definitions.apply(db, view, config, _scan(db, view, summary=True)[2])


def last_step(db: sa.Connection, view: View) -> int:
    """The greatest visible step; -1 when there is none."""
    found = -1
    for segment in view.segments:
        for part in chunks_of(db, view, segment, HISTORY).values():
            for chunk in part:
                if chunk.step_hi <= found:
                    continue
                if chunk.visible == chunk.rows:
                    found = chunk.step_hi
                else:
                    steps = steps_of(load_many(db, [chunk.pk], ["_step"])[chunk.pk], chunk.rows)
                    found = max(found, int(np.max(steps[: chunk.visible])))
    return found


def _scan(db: sa.Connection, view: View, *, summary: bool) -> tuple[dict[str, bool], int, dict[str, Any]]:
    """(keys that hold a number, last step, last values where `summary` asks for them).

    Reads index entries, and of the data what is needed to find each key's last value: for a run whose rows are alike that is
    one chunk, whatever its length, and the chunk that the base cuts in two.
    """
    numeric: dict[str, bool] = {}
    reached = -1
    latest: dict[str, Any] = {}
    for segment in reversed(view.segments):
        newest: dict[str, tuple[int, Any]] = {}
        for found in chunks_of(db, view, segment, HISTORY, keys=True).values():
            seen: set[str] = set()
            for chunk in reversed(found):
                cut = chunk.visible < chunk.rows
                if not cut:
                    reached = max(reached, chunk.step_hi)
                    numeric.update((key, True) for key, is_numeric in chunk.numeric.items() if is_numeric)
                unknown = [key for key in chunk.numeric if key not in seen and key not in latest and in_summary(key)]
                wanted = {*unknown, *(key for key in chunk.numeric if cut and key not in numeric), "_step"}
                if not (unknown and summary) and not cut:
                    continue
                loaded = load_many(db, [chunk.pk], sorted(wanted))[chunk.pk]
                steps = steps_of(loaded, chunk.rows)
                if cut:
                    reached = max(reached, int(np.max(steps[: chunk.visible])))
                for key, column in loaded.items():
                    stop = column.span(0, chunk.visible)[1]
                    if cut and column.numeric(stop):
                        numeric[key] = True
                    at = column.last(stop) if summary and key in unknown else -1
                    if at >= 0:
                        seen.add(key)
                        step = int(steps[column.indices()[at]])
                        if key not in newest or step >= newest[key][0]:
                            newest[key] = (step, column.values(at, at + 1)[0])
        latest |= {key: value for key, (_, value) in newest.items()}
    return numeric, reached, latest


def in_summary(key: str) -> bool:
    """Whether a history key shows up in the summary that the server makes where no client gives one."""
    return not key.startswith("_") or key in _SHOWN
