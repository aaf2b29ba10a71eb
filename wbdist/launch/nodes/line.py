"""A node's end of its connection to the rendezvous: a thread that keeps it alive while the launcher does other things."""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec

from wbdist.errors import EXIT_FAILED_FOR_GOOD, EXIT_RETRYABLE
from wbdist.launch.attempt import Trouble
from wbdist.launch.nodes.messages import (
    VERSION,
    Beat,
    Challenge,
    ForeignError,
    Hello,
    Message,
    Outcome,
    Refused,
    Start,
    Welcome,
    Wire,
    proof,
)

CONNECT = 5.0
"""Seconds for one try to connect."""
AGAIN = 0.5
"""Seconds between two."""
GREETING = 10.0
"""Seconds for the other side to say who it is: a rendezvous does at once."""
PATIENCE = 3.0
"""Seconds after which a person is told what we wait for."""
FLUSH = 2.0
"""Seconds at the end for what is still to be said."""


class Lost(msgspec.Struct, frozen=True):
    """There is no connection (any more)."""

    why: str
    exit_code: int | None = None
    """What to leave with; None where it is worth another try."""


Event = Welcome | Start | Outcome | Lost


class Line(threading.Thread):
    """One connection, from the first try to connect until it is lost or closed. It is `Elsewhere` for an attempt.

    `events` and `told` take what has come; `wake` becomes readable whenever something does. After Lost nothing comes.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        key: bytes,
        hello: Callable[[str, str], Hello],
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        """`hello` is made from our nonce and proof; `timeout`: seconds for the first connection to succeed."""
        super().__init__(name="wbdist-line", daemon=True)
        self._host, self._port, self._key, self._hello = host, port, key, hello
        self._timeout, self._tell_person = timeout, say
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._troubles: deque[Trouble] = deque()
        self._to_say: deque[Message] = deque()
        self._closing = threading.Event()
        self.wake, self._wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._kicked, self._kick_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.progress: Callable[[], int] = lambda: -1
        """Says the newest committed step of our own ranks; called by this thread."""
        self.committed = -1
        """The newest committed step that the job is known to have."""

    # The launcher's side --------------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """What has come since the last call, troubles aside."""
        self._drain()
        with self._lock:
            taken, self._events = list(self._events), deque()
        return taken

    def told(self) -> list[Trouble]:
        """Troubles since the last call. The loss of the connection is one, and stays an event."""
        self._drain()
        with self._lock:
            taken, self._troubles = list(self._troubles), deque()
        return taken

    def tell(self, message: Message, /) -> None:
        """Sends it, soon. Does not block."""
        with self._lock:
            self._to_say.append(message)
        with suppress(BlockingIOError):
            os.write(self._kick_end, b"k")

    def close(self) -> None:
        """Says what is still to be said, at most FLUSH seconds, and ends the connection."""
        self._closing.set()
        with suppress(BlockingIOError):
            os.write(self._kick_end, b"k")
        self.join(FLUSH + 1)
        if self.is_alive():
            return  # it looks up a name; it is a daemon, and its pipes are its own
        for descriptor in (self.wake, self._wake_end, self._kicked, self._kick_end):
            os.close(descriptor)

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.wake, 4096)

    # The thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            wire, keep_alive = self._connect()
        except _GivenUpError as error:
            self._came(error.lost)
            return
        except Exception as error:
            # The launcher waits for what this thread says.
            self._came(Lost(f"a fault of the connection to the rendezvous at {self._place}: {error!r}", EXIT_RETRYABLE))
            raise
        try:
            self._converse(wire, keep_alive)
        except ForeignError as error:
            self._came(Lost(f"the rendezvous at {self._place} said {error}"))
        except OSError as error:
            self._came(Lost(f"the node that hosts the rendezvous ({self._place}) was lost: {error.strerror or error}"))
        except Exception as error:
            self._came(Lost(f"a fault of the connection to the rendezvous at {self._place}: {error!r}", EXIT_RETRYABLE))
            raise
        finally:
            wire.close()

    @property
    def _place(self) -> str:
        return f"{self._host}:{self._port}"

    def _came(self, event: Event | Trouble) -> None:
        with self._lock:
            if isinstance(event, Trouble):
                self._troubles.append(event)
            else:
                self._events.append(event)
            if isinstance(event, Lost):
                self._troubles.append(Trouble("failed", event.why))
        with suppress(BlockingIOError):
            os.write(self._wake_end, b"w")

    def _connect(self) -> tuple[Wire, float]:
        began = time.monotonic()
        told = False
        problem = ""
        while not self._closing.is_set():
            if time.monotonic() - began >= self._timeout:
                why = f"waited {self._timeout:g} s for the rendezvous at {self._place} ({problem}); giving up (--join-timeout)"
                raise _GivenUpError(Lost(why, EXIT_RETRYABLE))
            try:
                wire = Wire(socket.create_connection((self._host, self._port), CONNECT))
            except OSError as error:
                problem = error.strerror or str(error)
            else:
                try:
                    return wire, self._greet(wire)
                except OSError as error:
                    problem = str(error)
                    wire.close()
                except BaseException:
                    wire.close()
                    raise
            if not told and time.monotonic() - began > PATIENCE:
                told = True
                self._tell_person(f"waiting for the rendezvous at {self._place} ({problem}), at most {self._timeout:g} s")
            self._closing.wait(AGAIN)
        raise _GivenUpError(Lost("closed"))

    def _greet(self, wire: Wire) -> float:
        """The keep-alive time. Raises OSError when it is worth another try, _GivenUpError when it is not."""
        nonce, theirs = secrets.token_hex(16), ""
        deadline = time.monotonic() + GREETING
        while not self._closing.is_set():
            self._select(wire, 0.2)
            try:
                for message in wire.read():
                    match message:
                        case Challenge(version=version) if version != VERSION:
                            why = f"the node that hosts the rendezvous has another version of wbdist ({version} for {VERSION})"
                            raise _GivenUpError(Lost(why, EXIT_FAILED_FOR_GOOD))
                        case Challenge():
                            theirs = message.nonce
                            wire.say(self._hello(nonce, proof(self._key, "node", theirs, nonce)))
                        case Refused():
                            why = f"the rendezvous at {self._place} refused this node: {message.why}"
                            raise _GivenUpError(Lost(why, EXIT_FAILED_FOR_GOOD))
                        case Welcome():
                            if not hmac.compare_digest(message.proof, proof(self._key, "rendezvous", nonce, theirs)):
                                why = f"the rendezvous at {self._place} has another key (--rdzv-id, WBDIST_RDZV_SECRET)"
                                raise _GivenUpError(Lost(why, EXIT_FAILED_FOR_GOOD))
                            self._came(message)
                            return message.keep_alive
                        case _:
                            deadline = time.monotonic() + GREETING  # it lives: it may have to see first that another is lost
            except ForeignError as error:
                why = f"{self._place} is no rendezvous of wbdist launch, it said {error}; is it another service's port?"
                raise _GivenUpError(Lost(why, EXIT_FAILED_FOR_GOOD)) from None
            if time.monotonic() > deadline:
                raise TimeoutError("somebody listens there, and says nothing: another service's port?")
        raise _GivenUpError(Lost("closed"))

    def _select(self, wire: Wire, timeout: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(wire.socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if wire.waiting else 0))
            selector.register(self._kicked, selectors.EVENT_READ)
            selector.select(timeout)
        with suppress(BlockingIOError):
            os.read(self._kicked, 4096)
        wire.flush()

    def _converse(self, wire: Wire, keep_alive: float) -> None:
        leave_at = float("inf")
        while True:
            self._select(wire, 0.05 if self._closing.is_set() else keep_alive / 5)
            for message in wire.read():
                self._on_message(message)
            now = time.monotonic()
            if now - wire.heard > keep_alive:
                raise TimeoutError(f"nothing was heard of it for {now - wire.heard:.0f} s")
            with self._lock:
                to_say, self._to_say = list(self._to_say), deque()
            for message in to_say:
                wire.say(message)
            if now - wire.spoke > keep_alive / 5 - 0.01:
                wire.say(Beat(self.progress()))
            if self._closing.is_set():
                leave_at = min(leave_at, now + FLUSH)
                if not wire.waiting or now > leave_at:
                    return

    def _on_message(self, message: Message) -> None:
        match message:
            case Start() | Outcome() | Trouble():
                self._came(message)
            case Beat():
                self.committed = max(self.committed, message.committed)
            case Refused():
                raise ConnectionRefusedError(message.why)
            case _:
                raise ForeignError(f"{type(message).__name__} out of turn")


class _GivenUpError(Exception):
    def __init__(self, lost: Lost) -> None:
        super().__init__(lost.why)
        self.lost = lost
