"""Values as a journal holds them: what `log` accepts, reduced to None, bool, int, float, str, bytes-free lists and dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_EXACT: Final = frozenset({float, int, bool, str, type(None)})
_INT_MIN: Final = -(1 << 63)
_INT_MAX: Final = (1 << 64) - 1


def plain_row(data: Mapping[str, Any]) -> dict[str, Any]:
    """The top level of a row. Raises TypeError naming the key that is no str, or whose value cannot be journalled."""
    row: dict[str, Any] = {}
    for key, value in data.items():
        if type(key) is not str:
            if not isinstance(key, str):
                raise TypeError(f"keys of a logged row must be str; got {key!r} ({type(key).__name__})")
            key = str(key)  # noqa: PLW2901  (a str subclass, such as an enum member)
        try:
            row[key] = value if type(value) in _EXACT and type(value) is not int else plain(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"the value of {key!r} cannot be logged: {error}") from error
    return row


def plain(value: Any) -> Any:
    """`value` reduced, exactly where that is possible.

    Numbers and arrays of other libraries are told by their `item` and `tolist` methods, so none of these libraries is
    imported. As in W&B, an int beyond 64 bits becomes a float, bytes become text, a set becomes a list.
    """
    kind = type(value)
    if kind is int or (kind not in _EXACT and isinstance(value, int) and not isinstance(value, bool)):
        value = int(value)
        return value if _INT_MIN <= value <= _INT_MAX else float(value)
    if kind in _EXACT:
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {key if type(key) is str else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "replace")
    return _foreign(value)


def _foreign(value: Any) -> Any:
    """Scalars and arrays of numpy, torch and their like."""
    if callable(getattr(value, "detach", None)):
        value = value.detach()
    if callable(getattr(value, "item", None)) and _size(value) == 1:
        return plain(value.item())
    if callable(getattr(value, "tolist", None)):
        return plain(value.tolist())
    raise TypeError(
        f"{type(value).__module__}.{type(value).__qualname__} is no number, text, list, dict or array; convert it first"
    )


def _size(value: Any) -> int:
    """Number of elements: numpy's `size`, torch's `numel()`; 1 for scalars that have neither."""
    size = getattr(value, "size", 1)
    if callable(size):
        numel = getattr(value, "numel", None)
        size = numel() if callable(numel) else 1
    return int(size)
