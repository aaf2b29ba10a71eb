"""The data directory: one server at a time, and where it can be reached."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

import msgspec

from wbdist.disk import replace_private
from wbdist.errors import EXIT_FENCED, EnvironmentFault

LOCK_FILE = "server.lock"
ADDRESS_FILE = "server.json"


class ServerAddress(msgspec.Struct, frozen=True):
    """server.json: written when the server listens, removed when it stops; stale after a SIGKILL (see `running_server`)."""

    url: str
    pid: int
    started_at: float
    version: str


class DataDirInUseError(EnvironmentFault):
    """Another server has the directory; the message has its address."""

    exit_code = EXIT_FENCED


class DataDirLock:
    """The exclusive right to a data directory, for as long as this process lives; the kernel takes it back even on SIGKILL."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def release(self) -> None:
        """Idempotent."""
        self._file.close()


def lock(data_dir: Path) -> DataDirLock:
    """Makes the directory (mode 0700) if need be. Does not wait: raises DataDirInUseError with the first server's address."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (data_dir / LOCK_FILE).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        address = read_address(data_dir)
        where = (
            f"at {address.url} (pid {address.pid})"
            if address
            else f"(pid {lock_holder(data_dir) or 'unknown'}, still starting)"
        )
        raise DataDirInUseError(
            f"another wbdist server {where} has the data directory {data_dir}; use it, or stop it first"
        ) from None
    except OSError as error:
        file.close()
        raise EnvironmentFault(
            f"cannot lock {data_dir / LOCK_FILE}: {error}; the data directory must be on a local disk"
        ) from error
    (data_dir / ADDRESS_FILE).unlink(missing_ok=True)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return DataDirLock(file)


def lock_holder(data_dir: Path) -> int | None:
    """Pid of the live server of this directory, also while it starts or stops; None when there is none."""
    try:
        with (data_dir / LOCK_FILE).open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


def running_server(data_dir: Path) -> ServerAddress | None:
    """The address of the live server of this directory; None when there is none, or it does not listen yet."""
    return read_address(data_dir) if lock_holder(data_dir) is not None else None


def read_address(data_dir: Path) -> ServerAddress | None:
    """server.json as it lies there, stale or not."""
    try:
        return msgspec.json.decode((data_dir / ADDRESS_FILE).read_bytes(), type=ServerAddress)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_address(data_dir: Path, address: ServerAddress) -> None:
    """Call when connections are accepted."""
    replace_private(data_dir / ADDRESS_FILE, msgspec.json.encode(address) + b"\n", synced=False)


def remove_address(data_dir: Path) -> None:
    """Call before the server stops listening."""
    (data_dir / ADDRESS_FILE).unlink(missing_ok=True)
