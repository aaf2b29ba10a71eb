"""`define_metric` as a run's config holds it (`_wandb.m`), and the summaries it asks for, worked out from the history.

An entry is keyed by the numbers of W&B's protobuf message: 1 name, 2 glob, 7 summaries (1 min, 2 max, 3 mean, 4 best, 5 last,
6 none, 7 copy, 8 first), 8 goal (1 minimise, 2 maximise). An exact name beats a glob; globs name no internal key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.server.store import reading
from wbdist.server.store.interface import Bucket
from wbdist.server.store.views import View

_KINDS = {1: "min", 2: "max", 3: "mean", 4: "best", 5: "last", 6: "none", 7: "copy", 8: "first"}
_MAXIMISE = 2


class Definition(msgspec.Struct, frozen=True):
    """What the summary shows of a metric."""

    kinds: frozenset[str]
    maximise: bool


def defined(config: Mapping[str, Any], metrics: Iterable[str]) -> dict[str, Definition]:
    """metric -> its definition, of those that ask for something else than the last value."""
    exact: dict[str, Definition] = {}
    globs: dict[str, Definition] = {}
    for entry in _entries(config):
        asked = entry.get("7")
        kinds = frozenset(_KINDS[kind] for kind in asked if kind in _KINDS) if isinstance(asked, list) else frozenset()
        if not kinds - {"copy"}:
            continue
        found = Definition(kinds, entry.get("8") == _MAXIMISE)
        for field, known in (("1", exact), ("2", globs)):
            if isinstance(name := entry.get(field), str) and name:
                known[name.replace("\\.", ".")] = found
    out = {}
    for metric in metrics:
        fitting = (rule for glob, rule in globs.items() if glob.endswith("*") and metric.startswith(glob[:-1]))
        rule = exact.get(metric) or (None if metric.startswith("_") else next(fitting, None))
        if rule is not None:
            out[metric] = rule
    return out


def _entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    inner = config.get("_wandb")
    value = inner.get("value") if isinstance(inner, dict) else None
    entries = value.get("m") if isinstance(value, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def apply(db: sa.Connection, view: View, config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """`summary` (last values) as the definitions want it, over what is visible."""
    out = dict(summary)
    for metric, rule in defined(config, summary).items():
        if "none" in rule.kinds:
            del out[metric]
            continue
        found = reading.series(db, view, metric, 1)
        if found:
            first = reading.first_value(db, view, metric) if "first" in rule.kinds else None
            out[metric] = _reduced(rule, found[0], summary[metric], first)
    return out


def _reduced(rule: Definition, values: Bucket, last: Any, first: Any) -> dict[str, Any]:
    if isinstance(last, dict):  # reduced already, by a client that knows a part of the history
        last = values.last
    shown: dict[str, Any] = {"min": values.min, "max": values.max, "mean": values.mean, "first": first, "last": last}
    shown["best"] = values.max if rule.maximise else values.min
    if isinstance(last, int):
        shown |= {kind: int(v) for kind in ("min", "max", "best") if isinstance(v := shown[kind], float) and v.is_integer()}
    return {kind: value for kind, value in shown.items() if kind in rule.kinds}
