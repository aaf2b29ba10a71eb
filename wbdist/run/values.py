"""Values as they come from user code -> values a run can keep: rows are flat, config values always have some form."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Final

from wbdist.errors import InvalidArgumentError, UsageError

MAX_ARRAY: Final = 32
"""Elements of an array in a row; of larger ones a histogram is kept, as in W&B."""

RESERVED: Final = frozenset({"_step", "_timestamp", "_runtime"})
"""Columns that the journal makes itself; a user's are dropped, as in W&B."""

MAX_STEP: Final = 2**53 - 1
"""JSON's numbers are exact up to here, and what reads a history goes by them."""

_EXACT: Final = frozenset({float, bool, type(None)})
"""Types that are kept as they are; so are ints of up to 64 bits, and text."""
_INT_MIN: Final = -(1 << 63)
_INT_MAX: Final = (1 << 64) - 1


class NeedsFilesError(Exception):
    """A value has to be written to files first (`run/media/rows.py`); no error of the caller."""


def plain(value: Any) -> Any:
    """`value` made of None, bool, int, float, str, lists and dicts, exactly where that is possible. Raises TypeError.

    Numbers and arrays of other libraries are told by their `item` and `tolist` methods, so none of these libraries is
    imported. As in W&B, an int beyond 64 bits becomes a float, bytes become text, a set becomes a list. A torch tensor on an
    accelerator makes this wait for it.
    """
    kind = type(value)
    if kind in _EXACT:
        return value
    if kind is int or (isinstance(value, int) and not isinstance(value, bool)):
        value = int(value)
        return value if _INT_MIN <= value <= _INT_MAX else _float(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {text(key) if isinstance(key, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [plain(item) for item in sorted(value, key=repr)]  # the order of strings in a set is another in each process
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "replace")
    return _foreign(value)


def plain_at(where: str, value: Any) -> Any:
    """As `plain`; the TypeError names `where`."""
    try:
        return plain(value)
    except RecursionError:
        raise TypeError(f"{where}: it holds itself, or is nested too deep; convert it first") from None
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch's, of a tensor that has no values
        raise TypeError(f"{where}: {error}") from error


def text(value: str) -> str:
    r"""As UTF-8 can hold it. A file's name or an argument in another encoding reaches Python with lone surrogates for the bytes
    that it could not read; they become `\udcff`."""
    if value.isascii():
        return str.__str__(value)
    return str.__str__(value).encode("utf-8", "backslashreplace").decode()


def summary_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values set by hand in plain form: nested dicts stay nested, a histogram stands for a large array."""
    return {key: _summary_value(f'summary key "{key}"', value) for key, value in values.items()}


def _summary_value(where: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_key(key, where): _summary_value(where, item) for key, item in value.items()}
    return plain_at(where, _histogram(value) if _is_large(value) else value)


def config_value(value: Any, where: str) -> Any:
    """As `plain`; what has no such form is kept as its text, as W&B does: a config is for reading (`torch.float32`, a Path)."""
    if isinstance(value, Mapping):
        return {_key(key, where): config_value(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [config_value(item, where) for item in value]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: config_value(getattr(value, name), where) for name in value.__dataclass_fields__}
    if type(value).__module__.startswith("wbdist.run.media."):
        raise TypeError(
            f"{where}: {type(value).__name__} is media, which a config does not hold; log it, or put it in the summary"
        )
    try:
        return plain(value)
    except (TypeError, ValueError, NeedsFilesError):
        return str(value)


def flat_row(data: Mapping[Any, Any]) -> dict[str, Any]:
    """A row in plain form, nested dicts flattened to `a.b.c`. Raises TypeError naming what cannot be logged."""
    if not isinstance(data, Mapping):
        raise TypeError(f"log() takes a dict of str -> value, not {type(data).__name__}")
    row: dict[str, Any] = {}
    try:
        _flatten("", data, row)
    except RecursionError:
        raise TypeError("log(): a dict holds itself, or is nested too deep; take it apart first") from None
    return row


def as_step(step: object) -> int:
    """Takes numpy's integers; raises TypeError for floats, bools and text, UsageError for what no history can hold."""
    if isinstance(step, bool):
        raise TypeError("step must be an int, not a bool")
    try:
        taken = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"step must be an int, not {type(step).__name__} ({step!r})") from None
    if taken > MAX_STEP:
        raise InvalidArgumentError(
            f"step={taken} is more than {MAX_STEP} (2**53 - 1), the largest that a history holds; log such a count (a time in "
            'nanoseconds?) as a metric, and define_metric("*", step_metric=...) to draw the others over it'
        )
    return taken


def _flatten(prefix: str, data: Mapping[Any, Any], row: dict[str, Any]) -> None:
    for raw, value in data.items():
        key = prefix + _key(raw, "log()")
        kind = type(value)
        if kind in _EXACT:
            if key not in RESERVED:
                row[key] = value
        elif isinstance(value, Mapping) and "_type" not in value:  # with it: one media value
            _flatten(f"{key}.", value, row)
        elif key not in RESERVED:
            row[key] = plain_at(f'log(): key "{key}"', _histogram(value) if _is_large(value) else value)


def _key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return text(key)
    raise TypeError(f"{where}: key {key!r} is {type(key).__name__}; keys must be strings")


def _foreign(value: Any) -> Any:
    """Scalars and arrays of numpy, torch and their like."""
    if callable(item := getattr(value, "item", None)) and _size(value) == 1:
        inner = item()
        return float(value) if type(inner) is type(value) else plain(inner)  # numpy's longdouble stays one
    if callable(tolist := getattr(value, "tolist", None)):
        return plain(tolist())
    if type(value).__module__ == "wbdist.run.media.histogram":
        return value.to_json()
    if getattr(value, "needs_files", False) or is_foreign_media(value):
        raise NeedsFilesError
    raise TypeError(
        f"{type(value).__module__}.{type(value).__qualname__} is no number, text, list, dict or array; convert it first"
    )


def is_foreign_media(value: Any) -> bool:
    """Whether this is matplotlib's (or `pyplot`), a PIL image or a pandas data frame; told by names, none is imported."""
    library = type(value).__module__.partition(".")[0]
    if library == "matplotlib":
        return hasattr(value, "figure") or hasattr(value, "savefig")
    if library == "pandas":
        return hasattr(value, "itertuples")
    return library == "PIL" or getattr(value, "__name__", "") == "matplotlib.pyplot"


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise TypeError(
            f"an int of {value.bit_length()} bits is larger than any float; log its logarithm or its text"
        ) from None


def _is_large(value: Any) -> bool:
    """Whether this is an array of more elements than a row takes; lists are kept as they are."""
    return callable(getattr(value, "tolist", None)) and _size(value) > MAX_ARRAY


def _histogram(values: Any) -> Any:
    from wbdist.run.media.histogram import ROW_BINS, Histogram

    try:
        return Histogram(values, num_bins=ROW_BINS).to_json()
    except UsageError:
        return values  # not of numbers


def _size(value: Any) -> int:
    """Number of elements: torch's `numel()`, numpy's `size`; 1 for scalars that have neither."""
    numel = getattr(value, "numel", None)
    size = numel() if callable(numel) else getattr(value, "size", 1)
    return 1 if callable(size) else int(size)
