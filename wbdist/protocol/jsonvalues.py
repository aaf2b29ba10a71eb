"""JSON as W&B's wire writes it: bare NaN and Infinity inside lines and JSON strings, never in an answer's own body."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from wbdist.core.floats import nearest_float

_NON_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}
_INT64 = range(-(2**63), 2**64)


def loads(text: str | bytes) -> Any:
    """A value from JSON that may hold bare NaN, Infinity, -Infinity. Raises ValueError on anything else malformed.

    The strict parser goes first: it is several times faster, and most lines are strict JSON.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            return json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def loads_object(text: str | bytes, what: str) -> dict[str, Any]:
    """As `loads`, for a value that must be an object; `what` names it in the ValueError."""
    try:
        value = loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, not {type(value).__name__}")
    return value


def dumps(value: Any) -> str:
    """A JSON string as W&B writes them: compact, bare NaN and Infinity (msgspec and orjson would turn them into null)."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def plain(value: Any) -> Any:
    """`value` as strict JSON: non-finite floats become "NaN", "Infinity", "-Infinity", integers beyond 64 bits floats.

    One bare Infinity in an answer's body makes W&B's client fail as a whole; strings are what it understands there.
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return _NON_FINITE.get(value, "NaN")
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value if value in _INT64 else plain(nearest_float(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
