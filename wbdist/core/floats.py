"""Numbers of any size as floats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction


def nearest_float(value: float | Fraction) -> float:
    """Infinity for what is beyond the greatest float, where `float` raises OverflowError."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
