"""A Coordinator over a directory, so that programs without torch can be ranks. For tests: it polls files."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import quote

from wbdist.core.coordination import Coordinator
from wbdist.errors import DeadlineError, PeerLostError


class FileCoordinator(Coordinator):
    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        self._directory, self._rank, self._world_size = directory, rank, world_size

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def _path(self, key: str) -> Path:
        return self._directory / quote(key, safe="")

    def put(self, key: str, value: bytes) -> None:
        fresh = self._path(f"{key}.{self._rank}.tmp")
        fresh.write_bytes(value)
        fresh.replace(self._path(key))

    def peek(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def get(self, key: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while (value := self.peek(key)) is None:
            if time.monotonic() > deadline:
                raise DeadlineError(f"rank {self._rank} waited {timeout} s for {key!r}")
            time.sleep(0.002)
        return value

    def claim(self, key: str, value: bytes) -> bytes:
        try:
            with self._path(key).open("xb") as file:
                file.write(value)
            return value
        except FileExistsError:
            return self.get(key, 5)

    def agree(self, name: str, value: bytes | None, timeout: float) -> bytes:
        if self._rank == 0:
            assert value is not None
            self.put(f"agree/{name}", value)
            return value
        try:
            return self.get(f"agree/{name}", timeout)
        except DeadlineError as error:
            raise PeerLostError(str(error)) from error

    def gather(self, name: str, value: bytes, timeout: float) -> list[bytes]:
        self.put(f"gather/{name}/{self._rank}", value)
        return [self.get(f"gather/{name}/{rank}", timeout) for rank in range(self._world_size)]

    def barrier(self, name: str, timeout: float) -> None:
        self.gather(name, b"", timeout)

    def clone(self) -> FileCoordinator:
        return FileCoordinator(self._directory, self._rank, self._world_size)

    def close(self) -> None:
        pass
