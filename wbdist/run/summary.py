"""A run's summary: the last value of each metric, and whatever was set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from wbdist.errors import UsageError
from wbdist.run.values import plain_at


class Summary:
    """Item and attribute access to the summary; every explicit set is journaled before the call returns. A view:
    `values` tells what it holds now.

    Rows fill it too: a `log` of key k after `summary[k] = v` overwrites v, as in W&B.
    """

    def __init__(self, on_change: Callable[[dict[str, Any]], None], values: Callable[[], dict[str, Any]]) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_on_change", on_change)

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets several keys, all or none. Raises UsageError or TypeError for what cannot be stored."""
        if not isinstance(values, Mapping):
            raise UsageError(f"summary.update() takes a dict, not {type(values).__name__}")
        checked = {}
        for key, value in values.items():
            if not isinstance(key, str):
                raise UsageError(f"summary key {key!r} must be a string")
            checked[key] = plain_at(f'summary key "{key}"', value)
        self._on_change(checked)

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = self._values()
        return values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values().get(key, default)

    def keys(self) -> list[str]:
        return list(self._values())

    def items(self) -> list[tuple[str, Any]]:
        return list(self.as_dict().items())

    def __getitem__(self, key: str) -> Any:
        return self._values()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"summary has no key {key!r}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __contains__(self, key: object) -> bool:
        return key in self._values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        return f"Summary({self.as_dict()!r})"
