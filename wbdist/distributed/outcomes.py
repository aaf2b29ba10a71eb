"""What the ranks of `launch` returned or raised, brought to the launching process in files: a rank may be killed at any moment,
and the launcher may be away while it ends."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from wbdist.distributed.processes import dumped, loaded
from wbdist.errors import Error, UsageError


class JobFailedError(Error, SystemExit):
    """What `launch` raises when its job did not end well; also the exit of the process with the job's code, `code`.

    Both, so that `except wbdist.Error` finds it, and a script ends without a second traceback: the rank has printed its own.
    `rank` is the one that failed first, None when all were stopped or killed; `traceback` is its traceback as text. When its
    exception could be sent here, it is the cause (`__cause__`).
    """

    def __init__(self, code: int, rank: int | None = None, summary: str = "", trace: str = "") -> None:
        message = f"the job ended with code {code}"
        if rank is not None:
            message += f": rank {rank} raised {summary}\n\n{trace.rstrip()}"
        super().__init__(message)
        self.code = code
        self.rank = rank
        self.traceback = trace


class _Outcome(msgspec.Struct, omit_defaults=True):
    at: float
    value: bytes | None = None
    error: bytes | None = None
    summary: str = ""
    trace: str = ""


def keep_value(directory: Path, rank: int, value: Any) -> None:
    """In the rank. Raises UsageError when the value cannot be sent."""
    try:
        packed = dumped(value)
    except Exception as error:  # dill raises whatever an object's own __reduce__ raises
        raise UsageError(
            f"rank {rank} returned {type(value).__name__}, which cannot be sent to the launching process: {error}; return "
            "plain values or arrays, and save the rest"
        ) from error
    _write(directory, rank, _Outcome(time.time(), value=packed))


def keep_error(directory: Path, rank: int, error: BaseException) -> None:
    """In the rank."""
    try:
        packed = dumped(error)
    except Exception:  # noqa: BLE001  (then the text alone goes)
        packed = None
    summary = "".join(traceback.format_exception_only(error)).strip()
    _write(
        directory, rank, _Outcome(time.time(), error=packed, summary=summary, trace="".join(traceback.format_exception(error)))
    )


def forget(directory: Path) -> None:
    """Before the ranks are started anew: what an earlier attempt left does not count."""
    for path in directory.iterdir():
        path.unlink()


def values(directory: Path, nprocs: int) -> list[Any]:
    """What the ranks returned, by rank; None for one that left by `sys.exit(0)`."""
    found = [_read(directory, rank) for rank in range(nprocs)]
    return [None if one is None or one.value is None else loaded(one.value) for one in found]


def failure(directory: Path, nprocs: int, code: int) -> JobFailedError:
    """The error of the rank that failed first."""
    found = [(one.at, rank, one) for rank in range(nprocs) if (one := _read(directory, rank)) is not None and one.trace]
    if not found:
        return JobFailedError(code)
    _, rank, first = min(found, key=lambda each: each[:2])
    failed = JobFailedError(code, rank, first.summary, first.trace)
    if first.error is not None:
        try:
            cause = loaded(first.error)
        except Exception:  # noqa: BLE001  (an exception class that does not survive pickling: its text is there)
            cause = None
        failed.__cause__ = cause if isinstance(cause, BaseException) else None
    return failed


def _write(directory: Path, rank: int, outcome: _Outcome) -> None:
    place = directory / f"rank-{rank}"
    beside = place.with_suffix(f".{os.getpid()}")
    beside.write_bytes(msgspec.msgpack.encode(outcome))
    beside.replace(place)


def _read(directory: Path, rank: int) -> _Outcome | None:
    try:
        return msgspec.msgpack.decode((directory / f"rank-{rank}").read_bytes(), type=_Outcome)
    except FileNotFoundError:
        return None
