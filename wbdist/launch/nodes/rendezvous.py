"""The place where the launchers of a job's nodes meet: a thread in one of them that listens on a port.

It never waits for anybody: strangers, silence and slow readers cost a connection, nothing else. A node is *lost* when its
connection ends or says nothing for `keep_alive` seconds. What is decided is in `rounds.py`.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import threading
import time
from typing import Self

import msgspec

from wbdist.errors import UsageError
from wbdist.launch.nodes.messages import VERSION, Beat, Challenge, ForeignError, Hello, Message, Refused, Welcome, Wire, proof
from wbdist.launch.nodes.rounds import Rounds

HANDSHAKE = 10.0
"""Seconds for a connection to prove that it is a node."""
FAREWELL = 5.0
"""Seconds at the end for all nodes to have taken the outcome and closed their connections."""
STRANGERS = 64
"""Connections without a proof at a time; more are closed at once."""


class _Connection:
    def __init__(self, wire: Wire, host: str) -> None:
        self.wire, self.host = wire, host
        self.nonce = secrets.token_hex(16)
        self.theirs: str | None = None
        """The nonce of a node that has proved to be one."""
        self.closing = False
        """Nothing more is read; it is closed when everything is written."""
        self.since = time.monotonic()


class Rendezvous(threading.Thread):
    """A context manager: listens from the start; leaving it waits at most FAREWELL seconds for the nodes to have left."""

    def __init__(self, listener: socket.socket, rounds: Rounds, *, key: bytes, keep_alive: float, own_address: str) -> None:
        """`own_address`: how other nodes reach this host, whose own launcher connects by loopback."""
        super().__init__(name="wbdist-rendezvous", daemon=True)
        self._listener, self._rounds, self._key = listener, rounds, key
        self._keep_alive, self._own_address = keep_alive, own_address
        self._connections: dict[int, _Connection] = {}
        self._number = 0
        self._selector = selectors.DefaultSelector()
        self._leave = threading.Event()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self.join(FAREWELL + 2)

    def run(self) -> None:
        step = min(self._keep_alive / 5, 1.0)
        leave_at = float("inf")
        try:
            while True:
                now = time.monotonic()
                if self._leave.is_set():
                    leave_at = min(leave_at, now + FAREWELL)
                    if now >= leave_at or not self._connections:
                        return
                wait = min(self._rounds.due - now, 0.05 if leave_at != float("inf") else step)
                for key, events in self._selector.select(max(wait, 0.0)):
                    if key.data is None:
                        self._accept()
                    else:
                        self._serve(key.data, events)
                self._keep_time()
        finally:
            for connection in self._connections.values():
                connection.wire.close()
            self._listener.close()
            self._selector.close()

    def _accept(self) -> None:
        try:
            accepted, address = self._listener.accept()
        except OSError:
            return  # it went away again, or there are no descriptors left: then the next try tells
        if sum(one.theirs is None for one in self._connections.values()) >= STRANGERS:
            accepted.close()
            return
        self._number += 1
        connection = self._connections[self._number] = _Connection(Wire(accepted), str(address[0]))
        self._selector.register(accepted, selectors.EVENT_READ, self._number)
        self._say(self._number, Challenge(VERSION, connection.nonce))

    def _serve(self, number: int, events: int) -> None:
        connection = self._connections.get(number)
        if connection is None:
            return
        if events & selectors.EVENT_WRITE:
            connection.wire.flush()
        if not events & selectors.EVENT_READ:
            return
        try:
            for message in connection.wire.read():
                self._hear(number, connection, message)
        except ForeignError as error:
            self._drop(number, f"it said what is none of our messages ({error})")
        except OSError as error:
            self._drop(number, f"its launcher ended, or cannot be reached any more ({error.strerror or error})")

    def _hear(self, number: int, connection: _Connection, message: Message) -> None:
        if connection.closing:
            return
        if connection.theirs is not None:
            self._rounds.hear(number, message, time.monotonic())
            return
        if not isinstance(message, Hello):
            raise ForeignError(type(message).__name__)
        if not hmac.compare_digest(message.proof, proof(self._key, "node", connection.nonce, message.nonce)):
            why = "it has another key: give all nodes of a job the same --rdzv-id, and the same WBDIST_RDZV_SECRET if any"
            self._say(number, Refused(why))
            return
        connection.theirs = message.nonce
        own = connection.host in {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        address = self._own_address if own else connection.host.removeprefix("::ffff:")
        self._rounds.join(number, message, address, time.monotonic())

    def _keep_time(self) -> None:
        now = time.monotonic()
        self._rounds.tick(now)
        for number, connection in list(self._connections.items()):
            silent = now - connection.wire.heard
            if connection.theirs is None and now - connection.since > HANDSHAKE:
                self._drop(number, "")
            elif number in self._rounds.members and silent > self._keep_alive:
                self._drop(number, f"nothing was heard of it for {silent:.0f} s")
            elif connection.theirs is not None and now - connection.wire.spoke > self._keep_alive / 5:
                self._say(number, Beat(self._rounds.standing.committed))
        out, self._rounds.out = self._rounds.out, []
        for number, message in out:
            self._say(number, message)
        for number, connection in list(self._connections.items()):
            if connection.closing and not connection.wire.waiting:
                self._drop(number, "")
                continue
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wire.waiting else 0)
            if self._selector.get_key(connection.wire.socket).events != events:
                self._selector.modify(connection.wire.socket, events, number)

    def _say(self, number: int, message: Message) -> None:
        connection = self._connections.get(number)
        if connection is None:
            return
        if isinstance(message, Welcome):
            assert connection.theirs is not None
            proved = proof(self._key, "rendezvous", connection.theirs, connection.nonce)
            message = msgspec.structs.replace(message, proof=proved)
        connection.wire.say(message)
        if isinstance(message, Refused):
            connection.closing = True

    def _drop(self, number: int, why: str) -> None:
        connection = self._connections.pop(number)
        self._selector.unregister(connection.wire.socket)
        connection.wire.close()
        self._rounds.lose(number, why, time.monotonic())


def listen(host: str, port: int, node_rank: int | None) -> socket.socket | None:
    """A listening socket when the rendezvous is to be here: on node 0, or, where nodes are not numbered, on the machine that
    `host` names, by whoever comes first. None when it is elsewhere. Raises UsageError when it cannot be here and has to.
    """
    if node_rank is None and not _is_here(host):
        return None
    if node_rank:
        return None
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        # All interfaces: many machines know their own name as 127.0.1.1.
        return socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        if node_rank is None:
            return None  # another launcher on this machine has it, or whoever it is will be told apart by its greeting
        why = error.strerror or error
        raise UsageError(f"node 0 hosts the rendezvous, but port {port} cannot be used here: {why}") from error


def _is_here(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False
