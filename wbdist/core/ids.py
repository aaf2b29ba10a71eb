"""Run ids as they are made up."""

from __future__ import annotations

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def id_from_entropy(entropy: bytes, length: int = 8) -> str:
    """An id of `length` characters of [a-z0-9], from at least 2 x `length` random bytes (the caller has the randomness)."""
    if len(entropy) < 2 * length:
        raise ValueError(f"{2 * length} bytes are needed for {length} characters, got {len(entropy)}")
    # Two bytes a character: the remainder of 65536 / 36 favours no letter by more than 0.06 %.
    return "".join(ALPHABET[int.from_bytes(entropy[2 * i : 2 * i + 2]) % 36] for i in range(length))
