"""One thread per rank with a real Coordinator contract over shared memory: breadth without processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from wbdist.errors import DeadlineError, PeerLostError


class Board:
    """What all ranks see."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.values: dict[str, bytes] = {}

    def wait_for(self, keys: list[str], timeout: float) -> list[str]:
        """The keys still missing after at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while missing := [key for key in keys if key not in self.values]:
                left = deadline - time.monotonic()
                if left <= 0:
                    return missing
                self.changed.wait(left)
        return []


class ThreadCoordinator:
    """A Coordinator for ranks that are threads of one process."""

    def __init__(self, board: Board, rank: int, world_size: int) -> None:
        self.board = board
        self._rank = rank
        self._world_size = world_size

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def put(self, key: str, value: bytes) -> None:
        with self.board.changed:
            self.board.values[key] = value
            self.board.changed.notify_all()

    def get(self, key: str, timeout: float) -> bytes:
        if self.board.wait_for([key], timeout):
            raise DeadlineError(f"{key} was not set within {timeout} s")
        return self.board.values[key]

    def peek(self, key: str) -> bytes | None:
        return self.board.values.get(key)

    def claim(self, key: str, value: bytes) -> bytes:
        with self.board.changed:
            standing = self.board.values.setdefault(key, value)
            self.board.changed.notify_all()
            return standing

    def agree(self, name: str, value: bytes | None, timeout: float) -> bytes:
        if self._rank == 0:
            assert value is not None
            self.put(f"agree/{name}", value)
        if self.board.wait_for([f"agree/{name}"], timeout):
            raise PeerLostError(f"rank 0 did not decide {name} within {timeout:.1f} s")
        return self.board.values[f"agree/{name}"]

    def gather(self, name: str, value: bytes, timeout: float) -> list[bytes]:
        keys = [f"gather/{name}/{rank}" for rank in range(self._world_size)]
        assert keys[self._rank] not in self.board.values, f"{name} was used twice"
        self.put(keys[self._rank], value)
        if missing := self.board.wait_for(keys, timeout):
            ranks = [int(key.rpartition("/")[2]) for key in missing]
            raise PeerLostError(f"ranks {ranks} did not come to {name} within {timeout:.1f} s")
        return [self.board.values[key] for key in keys]

    def barrier(self, name: str, timeout: float) -> None:
        self.gather(f"barrier/{name}", b"", timeout)

    def clone(self) -> ThreadCoordinator:
        return ThreadCoordinator(self.board, self._rank, self._world_size)

    def close(self) -> None:
        """Nothing is held."""


def alone() -> ThreadCoordinator:
    """The coordinator of a job of one rank."""
    return ThreadCoordinator(Board(), 0, 1)


def run_ranks(world_size: int, act: Callable[[ThreadCoordinator], Any], timeout: float = 120.0) -> list[Any]:
    """`act(coordinator)` on a thread per rank; what each returned or raised, by rank. Fails when one does not end."""
    board = Board()
    outcomes: list[Any] = [None] * world_size

    def rank(number: int) -> None:
        try:
            outcomes[number] = act(ThreadCoordinator(board, number, world_size))
        except BaseException as error:  # noqa: BLE001  (the outcome of that rank)
            outcomes[number] = error

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(world_size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for number, thread in enumerate(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"rank {number} still runs after {timeout} s"
    return outcomes
