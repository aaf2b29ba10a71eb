"""What a rank may ask of its peers, as an interface.

The mechanisms (checkpoint, preemption, aggregation) meet their peers only through this; `distributed` implements it over
the c10d store, and over nothing at all for a process that is alone. None of these calls is a collective of the process
group, so all are allowed off the training thread; every wait has a deadline and its error names the missing ranks.
"""

from __future__ import annotations

from typing import Protocol


class Coordinator(Protocol):
    """Key-value coordination of one attempt's ranks. Keys live in a namespace of their own for each attempt."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def put(self, key: str, value: bytes) -> None:
        """Any rank, any time; does not block on peers. Last write wins."""
        ...

    def get(self, key: str, timeout: float) -> bytes:
        """Blocks until `key` exists, at most `timeout` seconds, then raises DeadlineError naming the key."""
        ...

    def peek(self, key: str) -> bytes | None:
        """The value now, or None; does not wait."""
        ...

    def claim(self, key: str, value: bytes) -> bytes:
        """First writer wins, atomically: returns the value that stands (ours when we were first)."""
        ...

    def agree(self, name: str, value: bytes | None, timeout: float) -> bytes:
        """All ranks, each `name` once: rank 0's `value`, on every rank. Other ranks pass None.

        Blocks at most `timeout` seconds; raises PeerLostError naming rank 0.
        """
        ...

    def gather(self, name: str, value: bytes, timeout: float) -> list[bytes]:
        """All ranks, each `name` once: everybody's value, by rank. Raises PeerLostError naming the missing ranks."""
        ...

    def barrier(self, name: str, timeout: float) -> None:
        """All ranks, each `name` once: returns when all arrived. Raises PeerLostError naming the missing ranks."""
        ...

    def clone(self) -> Coordinator:
        """The same keys for another part of the program, which may use and close it on its own, from any thread: no call holds
        the others up while it waits for a peer."""
        ...

    def close(self) -> None:
        """Releases the connection. Idempotent."""
        ...
