"""What the nodes of a job say to each other, and how it looks on a connection.

    frame      length u32, then a msgpack map; at most LARGEST bytes

    rendezvous               node
    Challenge       ->
                    <-       Hello, proved with the job's key
    Welcome         ->                 (or Refused)
                    <-       Ready     my ranks can be started
    Start           ->                 to all at once: one generation begins
                    <-       Trouble   of mine: a signal, a failure, ranks that leave
    Trouble         ->                 of another node
                    <-       Ended     all of mine are gone, and how
    Outcome         ->                 again (then Ready) or over

Both sides say Beat when they have said nothing else for a while. Messages carry numbers and sentences, no commands: who has the
key can stop a job, and cannot make it run anything.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import time
from collections.abc import Iterator
from typing import Literal, Union

import msgspec

from wbdist.errors import Error
from wbdist.launch.attempt import Trouble
from wbdist.launch.judgement import RankEnd

VERSION = 1
LARGEST = 1 << 20


class Standing(msgspec.Struct, frozen=True):
    """What every node knows of the job, so that a rendezvous that was lost goes on where it was."""

    generation: int = 0
    """Attempts begun."""
    committed: int = -1
    idle: int = 0


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    version: int
    nonce: str


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    nonce: str
    proof: str
    instance: str
    """Random name of this launcher process."""
    host: str
    nnodes: tuple[int, int]
    """At least, and at most."""
    nproc: int
    node_rank: int | None
    """As asked for; None: any."""
    standing: Standing


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    proof: str
    node: int
    keep_alive: float
    """Seconds of silence after which the other side is lost."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    why: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    port: int
    """Free here, for the ranks' store should rank 0 be ours."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    standing: Standing
    incarnation: str
    cause: str
    first_rank: int
    world_size: int
    node: int
    nnodes: int
    address: str
    port: int


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    ends: tuple[RankEnd, ...]
    """`at` is how many seconds ago: the nodes' clocks differ."""
    newest: int
    """The newest committed step that these ranks reported, -1 for none."""


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    exit_code: int | None
    sentence: str
    culprit: int | None = None
    requeue: bool = False
    standing: Standing = Standing()


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    committed: int = -1
    """The newest committed step that is known here."""


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """A node leaves on its own."""

    sentence: str


Message = Union[Challenge, Hello, Welcome, Refused, Ready, Start, Trouble, Ended, Outcome, Beat, Gone]  # noqa: UP007

_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


class ForeignError(Error):
    """What came is not of this protocol."""


def key_of(job: str, secret: str) -> bytes:
    """What nodes of one job have in common: its id, and a secret where strangers reach the port."""
    return hashlib.sha256(f"wbdist launch\0{job}\0{secret}".encode()).digest()


def proof(key: bytes, who: Literal["node", "rendezvous"], one: str, other: str) -> str:
    return hmac.new(key, f"{who}\0{one}\0{other}".encode(), "sha256").hexdigest()


class Wire:
    """One connection that never blocks: whole messages in, messages out. Owned by one thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.heard = self.spoke = time.monotonic()
        self._in = bytearray()
        self._out = bytearray()

    @property
    def waiting(self) -> bool:
        """There is something to write."""
        return bool(self._out)

    def say(self, message: Message) -> None:
        data = _encoder.encode(message)
        self._out += len(data).to_bytes(4, "big") + data
        self.spoke = time.monotonic()
        self.flush()

    def flush(self) -> None:
        """What the kernel takes now. Errors are left for `read` to find, which sees what came before the end as well."""
        try:
            while self._out:
                del self._out[: self.socket.send(self._out)]
        except OSError:
            return

    def read(self) -> Iterator[Message]:
        """The messages that have come. Raises OSError at the end of the connection, ForeignError for anything else."""
        ended = False
        try:
            while data := self.socket.recv(1 << 16):
                self.heard = time.monotonic()
                self._in += data
            ended = True
        except BlockingIOError:
            pass
        while (message := self._next()) is not None:
            yield message
        if ended:
            raise ConnectionResetError("the connection was closed")

    def _next(self) -> Message | None:
        if len(self._in) < 4:
            return None
        length = int.from_bytes(self._in[:4], "big")
        if length > LARGEST:
            raise ForeignError(f"bytes that begin with {bytes(self._in[:16])!r}")
        if len(self._in) < 4 + length:
            return None
        try:
            message: Message = _decoder.decode(bytes(self._in[4 : 4 + length]))
        except msgspec.MsgspecError as error:
            raise ForeignError(f"a message that is none: {error}") from None
        finally:
            del self._in[: 4 + length]
        return message

    def close(self) -> None:
        self.socket.close()
