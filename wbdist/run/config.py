"""A run's config: what was decided before training, set once and then guarded against silent change."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from wbdist.errors import ConfigError, UsageError
from wbdist.run import config_files
from wbdist.run.values import config_value


class Config:
    """Attribute and item access to config values; thread-safe as far as a dict is.

    Changing a key to another value raises ConfigError unless allowed; setting it to the same value again changes
    nothing. Nested dicts come back as copies: assigning to a key of one changes nothing here and warns; assign the whole.
    Each accepted change is journaled before the call returns. Keys that a sweep decided stay: that they are not changed is
    said, once a key, and is no error.
    """

    def __init__(self, on_change: Callable[[dict[str, Any]], None], *, allow_val_change: bool = False) -> None:
        object.__setattr__(self, "_values", {})
        object.__setattr__(self, "_on_change", on_change)
        object.__setattr__(self, "_allow", allow_val_change)
        object.__setattr__(self, "_locked", {})

    def lock(self, keys: Iterable[str], refused: Callable[[str, Any, Any], None]) -> None:
        """From now on these keys stay as they are. `refused` is called with the key, its value and the one that it will not
        have, the first time for each key."""
        object.__setattr__(self, "_locked", dict.fromkeys(keys, refused))

    def update(self, values: Any, allow_val_change: bool | None = None) -> None:
        """Sets several keys at once, all or none. `values`: a mapping, or an object with attributes (argparse.Namespace).

        Raises ConfigError naming the first key that would change, UsageError for keys and values that cannot be stored.
        """
        allowed = self._allow if allow_val_change is None else allow_val_change
        changed: dict[str, Any] = {}
        for key, value in checked(values).items():
            if key in self._values:
                old = self._values[key]
                if _same(old, value):
                    continue
                if key in self._locked:
                    self._refuse(key, old, value)
                    continue
                if not allowed:
                    raise ConfigError(
                        f'config key "{key}" is {old!r} and would become {value!r}; pass allow_val_change=True to '
                        "config.update() or init() if that is meant"
                    )
            changed[key] = value
        if changed:
            self._on_change(changed)
            self._values.update(changed)

    def _refuse(self, key: str, old: Any, value: Any) -> None:
        refused, self._locked[key] = self._locked[key], _nothing
        refused(key, old, value)

    def setdefaults(self, values: Any) -> None:
        """Sets the keys that are not set yet."""
        self.update({key: value for key, value in checked(values).items() if key not in self._values})

    def as_dict(self) -> dict[str, Any]:
        return deepcopy(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        return _copy(key, self._values[key]) if key in self._values else default

    def keys(self) -> list[str]:
        return list(self._values)

    def items(self) -> list[tuple[str, Any]]:
        return list(self.as_dict().items())

    def __getitem__(self, key: str) -> Any:
        return _copy(key, self._values[key])

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"config has no key {key!r}; it has: {', '.join(self._values) or 'none'}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Config({self._values!r})"


class NestedCopy(dict[str, Any]):
    """A dict inside the config, as it is now. Changing it changes nothing in the config; who assigns to it is told so."""

    def __init__(self, where: str, items: dict[str, Any]) -> None:
        super().__init__({key: _copy(f"{where}.{key}", value) for key, value in items.items()})
        self._where = where

    def __setitem__(self, key: str, value: Any) -> None:
        warnings.warn(
            f'config "{self._where}" was read as a copy: setting {key!r} in it does not change the config; assign the whole '
            f"value, as in run.config.update({{...}}, allow_val_change=True)",
            stacklevel=2,
        )
        super().__setitem__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # what is copied or pickled from it is a plain dict


def _copy(where: str, value: Any) -> Any:
    return NestedCopy(where, value) if isinstance(value, dict) else deepcopy(value)


def checked(values: Any) -> dict[str, Any]:
    """`values` as a plain dict with string keys, leading and trailing `-` removed as W&B does (`--lr` -> `lr`)."""
    if isinstance(values, Config):
        values = values.as_dict()
    elif isinstance(values, str | os.PathLike):
        values = config_files.load(values)
    elif callable(flags := getattr(values, "flag_values_dict", None)):  # absl's FLAGS
        values = flags()
    elif not isinstance(values, Mapping):
        if isinstance(values, bytes | int | float | list | tuple | types.ModuleType) or not hasattr(values, "__dict__"):
            raise UsageError(
                f"config must be a dict, an argparse.Namespace or the path of a YAML file, not {type(values).__name__}"
            )
        values = vars(values)
    found: dict[str, Any] = {}
    for raw, value in values.items():
        if not isinstance(raw, str) or not raw.strip("-"):
            raise UsageError(f"config key {raw!r} must be a non-empty string")
        found[raw.strip("-")] = config_value(value, f'config key "{raw}"')
    return found


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with `above` laid over it, dicts inside key by key, as W&B lays a sweep's parameters over the config."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _nothing(*_: Any) -> None:
    """Said already."""


def _same(old: Any, new: Any) -> bool:
    # repr separates 1 from True and 1.0, and finds nan equal to itself.
    return bool(old is new or (type(old) is type(new) and (old == new or repr(old) == repr(new))))
