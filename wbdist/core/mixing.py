"""Stable pseudo-random integers from words: the same on every machine, Python and library version, for ever.

SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64 bits with full avalanche, in integer arithmetic only.
Not for cryptography.
"""

from __future__ import annotations

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio, odd: SplitMix64's increment."""


def mix64(*words: int) -> int:
    """One 64-bit integer from integers of any size; order matters, each is taken modulo 2**64."""
    state = 0
    for word in words:
        state = _finalise(((state ^ (word & MASK64)) + GOLDEN) & MASK64)
    return state


def _finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)
