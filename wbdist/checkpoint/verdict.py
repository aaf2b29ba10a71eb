"""How one rank's failure becomes everybody's error: failures as values that travel through the coordinator."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import msgspec

from wbdist import errors
from wbdist.errors import CheckpointError, Error


class Failure(msgspec.Struct, frozen=True):
    """What went wrong on one rank."""

    rank: int
    kind: str
    """Class of the error, by name."""
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        text = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
        return cls(rank, type(error).__name__, f"rank {rank} (pid {os.getpid()} on {socket.gethostname()}): {text}")


def raise_failures(failures: Sequence[Failure], consequence: str) -> None:
    """Raises one error for all `failures`, naming each rank; does nothing when there are none.

    The error has the class of the first failure when that is one of ours, so that every rank raises alike, and is a
    CheckpointError otherwise.
    """
    if not failures:
        return
    found = getattr(errors, failures[0].kind, None)
    kind = found if isinstance(found, type) and issubclass(found, Error) else CheckpointError
    raise kind(f"{consequence}: " + "; ".join(failure.text for failure in failures))
