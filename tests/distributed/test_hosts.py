"""rank0 over several hosts: connections by address, proved by a key that came through the ranks' store."""

from __future__ import annotations

import signal
import socket
from multiprocessing import AuthenticationError

import msgspec
import pytest
from support.feeding import Ranks
from support.waiting import until

from wbdist.distributed import channel
from wbdist.distributed.channel import Meeting
from wbdist.distributed.opening import Opened


def meeting_of(ranks: Ranks) -> Meeting:
    """What rank 0 told the others through the store."""
    (told,) = (ranks.root / "keys").glob("agree*open")
    meeting = msgspec.msgpack.decode(told.read_bytes(), type=Opened).meeting
    assert meeting is not None
    return meeting


def test_ranks_of_two_hosts_and_a_stranger(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a rank whose journal the aggregator cannot read feeds it by address alone; that whoever does not have the key
    is refused both ways, and neither that nor silence or garbage on its port disturbs the run."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")  # of rank 0's host, as the launcher names it
    monkeypatch.setenv("RANK", "0")
    ranks.start(2, strategy="rank0", steps=60, gate={"0": 30, "1": 30}, hosts=True)
    ranks.until("gate", 2)
    meeting = meeting_of(ranks)
    assert meeting.address[0] == "127.0.0.2"
    with pytest.raises((AuthenticationError, OSError, EOFError)):
        channel.dial(msgspec.structs.replace(meeting, key=b"x" * 32))
    silent = socket.create_connection(meeting.address)
    rude = socket.create_connection(meeting.address)
    rude.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    ranks.open_gate()
    assert ranks.wait() == [0, 0], ranks.errors()
    silent.close()
    rude.close()
    rows = ranks.rows()
    assert [row["_step"] for row in rows] == list(range(60))
    assert {row["count"] for row in rows} == {3}


@pytest.mark.slow
def test_killed_rank_of_another_host_holds_up_for_its_time_only(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a rank which dies on another host is waited for LINGER seconds, and that what it had sent is in the run."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "0")
    ranks.start(2, strategy="rank0", steps=60, gate={"0": 50, "1": 40}, hosts=True)
    ranks.until("gate", 2)
    until(lambda: len(ranks.rows()) == 40, "the rows of both")
    ranks.processes[1].send_signal(signal.SIGKILL)
    ranks.open_gate()
    until(lambda: len(ranks.rows()) >= 50, "rank 0's rows without rank 1's", 60)
    ranks.wait(60)
    assert [(row["_step"], row["count"]) for row in ranks.rows()] == [(step, 3 if step < 40 else 1) for step in range(60)]
