"""`define_metric` as a run's config holds it (`_wandb.m`), and the summaries it asks for, worked out from the history."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from wbdist.core.metrics import Definition, Definitions, from_wandb
from wbdist.core.summary import INTERNAL
from wbdist.server.store import reading
from wbdist.server.store.interface import Bucket
from wbdist.server.store.views import View


def defined(config: Mapping[str, Any], metrics: Iterable[str]) -> dict[str, Definition]:
    """metric -> its definition, of those that ask for something else than the last value."""
    known = Definitions()
    for call in from_wandb(_listed(config)):
        known.define(call)
    return {metric: rule for metric in metrics if (rule := known.of(metric)) is not None and not rule.plain}


def _listed(config: Mapping[str, Any]) -> object:
    inner = config.get("_wandb")
    value = inner.get("value") if isinstance(inner, dict) else None
    return value.get("m") if isinstance(value, dict) else None


def apply(db: sa.Connection, view: View, config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """`summary` (last values) as the definitions want it, over what is visible; with the counts and sums that a client needs
    to go on with means (`core.summary.SummaryTracker.state`)."""
    out = dict(summary)
    sums: dict[str, Any] = {}
    rules = defined(config, summary)
    values = reading.series(db, view, [metric for metric, rule in rules.items() if "none" not in rule.summary], 1)
    for metric, rule in rules.items():
        if "none" in rule.summary:
            del out[metric]
        elif found := values.get(metric):
            first = reading.first_value(db, view, metric) if "first" in rule.summary else None
            out[metric] = _reduced(rule, found[0], summary[metric], first)
            if "mean" in rule.summary:
                sums[metric] = [found[0].count, found[0].count * found[0].mean]
    return {**out, INTERNAL: {"sums": sums}} if sums else out


def _reduced(rule: Definition, values: Bucket, last: Any, first: Any) -> dict[str, Any]:
    if isinstance(last, dict):  # reduced already, by a client that knows a part of the history
        last = values.last
    shown: dict[str, Any] = {"min": values.min, "max": values.max, "mean": values.mean, "first": first, "last": last}
    shown["best"] = values.max if rule.goal == "max" else values.min
    if isinstance(last, int):
        shown |= {kind: int(v) for kind in ("min", "max", "best") if isinstance(v := shown[kind], float) and v.is_integer()}
    return {kind: value for kind, value in shown.items() if kind in rule.summary}
