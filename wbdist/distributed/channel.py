"""What a rank's feeder and the aggregator say to each other, over one authenticated connection a rank.

    feeder -> aggregator                               aggregator -> feeder
    HELLO   who I am, where my journal lies            NEXT      the byte of your journal I want next
    FRAMES  offset + raw frames from there             DRAINED   the position you asked for, or why there is none
    PASSED  I add nothing below this step              RECEIVED  I have your END
    DRAIN   rank 0: tell me the position at this step  FINISHED  the run has ended

Offsets count from a journal's first frame, so both sides agree on them without an index: a reconnecting feeder is told
where to go on, what arrives twice is cut off by its offset, and a gap is answered with NEXT.

`multiprocessing.connection` gives the transport (length-prefixed messages, HMAC both ways) and no pickles are sent. It is
the standard library's own: the aggregator needs no dill, and connections by address do not mix with anybody's queues.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from enum import IntEnum
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from typing import Any

import msgspec

from wbdist.core.position import RunPosition
from wbdist.run.journal import JournalHeader

Address = tuple[str, int]

BROKEN = (OSError, EOFError, AuthenticationError)
"""How a connection fails."""

_KIND = struct.Struct("<B")
_NUMBERED = struct.Struct("<Bq")


class Message(IntEnum):
    HELLO = 1
    FRAMES = 2
    PASSED = 3
    DRAIN = 4
    NEXT = 16
    DRAINED = 17
    RECEIVED = 18
    FINISHED = 19


class Hello(msgspec.Struct, frozen=True):
    rank: int
    header: JournalHeader
    path: str
    machine: str
    """Names the machine's boot: on the same machine the aggregator can read the journal itself."""


class Drained(msgspec.Struct, frozen=True):
    step: int
    position: RunPosition | None = None
    cut: tuple[tuple[str, int], ...] = ()
    """The run's journals up to there: path, last frame."""
    error: str = ""


class Meeting(msgspec.Struct, frozen=True):
    """What rank 0 tells all ranks about an aggregator."""

    address: Address
    key: bytes
    generation: int
    """Counts restarts of the aggregator."""


def dial(meeting: Meeting) -> Connection:
    """Connects and proves the key, both ways. Raises OSError, EOFError or AuthenticationError."""
    connection = Client(meeting.address, authkey=meeting.key)
    without_delay(connection)
    return connection


def without_delay(connection: Connection) -> None:
    """Small messages must not wait for the acknowledgement of large ones (Nagle)."""
    with suppress(OSError), socket.socket(fileno=_duplicate(connection)) as twin:
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def patience(connection: Connection, seconds: float) -> None:
    """Bounds every single read and write; 0 removes the bound."""
    whole = int(seconds)
    value = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    with socket.socket(fileno=_duplicate(connection)) as twin:
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _duplicate(connection: Connection) -> int:
    return os.dup(connection.fileno())


def send(connection: Connection, kind: Message, payload: bytes = b"") -> None:
    connection.send_bytes(_KIND.pack(kind) + payload)


def send_numbered(connection: Connection, kind: Message, number: int, payload: bytes = b"") -> None:
    connection.send_bytes(_NUMBERED.pack(kind, number) + payload)


def number(value: int) -> bytes:
    return struct.pack("<q", value)


def split(message: bytes) -> tuple[Message, memoryview]:
    return Message(message[0]), memoryview(message)[1:]


def split_number(payload: memoryview) -> tuple[int, memoryview]:
    number: int = struct.unpack_from("<q", payload)[0]
    return number, payload[8:]


def this_machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def encode(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)
