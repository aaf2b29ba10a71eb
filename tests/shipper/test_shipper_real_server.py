"""The shipper against the real server, with both killed while they work."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import Server
from support.waiting import until

from wbdist.core.position import HISTORY, Watermark
from wbdist.protocol import operations, reads
from wbdist.run.shipper import client


class RealServer(Server):
    """One that is asked what it has."""

    def entity(self) -> str:
        found = operations.read_viewer(self.ask(operations.viewer()))
        assert found is not None
        return found.entity

    def steps(self) -> list[int]:
        rows: list[int] = []
        while True:
            after = (rows or [-1])[-1] + 1
            page = reads.history_page(self.entity(), "p", "r1", after, after + 1000, rows=1000)
            found = [row["_step"] for row in reads.read_history_page(self.ask(page))]
            if not found:
                return rows
            rows += found

    def state(self) -> str:
        found = reads.read_run(self.ask(reads.run(self.entity(), "p", "r1")))
        assert found is not None
        return str(found.state)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RealServer]:
    with RealServer(tmp_path / "server") as made:
        yield made


def test_both_are_killed_while_shipping(server: RealServer, wandb: Any) -> None:
    """Proves that with shipper and server SIGKILLed in turn while rows flow, and a second attempt that goes back to a
    checkpoint, the history is each step once, in order, and the run ends finished."""
    chance = random.Random(5)
    first = wandb.journal(server.url, attempt=1)
    client.watch(wandb.root, first.path, server.url, server.key)
    written = 0
    for victim in ("shipper", "server", "shipper"):
        for _ in range(8):
            wandb.rows(first, written, written + 150)
            written += 150
            time.sleep(chance.uniform(0.0, 0.02))
        if victim == "server":
            server.kill()
            wandb.rows(first, written, written + 100)
            written += 100
            server.start()
        elif pid := wandb.pid():
            os.kill(pid, signal.SIGKILL)
        assert client.flush(wandb.root, first.path, 30.0), wandb.log()
        assert server.steps() == list(range(written)), "acknowledged, but not there"
    first._release()  # as if killed: no END, the lock gone
    first.close = lambda *_: None
    cut = written - 500
    base = Watermark(attempt=1, counts={HISTORY: {"rank0": cut}}, step=cut - 1)
    second = wandb.journal(server.url, attempt=2, base=base, cause="lost")
    client.watch(wandb.root, second.path, server.url, server.key)
    wandb.rows(second, cut, written + 200)
    second.close(0)
    assert client.flush(wandb.root, second.path, 30.0), wandb.log()
    assert server.steps() == list(range(written + 200))
    assert server.state() == "finished"


def test_the_embedded_server_is_found_again_on_another_port(server: RealServer, wandb: Any) -> None:
    """Proves that rows for an embedded server that came back elsewhere arrive there: from the shipper that was sending to its
    old address, and from the next one, which only has the journal; while another server sits on the old port."""
    old = server.url
    first = wandb.journal(old, data_dir=str(server.data_dir))
    client.watch(wandb.root, first.path, old, server.key)
    wandb.rows(first, 0, 10)
    assert client.flush(wandb.root, first.path, 30.0), wandb.log()
    server.kill()
    wandb.rows(first, 10, 20)
    with socket.create_server(("127.0.0.1", server.port)):  # so that the old port is surely another's
        server.start(0)
    assert server.url != old
    assert client.flush(wandb.root, first.path, 30.0), wandb.log()
    assert server.steps() == list(range(20))
    os.kill(wandb.pid(), signal.SIGKILL)
    wandb.rows(first, 20, 30)
    first.close(0)
    client.ensure_shipper(wandb.root)
    until(lambda: server.state() == "finished", "the end")
    assert server.steps() == list(range(30))


def test_another_server_on_the_port_refuses_nothing_for_ours(server: RealServer, wandb: Any, tmp_path: Path) -> None:
    """Proves that rows wait for the embedded server when it has died and another one, which knows no such key, has its port
    before it is back: they are not given up as refused."""
    journal = wandb.journal(server.url, data_dir=str(server.data_dir))
    client.watch(wandb.root, journal.path, server.url, server.key)
    wandb.rows(journal, 0, 10)
    assert client.flush(wandb.root, journal.path, 30.0), wandb.log()
    server.kill()
    other = Server(tmp_path / "other")
    other.start(server.port)
    try:
        wandb.rows(journal, 10, 20)
        until(lambda: "is another server's now" in wandb.log(), "the other's answer")
        assert not client.flush(wandb.root, journal.path, 0.5)
        server.start(0)
        assert client.flush(wandb.root, journal.path, 30.0), wandb.log()
        assert server.steps() == list(range(20))
    finally:
        other.kill()
