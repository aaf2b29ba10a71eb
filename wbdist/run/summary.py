"""A run's summary as scripts see it: what rows and defined metrics said last, and whatever was set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from wbdist.errors import UsageError

Change = Callable[[dict[str, Any], Sequence[str]], None]
"""(values to set, keys to delete); all or none."""


class Summary:
    """Item and attribute access to the summary; every change is journaled before the call returns. A view: `values` tells what
    it holds now, so reading a key in a loop costs a copy each time.

    Rows fill it too: a `log` of key k after `summary[k] = v` overwrites v, as in W&B. A value may be nested; what is assigned
    inside a nested one (`summary["a"]["b"] = 1`) is kept as well.
    """

    def __init__(self, on_change: Change, values: Callable[[], dict[str, Any]]) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_on_change", on_change)

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets several keys, all or none. Raises UsageError or TypeError for what cannot be stored."""
        if not isinstance(values, Mapping):
            raise UsageError(f"summary.update() takes a dict, not {type(values).__name__}")
        for key in values:
            if not isinstance(key, str):
                raise UsageError(f"summary key {key!r} must be a string")
        self._on_change(dict(values), ())

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = deepcopy(self._values())
        return values

    def get(self, key: str, default: Any = None) -> Any:
        values = self._values()
        return self._shown(key, values[key]) if key in values else default

    def keys(self) -> list[str]:
        return list(self._values())

    def items(self) -> list[tuple[str, Any]]:
        return list(self.as_dict().items())

    def __getitem__(self, key: str) -> Any:
        return self._shown(key, self._values()[key])

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        if key not in self._values():
            raise KeyError(key)
        self._on_change({}, (key,))

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"summary has no key {key!r}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __delattr__(self, key: str) -> None:
        try:
            del self[key]
        except KeyError:
            raise AttributeError(f"summary has no key {key!r}") from None

    def __contains__(self, key: object) -> bool:
        return key in self._values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        return f"Summary({self.as_dict()!r})"

    def _shown(self, key: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        root = deepcopy(value)
        return NestedSummary(root, lambda: self.update({key: root}))


class NestedSummary(dict[str, Any]):
    """A dict inside the summary, as it was when it was read; what is changed in it is changed in the summary."""

    def __init__(self, items: dict[str, Any], save: Callable[[], None]) -> None:
        super().__init__(
            {key: NestedSummary(value, save) if isinstance(value, dict) else value for key, value in items.items()}
        )
        self._under = items
        self._save = save

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def update(self, values: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Sets several keys; saved together."""
        self._under.update(values)
        self._save()
        super().update(
            {key: NestedSummary(value, self._save) if isinstance(value, dict) else value for key, value in values.items()}
        )

    def __delitem__(self, key: str) -> None:
        del self._under[key]
        self._save()
        super().__delitem__(key)

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None
