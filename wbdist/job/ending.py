"""How a job was left, as an exception, an exit code and a verdict."""

from __future__ import annotations

import logging

from wbdist.errors import EXIT_FENCED, EXIT_PREEMPTED, EXIT_RETRYABLE, Error, FencedError
from wbdist.launch import intent

log = logging.getLogger("wbdist.job")


class Preempted(SystemExit):
    """Raised inside `job.steps` on every rank after a notice; leaves the `with` block, and the process with code 75.

    A SystemExit, so that a script need not know of it, `except Exception` does not swallow it, and code after the loop
    (evaluation, export) does not run on a half-trained model within somebody's 30 seconds of grace.
    """

    def __init__(self, reason: str, code: int = EXIT_PREEMPTED) -> None:
        """`code`: another than 75 when nothing is there to go on from, or nobody may."""
        super().__init__(code)
        self.reason = reason


class Fenced(FencedError, SystemExit):  # noqa: N818  (the exit it is, as Preempted)
    """How a job is left that another one has taken over: a FencedError, and the exit of the process with code 69.

    Both, so that `except FencedError` finds it, and a script that does not look for it ends without a traceback from each rank.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = EXIT_FENCED


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of the contract that fits how a job was left."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else 0 if code is None else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, Error) else EXIT_RETRYABLE


def leave_verdict(rank: int, error: BaseException | None) -> None:
    """Leaves this rank's verdict where a supervisor looks; a launcher may hide or flatten the exit code."""
    code = exit_code_of(error)
    message = "" if error is None else f"{type(error).__name__}: {error}"
    if isinstance(error, Preempted):
        message = error.reason
    try:
        intent.write(rank, intent.Verdict(intent.word_for(code), code, message[:2000]))
    except OSError as problem:
        log.warning("rank %d could not leave its verdict for the supervisor: %s", rank, problem)
