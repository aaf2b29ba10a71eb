"""Every exception wbdist raises, in one family, sorted by who can mend it.

- `UsageError` and below: yours. The call or its arguments are wrong; retrying changes nothing.
- `RemoteError` and below: theirs. The server, or another job, said no.
- `EnvironmentFault` and below: the machine's. Disk, network, a dead process; a retry may help.

The process exit code that fits an error is its `exit_code` (see the exit-code contract in docs/architecture.md).
Names that W&B also has (`UsageError`, `CommError`, `AuthenticationError`) keep W&B's meaning.
"""

from __future__ import annotations

EXIT_FINISHED = 0
EXIT_FAILED_FOR_GOOD = 65
"""Bad input or configuration: do not retry (sysexits EX_DATAERR)."""
EXIT_RETRYABLE = 70
"""Failed; a retry may help (sysexits EX_SOFTWARE)."""
EXIT_PREEMPTED = 75
"""Preempted with a committed checkpoint: requeue me (sysexits EX_TEMPFAIL)."""
EXIT_FENCED = 69
"""Another attempt of the same job owns the run: this one must stay away (sysexits EX_UNAVAILABLE)."""


class Error(Exception):
    """Base of every wbdist error."""

    exit_code: int = EXIT_RETRYABLE


# Yours ------------------------------------------------------------------------------------------------


class UsageError(Error):
    """The call cannot be right: wrong arguments, wrong order, wrong place."""

    exit_code = EXIT_FAILED_FOR_GOOD


class InvalidArgumentError(UsageError, ValueError):
    """The value of an argument is not one of those that it takes (W&B raises a ValueError there)."""


class ConfigError(UsageError):
    """A config key would be changed to another value without `allow_val_change`."""


class MainGuardError(UsageError):
    """Processes are being spawned from a script without an `if __name__ == "__main__":` guard."""


class UnsupportedError(UsageError):
    """W&B's name for what the server, or this version, cannot do."""


class StateMissingError(UsageError):
    """A checkpoint lacks a piece that this job tracks, or holds one that it does not."""


class ShutdownError(UsageError):
    """The run is finished: nothing more can be logged to it."""


# Theirs -----------------------------------------------------------------------------------------------


class RemoteError(Error):
    """The server answered with a refusal."""


class CommError(RemoteError):
    """The server could not be talked to, or refused the run."""


class AwayError(CommError):
    """The server did not answer, or cannot now; it may be back later."""


class AuthenticationError(CommError):
    """The API key is missing, malformed, or not accepted."""

    exit_code = EXIT_FAILED_FOR_GOOD


class FencedError(RemoteError):
    """A newer attempt of this run exists; what this one still logs is archived and never shown."""

    exit_code = EXIT_FENCED


class JobAlreadyRunningError(RemoteError):
    """Another live process works on the same checkpoint directory or run."""

    exit_code = EXIT_FENCED


# The machine's ----------------------------------------------------------------------------------------


class EnvironmentFault(Error):  # noqa: N818  (EnvironmentError is a builtin)
    """Something outside the program broke: disk, process, network."""


class JournalError(EnvironmentFault):
    """The journal could not be written; the row named in the message is not durable."""


class DiskFullError(JournalError):
    """No space is left for the journal. Rows logged before this error are safe."""


class JournalCorruptError(EnvironmentFault):
    """A journal's header or an inner record does not verify, or it cannot be read and what it may hold is needed."""


class CheckpointError(EnvironmentFault):
    """A checkpoint could not be written or read."""


class CheckpointCorruptError(CheckpointError):
    """A committed checkpoint does not match its manifest."""


class PeerLostError(EnvironmentFault):
    """A rank did not answer within the deadline; the message names it."""


class DeadlineError(EnvironmentFault):
    """A bounded wait ran out; the message says what was waited for."""


class InitStartError(EnvironmentFault):
    """A helper process (server, shipper, aggregator) did not come up in time."""
