"""How the ranks of one incarnation find each other outside the process group: keys in the c10d store.

An *incarnation* is one set of processes that started together. Everything lives under a prefix of its own for each, since
stores outlive incarnations: torchrun's agent keeps one TCPStore for all its restarts, and torch 2.13 reads the dead
workers' gloo addresses out of it (4 of 5 restarts then hang).

Nothing that torchrun puts into the environment names an incarnation. TORCHELASTIC_RESTART_COUNT does not count membership
changes (4 -> 2 -> 4 ranks is restart 0 three times), and each agent counts for itself: of one incarnation, ranks whose
agent saw its worker fail have a higher one than those whose agent saw a new member first. MASTER_PORT and the run id stay
the same with a shared store, and all of them together repeat as well. So when no launcher of ours gives a name, the ranks
agree on one: rank 0 draws a random name and announces it; every other rank answers under that name with a nonce of its own,
and goes on only when rank 0 confirms that very nonce. A stale announcement was made by a dead rank 0, which will never
confirm a nonce that is drawn now; the rank keeps looking until the living one announces.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Protocol, Self, TypeVar

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.distributed.asking import Asker, gone
from wbdist.distributed.identity import RankIdentity
from wbdist.errors import DeadlineError, PeerLostError, UsageError

T = TypeVar("T")

MARK = b"="
"""Before every stored value: the c10d store takes an empty value for an absent key in compare_set."""
LINGER = 2.0
"""Seconds that the rank which hosts the store waits, when it closes, for the others to have closed."""
STORE_TIMEOUT = timedelta(seconds=30)
"""For single requests to the store, where torch's client heeds it (see `asking`); a wait for peers has its own deadline."""


class Store(Protocol):
    """What is used of a c10d store (torch's own annotations say `str` for values that may be bytes)."""

    def set(self, key: str, value: bytes | str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: bytes | str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def set_timeout(self, timeout: timedelta) -> None: ...
    def clone(self) -> Self: ...


def connect(
    identity: RankIdentity, incarnation: str | None = None, timeout: float = 120.0, env: Mapping[str, str] | None = None
) -> Coordinator:
    """All ranks, in step: this rank's coordinator. Alone (world size 1), nothing is imported, opened or waited for.

    `incarnation` None: WBDIST_INCARNATION, else agreed upon as the module says. Blocks at most `timeout` seconds. Raises
    PeerLostError naming what did not answer, UsageError when the environment does not say where the store is.
    """
    if identity.world_size == 1:
        return AloneCoordinator()
    env = os.environ if env is None else env
    deadline = time.monotonic() + timeout
    store, hosting = _open_store(identity, env, timeout)
    name = incarnation or env.get("WBDIST_INCARNATION") or _agree_on_incarnation(store, identity, env, deadline)
    return StoreCoordinator(_prefixed(f"wbdist/{name}", store), identity.rank, identity.world_size, name, hosting=hosting)


def init_process_group(
    identity: RankIdentity,
    backend: str | None = None,
    incarnation: str | None = None,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> bool:
    """All ranks, in step, on the training thread: torch's default group, on a store prefix that no earlier incarnation used.

    An initialised group is left alone, and with world size 1 none is made: False then. `backend` None: gloo, and nccl for
    CUDA tensors where there is a GPU. `incarnation` must be the same on all ranks; None as in `connect`. Blocks at most
    `timeout` seconds, which also becomes the group's own timeout. Raises PeerLostError.
    """
    if identity.world_size == 1:
        return False
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return False
    env = os.environ if env is None else env
    deadline = time.monotonic() + timeout
    store, _ = _open_store(identity, env, timeout)
    name = incarnation or env.get("WBDIST_INCARNATION") or _agree_on_incarnation(store, identity, env, deadline)
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    left = max(deadline - time.monotonic(), 1.0)
    try:
        dist.init_process_group(
            backend,
            store=_c10d().PrefixStore(f"wbdist/{name}/group", store),
            rank=identity.rank,
            world_size=identity.world_size,
            timeout=timedelta(seconds=left),
        )
    except RuntimeError as error:
        raise PeerLostError(
            f"rank {identity.rank}: the process group of {identity.world_size} ranks ({backend}) did not form within "
            f"{left:.0f} s: {error}. Look for the rank that died or never started."
        ) from error
    return True


# Where the store is -----------------------------------------------------------------------------------

_hosted: list[Store] = []
"""Servers of this process, kept for its life: peers may still read after our coordinator is closed."""


def _open_store(identity: RankIdentity, env: Mapping[str, str], timeout: float) -> tuple[Store, bool]:
    """A connection of our own to the store of these ranks, and whether this process hosts it."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        # Whatever it was initialised with (tcp://, file://, a store): it reaches all ranks.
        default: Store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  (no public way)
        return default.clone(), False
    host, port = store_address(identity, env)
    agent_hosts = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosting = identity.rank == 0 and not agent_hosts
    started = time.monotonic()
    if not hosting:
        _until_listening(host, port, timeout)
    timeout = max(1.0, timeout - (time.monotonic() - started))
    try:
        # multi_tenant: a later env:// rendezvous of the script on the same port joins this server instead of failing.
        store: Store = _c10d().TCPStore(
            host,
            port,
            identity.world_size,
            is_master=hosting,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=not agent_hosts,
            master_listen_fd=_listen(host, port) if hosting else None,
        )
    except RuntimeError as error:
        role = "torchrun's agent" if agent_hosts else "rank 0"
        raise PeerLostError(
            f"rank {identity.rank} could not reach the store of {role} at {host}:{port} in {timeout:.0f} s: {error}"
        ) from error
    store.set_timeout(STORE_TIMEOUT)
    if hosting:
        _hosted.append(store)
    return store, hosting


def _listen(host: str, port: int) -> int | None:
    """A descriptor for the store to listen on, where its own would wait for DNS; None: its own will do, or the port is taken
    (by this process, whose server the store then joins, or by another, which the store's error tells).

    torch listens on IPv6 and sees a peer as ::ffff:127.0.0.1, which no hosts file has. It asks DNS for that name, for a log
    line, on the one thread that answers all ranks: with a resolver that loses a query, every rank stands still for 5 s, at
    any connection of any rank (torch 2.13, seen with strace). Of an IPv4 peer at 127.0.0.1 the hosts file knows the name.
    Not for host names: what is an IPv4 address here may be an IPv6 address for the other hosts.
    """
    try:
        address = ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None
    try:
        # Elsewhere than on loopback the address may be a gateway's (a Kubernetes service), not one of this host's.
        listener = socket.create_server((str(address) if address.is_loopback else "", port), backlog=2048)
    except OSError:
        return None
    return listener.detach()


def _until_listening(host: str, port: int, timeout: float) -> None:
    """Until somebody listens there, at most `timeout` seconds. The store's own client backs off up to a second between tries,
    which is what a restart would spend waiting for rank 0 to have imported torch. Who never came is told by the store's error.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
        except OSError:
            time.sleep(0.01)
        else:
            return


def store_address(identity: RankIdentity, env: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT; under srun, and Open MPI on one host, derived from the job when these
    are not set."""
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if identity.source == "slurm":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        host = host or first_host(nodes)
        # The same on all nodes, below the ephemeral range, different for neighbouring jobs and steps.
        job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
        port = port or str(15000 + (job * 7 + step) % 10000)
    if identity.source == "openmpi" and identity.local_world_size == identity.world_size and "PMIX_NAMESPACE" in env:
        host = host or "127.0.0.1"
        port = port or str(15000 + zlib.crc32(env["PMIX_NAMESPACE"].encode()) % 10000)
    if not host or not port:
        raise UsageError(
            f"rank {identity.rank} of {identity.world_size} ({identity.source}: {identity.reason}) does not know where "
            "its peers meet: set MASTER_ADDR and MASTER_PORT, the same on all ranks"
        )
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"MASTER_PORT={port!r} is not a port number")
    return host, int(port)


def first_host(nodes: str) -> str:
    """The first host of Slurm's compact list: `gpu[03-07,9],login1` -> `gpu03`."""
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "" if match is None else f"{match[1]}{match[2] or ''}{match[3] or ''}"


def _agree_on_incarnation(store: Store, identity: RankIdentity, env: Mapping[str, str], deadline: float) -> str:
    """All ranks, in step; see the module's text. Facts that are the same for all of them narrow the meeting place."""
    facts = (env.get("TORCHELASTIC_RUN_ID", ""), str(identity.world_size))
    place = _prefixed("wbdist/meet/" + "/".join(facts), store)
    if identity.rank == 0:
        name = secrets.token_hex(8)
        _write(place, "announced", name)
        nonces: dict[str, str] = {}
        for rank in range(1, identity.world_size):
            given = _wait_for(place, f"{name}/nonce/{rank}", deadline)
            if not given:
                raise PeerLostError(f"rank {rank} did not join rank 0 to agree on the incarnation in time; did it start?")
            nonces[str(rank)] = given.decode()
        _write(place, f"{name}/confirmed", msgspec.json.encode(nonces))
        return name
    nonce, answered = secrets.token_hex(8), ""
    while time.monotonic() < deadline:
        announced = _read(place, "announced").decode()
        # Looked for behind that: a living rank 0 announces its next name (`connect`, then `init_process_group`) only when it
        # has confirmed this one. To answer the next with this nonce would leave the ranks with two names.
        if answered:
            confirmed = msgspec.json.decode(_read(place, f"{answered}/confirmed") or b"{}", type=dict[str, str])
            if confirmed.get(str(identity.rank)) == nonce:
                return answered
        if announced and announced != answered:
            answered = announced
            _write(place, f"{answered}/nonce/{identity.rank}", nonce)
            continue
        time.sleep(0.01)
    raise PeerLostError(f"rank 0 did not confirm the incarnation to rank {identity.rank} in time; did it start, or die?")


# Talking to a c10d store --------------------------------------------------------------------------------


def _c10d() -> Any:
    import torch.distributed

    return torch.distributed


def _prefixed(prefix: str, store: Store) -> Store:
    prefixed: Store = _c10d().PrefixStore(prefix, store)
    return prefixed


def _asking(store: Store, request: Callable[[], T]) -> T:
    """One request that does not wait for peers."""
    try:
        return request()
    except RuntimeError as error:
        raise gone(error) from error


def _read(store: Store, key: str) -> bytes:
    """The value now, empty when there is none."""
    return _asking(store, lambda: bytes(store.get(key)) if store.check([key]) else b"")


def _write(store: Store, key: str, value: bytes | str) -> None:
    _asking(store, lambda: store.set(key, value))


def _wait_for(store: Store, key: str, deadline: float) -> bytes:
    """The value when there is one, or empty after the deadline."""
    _wait(lambda _left: bool(_read(store, key)), deadline - time.monotonic())
    return _read(store, key)


def _wait(there: Callable[[float], bool], timeout: float) -> bool:
    """Whether what is waited for is `there` within `timeout` seconds; it is asked with the seconds that are left.

    Asks again and again (0.1 ms each) after 5 % of the time waited so far, at most 0.1 s. Rejected: the store's own blocking
    wait. It keeps signal handlers from running, holds the connection, and prints a C++ warning whenever its time is up.
    """
    began = time.monotonic()
    while True:
        if there(timeout - (time.monotonic() - began)):
            return True
        waited = time.monotonic() - began
        if waited >= timeout:
            return False
        time.sleep(min(0.1, max(0.0005, waited / 20), timeout - waited))


class StoreCoordinator(Coordinator):
    """`Coordinator` over a c10d store."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        incarnation: str,
        *,
        hosting: bool = False,
        asker: Asker | None = None,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self.incarnation = incarnation
        self._hosting = hosting
        self._primary = asker is None
        self._closed = False
        self._ask = asker or Asker()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def put(self, key: str, value: bytes) -> None:
        self._put(key, value, None)

    def get(self, key: str, timeout: float) -> bytes:
        self._open()
        if not self._wait([f"k/{key}"], timeout):
            raise DeadlineError(f"rank {self._rank} waited {timeout:.1f} s for {key!r}, which no rank has put")
        return self._read(f"k/{key}", 0.0)

    def peek(self, key: str) -> bytes | None:
        store = self._open()
        found = self._ask(lambda: store.check([f"k/{key}"]))
        return self._read(f"k/{key}", None) if found else None

    def claim(self, key: str, value: bytes) -> bytes:
        store = self._open()
        return bytes(self._ask(lambda: store.compare_set(f"k/{key}", "", MARK + value)))[len(MARK) :]

    def agree(self, name: str, value: bytes | None, timeout: float) -> bytes:
        key = f"agree/{name}"
        if self._rank == 0:
            if value is None:
                raise UsageError(f"agree({name!r}): rank 0 must give the value")
            self._put(key, value, timeout)
            return value
        if value is not None:
            raise UsageError(f"agree({name!r}): rank {self._rank} gave a value; only rank 0 decides")
        self._open()
        if not self._wait([f"k/{key}"], timeout):
            raise PeerLostError(f"rank 0 did not decide {name!r} within {timeout:.1f} s (asked by rank {self._rank})")
        return self._read(f"k/{key}", 0.0)

    def gather(self, name: str, value: bytes, timeout: float) -> list[bytes]:
        keys = self._arrive(name, value, timeout)
        store = self._open()
        return [bytes(found)[len(MARK) :] for found in self._ask(lambda: store.multi_get(keys), 0.0)]

    def barrier(self, name: str, timeout: float) -> None:
        self._arrive(name, b"", timeout)

    def clone(self) -> StoreCoordinator:
        # On the same connection: no request holds it while it waits for a peer, and one more may take seconds (`_listen`).
        return StoreCoordinator(self._open(), self._rank, self._world_size, self.incarnation, asker=self._ask)

    def close(self) -> None:
        """Releases the connection. On the rank that hosts the store, the first connection's close waits up to LINGER seconds
        for the other ranks to have closed theirs, so that nobody's last answer is cut off."""
        if self._closed:
            return
        self._closed = True
        if not self._primary:
            return
        try:
            if self._hosting:
                self._wait([f"closed/{rank}" for rank in range(self._world_size) if rank != self._rank], LINGER)
            else:
                self._ask(lambda: self._store.set(f"closed/{self._rank}", "1"), LINGER)
        except PeerLostError:
            return  # the host ended first: there is nobody left to tell

    def _arrive(self, name: str, value: bytes, timeout: float) -> list[str]:
        self._put(f"gather/{name}/{self._rank}", value, timeout)
        keys = [f"k/gather/{name}/{rank}" for rank in range(self._world_size)]
        if not self._wait(keys, timeout):
            missing = [rank for rank, key in enumerate(keys) if not self._has(key)]
            raise PeerLostError(
                f"{name_ranks(missing)} did not reach {name!r} within {timeout:.1f} s (waited for by rank {self._rank})"
            )
        return keys

    def _open(self) -> Store:
        if self._closed:
            raise UsageError(f"rank {self._rank}: this coordinator is closed")
        return self._store

    def _put(self, key: str, value: bytes, timeout: float | None) -> None:
        store = self._open()
        self._ask(lambda: store.set(f"k/{key}", MARK + value), timeout)

    def _wait(self, keys: list[str], timeout: float) -> bool:
        return _wait(lambda left: self._ask(lambda: self._store.check(keys), left), timeout)

    def _has(self, key: str) -> bool:
        return self._ask(lambda: self._store.check([key]), 0.0)

    def _read(self, key: str, timeout: float | None) -> bytes:
        return bytes(self._ask(lambda: self._store.get(key), timeout))[len(MARK) :]


class AloneCoordinator(Coordinator):
    """`Coordinator` of a process that is alone: the same contract, in memory. Thread-safe; clones share the keys."""

    incarnation = "alone"

    def __init__(self, shared: tuple[dict[str, bytes], threading.Condition] | None = None) -> None:
        self._keys, self._changed = shared or ({}, threading.Condition())
        self._closed = False

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def put(self, key: str, value: bytes) -> None:
        with self._open():
            self._keys[key] = value
            self._changed.notify_all()

    def get(self, key: str, timeout: float) -> bytes:
        with self._open():
            if not self._changed.wait_for(lambda: key in self._keys, timeout):
                raise DeadlineError(f"rank 0 waited {timeout:.1f} s for {key!r}, which no rank has put")
            return self._keys[key]

    def peek(self, key: str) -> bytes | None:
        with self._open():
            return self._keys.get(key)

    def claim(self, key: str, value: bytes) -> bytes:
        with self._open():
            stands = self._keys.setdefault(key, value)
            self._changed.notify_all()
            return stands

    def agree(self, name: str, value: bytes | None, timeout: float) -> bytes:
        if value is None:
            raise UsageError(f"agree({name!r}): rank 0 must give the value")
        self.put(f"agree/{name}", value)
        return value

    def gather(self, name: str, value: bytes, timeout: float) -> list[bytes]:
        self.put(f"gather/{name}/0", value)
        return [value]

    def barrier(self, name: str, timeout: float) -> None:
        self.put(f"gather/{name}/0", b"")

    def clone(self) -> AloneCoordinator:
        with self._open():
            return AloneCoordinator((self._keys, self._changed))

    def close(self) -> None:
        self._closed = True

    def _open(self) -> threading.Condition:
        if self._closed:
            raise UsageError("rank 0: this coordinator is closed")
        return self._changed


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 1, 2, 5`."""
    listed = list(ranks)
    return f"rank {listed[0]}" if len(listed) == 1 else f"ranks {', '.join(map(str, listed))}"
