"""What a script asks for when ranks' values are to become one, checked where it asks: an aggregator could only fail at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wbdist.core.reducers import NAMES, is_known
from wbdist.errors import UsageError


def check_operation(op: Any, where: str) -> None:
    """Raises UsageError, which begins with `where`, for what is none of `core/reducers.py`."""
    if not is_known(op):
        raise UsageError(f"{where} is not known; choose one of: {', '.join(NAMES)}")


def check_operations(operations: Any) -> None:
    """The same for operations by key."""
    if not isinstance(operations, Mapping) or not all(isinstance(key, str) for key in operations):
        raise UsageError(
            f"define_reduction({operations!r:.80}): give the operation of each key by its name, such as "
            '{"tokens": "sum", "lr": "first"}; all other keys are the mean'
        )
    for key, op in operations.items():
        check_operation(op, f"define_reduction(): {op!r} for {key!r}")
