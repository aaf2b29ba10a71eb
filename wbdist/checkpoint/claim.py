"""Who owns a job's directory, and which attempt this is.

The directory is the job's identity: whoever starts the same command with the same `checkpoint_dir` continues the same
run. Layout beside the checkpoints:

    job.json            the run this directory belongs to; written once
    attempts/000003.json  one file an attempt, created O_EXCL: the number is taken by whoever creates it
    .lock               held (POSIX lock) by rank 0 of the live attempt

The lock comes first, so two jobs on one directory cannot both take a number; the numbers come from files rather than
from a launcher's restart counter because no launcher's counter survives a requeue (torchelastic's does not even name an
incarnation).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import time
from pathlib import Path
from typing import Self

import msgspec

from wbdist.checkpoint.retention import newest_attempt
from wbdist.core.ids import id_from_entropy
from wbdist.disk import sync_directory
from wbdist.errors import CheckpointError, JobAlreadyRunningError

_FLOCK = "hhqqi"
"""The kernel's `struct flock`."""


class JobIdentity(msgspec.Struct, frozen=True):
    """The run that a directory belongs to. Never changes after the first attempt."""

    run_id: str
    project: str
    entity: str
    name: str | None
    created_at: float


class Attempt(msgspec.Struct, frozen=True):
    """One life of the job."""

    number: int
    nonce: str
    started_at: float
    host: str
    pid: int
    cause: str
    """Why it exists: 'start' for the first, else what the launcher said, or 'restart'."""


class Claim:
    """Rank 0's hold on a job directory, from `take` until `release` or the death of the process."""

    def __init__(self, directory: Path, lock: int, job: JobIdentity, attempt: Attempt) -> None:
        self.directory = directory
        self.job = job
        self.attempt = attempt
        self._lock: int | None = lock

    @classmethod
    def take(
        cls,
        directory: Path,
        *,
        run_id: str | None,
        project: str,
        entity: str,
        name: str | None,
        cause: str = "",
        timeout: float = 30.0,
    ) -> Self:
        """Rank 0 only. Waits up to `timeout` seconds for a previous attempt that is still dying.

        Raises JobAlreadyRunningError naming the holder when the directory stays locked, CheckpointError when the
        directory belongs to another run than the `run_id` asked for or cannot be written.
        """
        try:
            (directory / "attempts").mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint_dir {str(directory)!r} cannot be used: {error}. Give a writable directory."
            ) from error
        try:
            _lock_within(lock, directory, timeout)
            job = _identity(
                directory, JobIdentity(run_id or id_from_entropy(os.urandom(16)), project, entity, name, time.time())
            )
            if run_id is not None and job.run_id != run_id:
                raise CheckpointError(
                    f"checkpoint_dir {str(directory)!r} belongs to run {job.run_id!r}, but run {run_id!r} was asked for. "
                    "Use another checkpoint_dir for another run."
                )
            if (job.project, job.entity) != (project, entity):
                raise CheckpointError(
                    f"checkpoint_dir {str(directory)!r} belongs to project {job.entity + '/' + job.project!r}, but "
                    f"{entity + '/' + project!r} was asked for. Use another checkpoint_dir for another project."
                )
            attempt = _next_attempt(directory, cause)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {attempt.pid} on {attempt.host}, attempt {attempt.number}".encode(), 0)
        except BaseException:
            os.close(lock)
            raise
        return cls(directory, lock, job, attempt)

    def release(self) -> None:
        """Lets the next attempt in. Idempotent; the kernel does it when the process dies."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock_within(lock: int, directory: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() >= deadline:
                holder = os.pread(lock, 200, 0).decode(errors="replace") or "an unknown process"
                raise JobAlreadyRunningError(
                    f"checkpoint_dir {str(directory)!r} is in use by {holder}; waited {timeout:.0f} s for it to end. "
                    "Stop that job, or give this one another checkpoint_dir."
                ) from error
            time.sleep(0.05)
        else:
            return


def _identity(directory: Path, ours: JobIdentity) -> JobIdentity:
    path = directory / "job.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobIdentity)
    except FileNotFoundError:
        _write_durably(path, msgspec.json.encode(ours))
        return ours
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{path} does not say which run the directory belongs to: {error}. Move the directory away to start anew."
        ) from error


def _next_attempt(directory: Path, cause: str) -> Attempt:
    # Checkpoints may have been brought here by hand, without the records of the attempts that made them.
    number = newest_attempt(directory) + 1
    attempt = Attempt(
        number,
        secrets.token_hex(8),
        time.time(),
        socket.gethostname(),
        os.getpid(),
        cause or ("start" if number == 1 else "restart"),
    )
    _write_durably(directory / "attempts" / f"{number:06d}.json", msgspec.json.encode(attempt))
    return attempt


def holder(directory: Path) -> tuple[int, str] | None:
    """(attempt, description) of the job that lives on `directory`; None when none does. Any other process than its own, any
    time; takes nothing: the kernel is asked who has the lock. A job on another host is seen where the file system tells."""
    try:
        lock = os.open(directory / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        if struct.unpack(_FLOCK, fcntl.fcntl(lock, fcntl.F_GETLK, asked))[0] == fcntl.F_UNLCK:
            return None
        said = os.pread(lock, 200, 0).decode(errors="replace")
    finally:
        os.close(lock)
    number = said.rpartition("attempt ")[2]
    return (int(number), said) if number.isdigit() else (0, said or "a job that is starting")


def run_of(directory: Path) -> str | None:
    """The run that `directory` belongs to; None when it is not a job's yet. Raises CheckpointError."""
    try:
        return msgspec.json.decode((directory / "job.json").read_bytes(), type=JobIdentity).run_id
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{directory / 'job.json'} does not say which run the directory belongs to: {error}") from error


def adopt(directory: Path, job: JobIdentity, known: list[Attempt]) -> None:
    """Makes `directory` the job's: on a machine that has not seen it, or has missed some of its attempts. Before `take`.

    Raises CheckpointError when the directory belongs to another run.
    """
    (directory / "attempts").mkdir(parents=True, exist_ok=True)
    held = _identity(directory, job)
    if held.run_id != job.run_id:
        raise CheckpointError(
            f"checkpoint_dir {str(directory)!r} belongs to run {held.run_id!r}, its copy to run {job.run_id!r}. "
            "Give each job a copy of its own, or an empty checkpoint_dir."
        )
    for attempt in known:
        path = directory / "attempts" / f"{attempt.number:06d}.json"
        if not path.exists():
            _write_durably(path, msgspec.json.encode(attempt))


def _write_durably(path: Path, data: bytes) -> None:
    """Creates `path` with `data`, whole or not at all, and on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def attempts(directory: Path) -> list[Attempt]:
    """Every attempt that was ever started on `directory`, oldest first. Any process, no lock needed."""
    found = []
    for path in sorted((directory / "attempts").glob("[0-9]*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Attempt))
        except (msgspec.ValidationError, msgspec.DecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is not an attempt record: {error}") from error
    return found
