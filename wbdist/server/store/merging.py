"""Configs of several clients as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def merged_config(old: dict[str, Any], new: dict[str, Any], keep: Iterable[str] | None = None) -> dict[str, Any]:
    """`new` over `old`. Of the user's keys of `old` those in `keep` stay, all when it is None: a client sends the whole of what
    it knows. `_wandb` keeps one environment (`e`) per writer: they do not know each other's."""
    kept = old if keep is None else {key: old[key] for key in keep if key in old}
    merged = {**kept, **new}
    ours, theirs = (e.get("value") if isinstance(e := config.get("_wandb"), dict) else None for config in (old, new))
    if isinstance(ours, dict):
        theirs = theirs if isinstance(theirs, dict) else {}
        value = {**ours, **theirs}
        if isinstance(ours.get("e"), dict) and isinstance(theirs.get("e"), dict):
            value["e"] = {**ours["e"], **theirs["e"]}
        merged["_wandb"] = {"value": value}
    return merged
