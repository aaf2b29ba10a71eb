"""Coordination over a real c10d store: a thread a rank for breadth, torchrun for reality."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.feeding import PROGRAMS, REPOSITORY
from support.ports import free_port
from support.torchrun import torchrun

from wbdist.core.coordination import Coordinator
from wbdist.distributed import asking, coordination
from wbdist.distributed.coordination import AloneCoordinator, StoreCoordinator, connect, first_host, store_address
from wbdist.distributed.identity import RankIdentity
from wbdist.errors import DeadlineError, PeerLostError, UsageError


def env_of(port: int, **more: str) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def me(rank: int, size: int) -> RankIdentity:
    return RankIdentity(rank=rank, world_size=size, source="environment")


def on_every_rank(size: int, work: Callable[[Coordinator], Any], **environment: str) -> list[Any]:
    """`work` on a coordinator for each rank, at once."""
    env = env_of(free_port(), **environment)

    def rank(number: int) -> Any:
        peers = connect(me(number, size), timeout=15, env=env)
        try:
            return work(peers)
        finally:
            peers.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_incarnation_is_agreed_although_the_store_remembers_others() -> None:
    """Proves that ranks on a store with the remains of earlier incarnations (a stale announcement, its confirmation) agree on a
    fresh name, whoever comes first, and although torchrun's agents count restarts differently."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=15))
    env = env_of(server.port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="job")

    def incarnation(size: int) -> set[str]:
        def rank(number: int) -> str:
            peers = connect(me(number, size), timeout=60, env={**env, "TORCHELASTIC_RESTART_COUNT": str(number % 2)})
            assert peers.gather("seen", str(number).encode(), 60) == [str(n).encode() for n in range(size)]
            name = peers.incarnation  # type: ignore[attr-defined]
            peers.close()
            return str(name)

        with ThreadPoolExecutor(size) as pool:
            # Rank 0 last: the others see the stale announcement first.
            return set(pool.map(rank, reversed(range(size))))

    names = [incarnation(size) for size in (4, 2, 4, 4)]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 4, "each incarnation has a name of its own"


def test_a_rank_that_is_slow_to_hear_one_name_does_not_take_the_next_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that ranks which agree twice on one store (`connect`, then `init_process_group`, no launcher naming them) have
    the same names, also when rank 0 announces the second before another rank has seen the first one confirmed. (They
    had not: that rank took the second name for the first, and both waited for each other until their time was up.)"""
    from torch.distributed import HashStore

    read, missed = coordination._read, threading.Event()

    def read_late(store: Any, key: str) -> bytes:
        if threading.current_thread().name == "slow" and key.endswith("/confirmed") and not missed.is_set():
            missed.set()  # looked a moment too early, and then slept until rank 0 was on
            first = key.partition("/")[0].encode()  # not what is announced now: that may be the second already
            deadline = time.monotonic() + 30
            while read(store, "announced") == first and time.monotonic() < deadline:
                time.sleep(0.001)
            return b""
        return read(store, key)

    monkeypatch.setattr(coordination, "_read", read_late)
    store, names = HashStore(), {0: [""], 1: [""]}

    def rank(number: int) -> None:
        deadline = time.monotonic() + 20
        for time_now in range(2):
            name = coordination._agree_on_incarnation(store, me(number, 2), {}, deadline)  # type: ignore[arg-type]
            names[number][time_now:] = [name]

    threads = [threading.Thread(target=rank, args=(0,)), threading.Thread(target=rank, args=(1,), name="slow")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert missed.is_set()
    assert names[0] == names[1]
    assert len(set(names[0])) == 2


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_contract(size: int) -> None:
    """Proves the Coordinator's contract for a process alone and over the store: last put stands, first claim stands, agree
    gives rank 0's value, gather is in rank order, values may be empty or any bytes, clones see the same keys."""

    def work(peers: Coordinator) -> Any:
        odd = bytes([0, 255, 10])
        peers.put(f"mine/{peers.rank}", odd)
        peers.put(f"mine/{peers.rank}", odd * 2)
        claimed = peers.claim("first", f"rank {peers.rank}".encode())
        assert peers.claim("empty", b"") == b""
        assert peers.claim("empty", b"late") == b""
        agreed = peers.agree("value", b"zero" if peers.rank == 0 else None, 10)
        gathered = peers.gather("all", str(peers.rank).encode(), 10)
        peers.barrier("there", 10)
        twin = peers.clone()
        assert twin.get(f"mine/{peers.world_size - 1}", 10) == odd * 2
        assert twin.peek("nothing") is None
        twin.close()
        assert peers.peek("first") == claimed
        return claimed, agreed, gathered

    results = on_every_rank(size, work, WBDIST_INCARNATION="i1")
    assert len({claimed for claimed, _, _ in results}) == 1
    assert all(agreed == b"zero" for _, agreed, _ in results)
    assert all(gathered == [str(rank).encode() for rank in range(size)] for _, _, gathered in results)


@pytest.mark.parametrize("size", [1, 2])
def test_waits_are_bounded_and_name_what_is_missing(size: int) -> None:
    """Proves that each wait ends at its deadline with an error that names the key or the ranks."""

    def work(peers: Coordinator) -> None:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="'never'"):
            peers.get("never", 0.1)
        if peers.rank == 0 and peers.world_size > 1:
            with pytest.raises(PeerLostError, match=r"rank 1 did not reach 'lonely'"):
                peers.barrier("lonely", 0.1)
        if peers.rank == 1:
            with pytest.raises(PeerLostError, match="rank 0 did not decide 'undecided'"):
                peers.agree("undecided", None, 0.1)
            with pytest.raises(UsageError, match="only rank 0 decides"):
                peers.agree("mine", b"x", 0.1)
        assert time.monotonic() - began < 20
        peers.barrier("end", 10)
        peers.close()
        with pytest.raises(UsageError, match="closed"):
            peers.put("k", b"")

    on_every_rank(size, work, WBDIST_INCARNATION="i1")


def test_the_store_is_on_loopback_only_and_clones_open_no_connection() -> None:
    """Proves that ranks which meet at 127.0.0.1 do so at an IPv4 socket there (torch's own is for all the world, and waits for
    DNS at each connection), at a host name wherever torch listens, and that a clone costs no connection."""

    def sockets(table: str, port: int) -> list[tuple[str, str]]:
        # The kernel's table is no snapshot: where other sockets come and go while it is read, a row may be passed over.
        return max((read(table, port) for _ in range(10)), key=len)

    def read(table: str, port: int) -> list[tuple[str, str]]:
        rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        ours = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] in {"01", "0A"}]  # established, listening
        return [(row[1].partition(":")[0], row[3]) for row in ours]

    def work(peers: Coordinator) -> list[int]:
        peers.barrier("there", 10)
        before = len(sockets("tcp", port))
        peers.barrier("counted", 10)
        clones = [peers.clone() for _ in range(5)]
        assert all(clone.peek("nothing") is None for clone in clones)
        peers.barrier("cloned", 10)
        return [before, len(sockets("tcp", port))]

    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(lambda n: work(connect(me(n, 2), "i", 15, env_of(port))), number) for number in range(2)]
        before, after = ranks[0].result(60)
        assert ranks[1].result(60)[0] == before
    assert after == before == 3, "a listener and two ranks"
    assert ("0100007F", "0A") in sockets("tcp", port)
    assert not sockets("tcp6", port)
    assert [coordination._listen(host, 0) for host in ("localhost.invalid", "::1")] == [None, None]
    assert coordination._listen("127.0.0.1", port) is None, "taken: the store joins the server of this process"


def test_a_dead_store_is_a_lost_peer() -> None:
    """Proves that calls on a store whose host is gone raise PeerLostError instead of hanging."""
    from torch.distributed import PrefixStore, TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    peers = StoreCoordinator(PrefixStore("x", client), 1, 2, "i")  # type: ignore[arg-type]
    peers.put("k", b"v")
    del server
    began = time.monotonic()
    with pytest.raises(PeerLostError, match="store"):
        peers.get("other", 8)
    assert time.monotonic() - began < 10
    peers.close()


RELAY = """
import socket, sys, threading
def pass_on(a, b):
    while data := a.recv(65536):
        b.sendall(data)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
here, _ = listener.accept()
there = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
threading.Thread(target=pass_on, args=(there, here), daemon=True).start()
pass_on(here, there)
"""


def test_a_store_that_does_not_answer_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that whoever waits, with a deadline, on a store that has been stopped (SIGSTOP to what stands for its host) gets a
    PeerLostError that says so while it is still stopped, other threads and the end too, and that all works again behind it."""
    from torch.distributed import PrefixStore, TCPStore

    monkeypatch.setattr(asking, "SILENCE", 0.3)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    host = subprocess.Popen([sys.executable, "-c", RELAY, str(server.port)], stdout=subprocess.PIPE, text=True)
    thaw = threading.Timer(60, host.send_signal, [signal.SIGCONT])
    try:
        assert host.stdout is not None
        client = TCPStore("127.0.0.1", int(host.stdout.readline()), is_master=False, timeout=timedelta(seconds=60))
        peers = StoreCoordinator(PrefixStore("x", client), 1, 2, "i")  # type: ignore[arg-type]
        peers.put("k", b"v")
        assert peers.get("k", 5) == b"v"
        thaw.start()
        host.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(5) as pool:
            waits = [
                pool.submit(peers.get, "k", 0.1),
                pool.submit(peers.agree, "name", None, 0.1),
                pool.submit(peers.gather, "name", b"", 0.1),
                pool.submit(peers.clone().barrier, "name", 0.1),
            ]
            for wait in waits:
                with pytest.raises(PeerLostError, match="has not answered"):
                    wait.result(90)
            late = pool.submit(peers.peek, "k")
            assert thaw.is_alive(), "it was still stopped"
            host.send_signal(signal.SIGCONT)
            assert late.result(60) == b"v"
        assert peers.get("k", 30) == b"v"
        host.send_signal(signal.SIGSTOP)
        peers.close()
        assert thaw.is_alive(), "it was still stopped"
    finally:
        thaw.cancel()
        host.kill()
        host.communicate(timeout=60)


def test_the_time_a_job_was_suspended_is_not_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that an answer which comes after hours on the clock, most of which this process did not run, is heard."""
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr(asking, "time", SimpleNamespace(monotonic=lambda: next(hours)))
    ask, asked = asking.Asker(), threading.Event()
    threading.Timer(0.8, asked.set).start()
    assert ask(lambda: asked.wait(60), 1.0)


def test_a_missing_rank_is_named_when_the_incarnation_is_agreed() -> None:
    """Proves that a rank which never starts is named within the deadline."""
    env = env_of(free_port())
    with pytest.raises(PeerLostError, match="rank 1 did not join"):
        connect(me(0, 2), timeout=0.3, env=env)
    with pytest.raises(PeerLostError, match=r"rank 1 could not reach the store of rank 0 at 127.0.0.1"):
        connect(me(1, 2), timeout=0.3, env=env_of(free_port()))


def test_the_address_is_asked_for_clearly() -> None:
    """Proves that a missing or impossible meeting place is refused with the fix, and that srun's is derived."""
    with pytest.raises(UsageError, match="set MASTER_ADDR and MASTER_PORT"):
        store_address(me(0, 2), {})
    with pytest.raises(UsageError, match="MASTER_PORT='99999'"):
        store_address(me(0, 2), {"MASTER_ADDR": "a", "MASTER_PORT": "99999"})
    slurm = RankIdentity(rank=1, world_size=2, source="slurm")
    host, port = store_address(slurm, {"SLURM_STEP_NODELIST": "gpu[03-07,9]", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"})
    assert (host, 15000 <= port < 25000) == ("gpu03", True)
    assert [first_host(nodes) for nodes in ("a", "a,b", "n[1-2]-ib,x", "")] == ["a", "a", "n1-ib", ""]


def test_alone_imports_nothing_and_needs_nothing() -> None:
    """Proves that a single process gets its coordinator without torch and without an address."""
    code = "import sys\nfrom wbdist.distributed.coordination import connect, init_process_group\n"
    code += "from wbdist.distributed.identity import detect\np = connect(detect())\nassert p.gather('x', b'1', 1) == [b'1']\n"
    code += "assert not init_process_group(detect())\nprint('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90, check=True)
    assert done.stdout == "False\n"
    assert isinstance(connect(RankIdentity()), AloneCoordinator)


# torchrun -----------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "facts"
    directory.mkdir()
    return directory


def facts_of(size: int, out: Path, *kill: int, options: tuple[str, ...] = ("--standalone",)) -> list[dict[str, Any]]:
    """What each rank of elastic.py saw."""
    torchrun(size, PROGRAMS / "elastic.py", out, *kill, options=options)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_under_torchrun(out: Path, size: int) -> None:
    """Proves identity, coordination and the process group under torchrun with 1 and 4 gloo ranks (2: below)."""
    facts = facts_of(size, out)
    for rank, seen in enumerate(facts):
        assert seen["identity"] == [rank, size, rank, size, "torchrun", "torchrun"]
        assert seen["gathered"] == [f"r{n}" for n in range(size)]
        assert seen["agreed"] == "from rank 0"
        assert seen["sum"] == sum(range(size) if size > 1 else [0])
    assert len({seen["incarnation"] for seen in facts}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_first_restart_succeeds(out: Path, rendezvous: str) -> None:
    """Proves that after SIGKILL of a rank the first restart meets and forms its group, where a plain init_process_group
    reads the dead ranks' addresses (torch 2.13) and hangs or fails."""
    where = (
        ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
        if rendezvous == "static"
        else ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "r1")
    )
    facts = facts_of(2, out, 1, options=(*where, "--max-restarts", "3", "--monitor-interval", "0.1"))
    assert [seen["restart"] for seen in facts] == [1, 1]
    assert [seen["sum"] for seen in facts] == [1.0, 1.0]
