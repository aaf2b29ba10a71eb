"""Values as they come from user code -> values a run can keep: rows are flat, config values always have some form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wbdist.run.journal import JournalWriter
from wbdist.run.journal_values import plain as _plain

MAX_ARRAY = 32
"""Elements of an array or list in a row; larger ones want a histogram."""

RESERVED = frozenset({"_step", "_timestamp", "_runtime"})
"""Columns that the journal makes itself; a user's are dropped, as in W&B."""


def plain(value: Any, where: str) -> Any:
    """`value` made of None, bool, int, float, str, lists and dicts. Raises TypeError naming `where` when there is no such form.

    A torch tensor on an accelerator makes this wait for it: log what the step has brought to the host anyway.
    """
    try:
        return _plain(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: {error}") from error


def config_value(value: Any, where: str) -> Any:
    """As `plain`; what has no such form is kept as its text, as W&B does: a config is for reading (`torch.float32`, a Path)."""
    if isinstance(value, Mapping):
        return {_key(key, where): config_value(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [config_value(item, where) for item in value]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: config_value(getattr(value, name), where) for name in value.__dataclass_fields__}
    try:
        return _plain(value)
    except (TypeError, ValueError):
        return str(value)


def flat_row(data: Mapping[Any, Any]) -> dict[str, Any]:
    """A row in plain form, nested dicts flattened to `a.b.c`. Raises TypeError naming what cannot be logged."""
    row: dict[str, Any] = {}
    _flatten("", data, row)
    return row


def _flatten(prefix: str, data: Mapping[Any, Any], row: dict[str, Any]) -> None:
    for raw, value in data.items():
        key = prefix + _key(raw, "log()")
        if isinstance(value, Mapping) and "_type" not in value:  # with it: one media value
            _flatten(f"{key}.", value, row)
        elif key not in RESERVED:
            row[key] = kept = plain(value, f'log(): key "{key}"')
            if isinstance(kept, list) and len(kept) > MAX_ARRAY:
                raise TypeError(
                    f'log(): key "{key}" has {len(kept)} elements, at most {MAX_ARRAY} fit in a row; log numbers made of them'
                )


def _key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return str(key)
    raise TypeError(f"{where}: key {key!r} is {type(key).__name__}; keys must be strings")


class RowJournal(JournalWriter):
    """A journal writer whose rows may hold anything `log` accepts.

    The writer packs a row of a shape it knows without looking further, and sends every other row through `_append_other`:
    so flattening and converting there costs the common row nothing, where a check in front would cost it a fifth.
    """

    reduced: dict[str, Any] | None = None
    """What became of the last row that was not packed at once; whoever reads it sets it back to None."""

    def _append_other(self, data: Mapping[str, Any], step: int | None, commit: bool | None, time: float) -> None:
        row = flat_row(data)
        super()._append_other(row, step, commit, time)
        self.reduced = row
