"""The rendezvous of several launchers: its decisions on values and an invented clock, and its port against strangers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import until

from wbdist.launch.attempt import Trouble
from wbdist.launch.judgement import RankEnd
from wbdist.launch.nodes.line import Line, Lost
from wbdist.launch.nodes.messages import (
    VERSION,
    Beat,
    Challenge,
    Ended,
    Hello,
    Message,
    Outcome,
    Ready,
    Refused,
    Standing,
    Start,
    Welcome,
    Wire,
    key_of,
    proof,
)
from wbdist.launch.nodes.rendezvous import STRANGERS, Rendezvous, listen
from wbdist.launch.nodes.rounds import LAST_CALL, NEVER, Rounds
from wbdist.launch.policy import Policy

JOIN, ALIVE = 100.0, 10.0


NEW = Standing()


def hello(
    instance: str, nproc: int = 1, node_rank: int | None = None, standing: Standing = NEW, nnodes: int | tuple[int, int] = 2
) -> Hello:
    both = (nnodes, nnodes) if isinstance(nnodes, int) else nnodes
    return Hello("", "", instance, f"host-{instance}", both, nproc, node_rank, standing)


def ended(first: int, *codes: int, newest: int = -1) -> Ended:
    return Ended(tuple(RankEnd(rank=rank, code=code, at=0.0) for rank, code in enumerate(codes, first)), newest)


class Table:
    """Rounds, and what each connection was told."""

    def __init__(self, nnodes: int | tuple[int, int] = 2, now: float = 0.0, **policy: Any) -> None:
        self.now = now
        self.said: list[str] = []
        settings = {"max_restarts": 3, "on_preempt": "exit", **policy}
        self.rounds = Rounds(
            nnodes=(nnodes, nnodes) if isinstance(nnodes, int) else nnodes,
            policy=Policy(**settings),
            join_timeout=JOIN,
            keep_alive=ALIVE,
            say=self.said.append,
            now=self.now,
        )
        self.told: dict[int, list[Message]] = {}

    def join(self, connection: int, *args: Any, **kwargs: Any) -> None:
        self.rounds.join(connection, hello(str(connection), *args, **kwargs), f"10.0.0.{connection}", self.now)
        self.take()

    def hear(self, connection: int, message: Message) -> None:
        self.rounds.hear(connection, message, self.now)
        self.take()

    def lose(self, connection: int) -> None:
        self.rounds.lose(connection, "it ended", self.now)
        self.take()

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.rounds.tick(self.now)
        self.take()

    def take(self) -> None:
        for connection, message in self.rounds.out:
            self.told.setdefault(connection, []).append(message)
        self.rounds.out.clear()

    def last(self, connection: int) -> Any:
        return self.told[connection][-1]

    def started(self, *nprocs: int) -> None:
        for connection, nproc in enumerate(nprocs or (1, 1)):
            self.join(connection, nproc)
            self.hear(connection, Ready(7000 + connection))


def test_ranks_are_numbered_node_by_node() -> None:
    """Proves what a generation begins with: all are there, ranks follow the nodes' numbers, one name, address and port."""
    table = Table(3)
    table.join(5, 2, node_rank=2, nnodes=3)
    table.join(6, 4, nnodes=3)
    table.hear(5, Ready(50))
    table.hear(6, Ready(60))
    assert not any(isinstance(message, Start) for told in table.told.values() for message in told)
    table.join(7, 1, nnodes=3)
    table.hear(7, Ready(70))
    starts: list[Start] = [table.last(connection) for connection in (6, 7, 5)]
    assert [start.first_rank for start in starts] == [0, 4, 5]
    assert [start.node for start in starts] == [0, 1, 2]
    assert {(start.world_size, start.address, start.port, start.incarnation) for start in starts} == {
        (7, "10.0.0.6", 60, starts[0].incarnation)
    }


def test_what_one_nodes_ranks_come_to_is_everybodys() -> None:
    """Proves the whole round: trouble goes to the others once, the first cause decides, the pause is kept, and the next
    generation has the next number and another name."""
    table = Table()
    table.started()
    first = table.last(0)
    table.hear(1, Trouble("failed", "rank 1 was killed by SIGKILL", signal=9))
    table.hear(1, Trouble("failed", "rank 1 once more"))
    assert [message for message in table.told[0] if isinstance(message, Trouble)] == [
        Trouble("failed", "node 1 (host-1): rank 1 was killed by SIGKILL", signal=9)
    ]
    table.hear(1, ended(1, -9))
    table.now += 1.0
    table.hear(0, ended(0, 1))
    outcome = table.last(0)
    assert (outcome.exit_code, outcome.culprit) == (None, 1)
    assert outcome.sentence.startswith("rank 1 was killed by SIGKILL; starting again in")
    table.hear(0, Ready(1))
    table.hear(1, Ready(2))
    assert isinstance(table.last(0), Outcome), "not before the pause is over"
    table.later(2.0)
    again = table.last(1)
    assert (again.standing.generation, again.cause) == (2, "rank 1 was killed by SIGKILL")
    assert again.incarnation != first.incarnation


@pytest.mark.parametrize(
    ("codes", "trouble", "expected"),
    [
        ((0, 0), None, 0),
        ((75, 75), Trouble("leaving", ""), 75),
        ((75, 75), Trouble("signal", "SIGTERM", signal=15), 75),
        ((-15, -15), Trouble("signal", "SIGTERM", signal=15), 143),
        ((65, 0), Trouble("failed", ""), 65),
        ((0, 69), Trouble("failed", ""), 69),
    ],
)
def test_all_leave_with_one_code(codes: tuple[int, int], trouble: Trouble | None, expected: int) -> None:
    """Proves the exit codes of a job that is over."""
    table = Table()
    table.started()
    if trouble is not None:
        table.hear(0, trouble)
    for connection, code in enumerate(codes):
        table.hear(connection, ended(connection, code))
    assert [table.last(connection).exit_code for connection in (0, 1)] == [expected, expected]
    assert table.rounds.over


def test_a_lost_node_is_waited_for_whatever_the_others_saved() -> None:
    """Proves that ranks which leave preempted because a host died do not end the job, that it goes on with another host in that
    place, and is given up with the missing one named."""
    for comes in (True, False):
        table = Table()
        table.started()
        table.lose(1)
        assert table.last(0) == Trouble("failed", "node 1 (host-1) was lost: it ended")
        table.hear(0, ended(0, 75, newest=4))
        assert table.last(0).exit_code is None
        assert "when node 1 is back, which may take 100 s" in table.last(0).sentence
        table.hear(0, Ready(1))
        if comes:
            table.join(2)
            table.hear(2, Ready(2))
            assert table.last(2).standing == Standing(2, 4, 0)
            assert table.last(2).cause == "node 1 (host-1) was lost: it ended"
        else:
            table.later(JOIN + 1)
            assert table.last(0).exit_code == 70
            assert "waited 100 s for node 1; here: node 0 (host-0)" in table.last(0).sentence


@pytest.mark.parametrize(
    ("code", "stopped", "expected"), [(0, False, None), (75, True, 75), (-15, True, 143), (0, True, 70), (65, False, 65)]
)
def test_a_job_is_not_finished_while_a_nodes_end_is_unknown(code: int, stopped: bool, expected: int | None) -> None:
    """Proves what the others' ends come to when a node was lost, with and without a signal."""
    table = Table()
    table.started()
    if stopped:
        table.hear(0, Trouble("signal", "SIGTERM", signal=15))
    table.lose(1)
    table.hear(0, ended(0, code))
    assert table.last(0).exit_code == expected


def test_a_rendezvous_that_was_lost_goes_on_with_what_the_nodes_know() -> None:
    """Proves that the count of attempts, the newest checkpoint and the budget survive the host that kept them."""
    table = Table(max_restarts=1)
    table.join(0)
    table.join(1, standing=Standing(generation=3, committed=20, idle=0))
    for connection in (0, 1):
        table.hear(connection, Ready(1))
    assert table.last(0).standing == Standing(4, 20, 1)
    for connection in (0, 1):
        table.hear(connection, ended(connection, 1, newest=20))
    assert table.last(0).exit_code == 70


def test_who_has_no_place() -> None:
    """Proves that one too many waits until somebody must have been found lost, then is refused; or has the place by then."""
    table = Table()
    table.started()
    table.join(2)
    table.join(3, node_rank=1)
    assert 2 not in table.told
    assert table.rounds.due == ALIVE
    table.lose(1)
    assert isinstance(table.last(2), Welcome)
    table.later(ALIVE + 1)
    assert isinstance(table.last(3), Refused)
    table.join(4, nnodes=3)
    assert "--nnodes 3" in table.last(4).why
    # The same launcher connects anew before its old connection is known to be dead.
    table.rounds.join(9, hello("0"), "10.0.0.9", table.now)
    table.take()
    assert isinstance(table.last(9), Welcome)
    assert table.last(9).node == 0


def test_nodes_come_and_go() -> None:
    """Proves 3 -> 2 -> 3 of 2:3: a job that could begin calls for more a while, goes on without who is lost, and starts again
    for who comes, which costs no restart of the budget."""
    table = Table((2, 3), max_restarts=0)
    elastic: Any = {"nnodes": (2, 3)}
    for connection in (0, 1, 2):
        table.join(connection, **elastic)
        table.hear(connection, Ready(1))
    assert [table.last(connection).world_size for connection in (0, 1, 2)] == [3, 3, 3]
    table.lose(1)
    for connection in (0, 2):
        table.hear(connection, ended(connection, 75, newest=5))
        if connection == 2:
            assert table.last(0).exit_code is None
    for connection in (0, 2):
        table.hear(connection, Ready(1))
    assert isinstance(table.last(0), Outcome), "the last call"
    table.later(LAST_CALL + 0.1)
    assert [(table.last(c).node, table.last(c).first_rank, table.last(c).nnodes) for c in (0, 2)] == [(0, 0, 2), (1, 1, 2)]
    table.join(3, **elastic)
    table.hear(3, Ready(1))
    assert table.last(3) == Welcome("", 1, ALIVE)
    for connection in (0, 2):
        assert table.last(connection) == Trouble("regroup", "node 1 (host-3) has come")
        table.hear(connection, ended(connection, 75, newest=5))
    assert table.last(0).exit_code is None
    assert "giving up" not in table.last(0).sentence
    table.hear(0, Ready(1))
    table.hear(2, Ready(1))
    table.later(5.0)
    assert {table.last(connection).world_size for connection in (0, 2, 3)} == {3}
    assert {table.last(connection).cause for connection in (0, 2, 3)} == {"node 1 (host-3) has come"}


def test_who_comes_when_it_is_over() -> None:
    """Proves that a node which is late, be it the rendezvous's own, is told what became of the job instead of being left."""
    table = Table()
    table.later(JOIN + 1)
    assert table.rounds.over
    table.join(0)
    assert [type(message) for message in table.told[0]] == [Welcome, Outcome]
    assert table.last(0).exit_code == 70


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("jjrrreefslbt")), max_size=60))
def test_nobody_is_started_twice_and_nobody_waits_for_ever(steps: list[tuple[int, str]]) -> None:
    """Proves, for whatever nodes do in whatever order: a Start goes to all places at once, and only to who was ready for it;
    what was started is told its outcome before the next; and while nothing runs there is a deadline."""
    table = Table(2, on_preempt="relaunch", max_restarts=100)
    ready: set[int] = set()
    running: dict[int, str] = {}
    for connection, what in steps:
        match what:
            case "j" if connection not in table.rounds.members:
                table.join(connection)
            case "r" if connection not in running:
                ready.add(connection)
                table.hear(connection, Ready(1))
            case "e" if connection in running:
                table.hear(connection, ended(0, 75 if connection % 2 else 1))
            case "f":
                table.hear(connection, Trouble("failed", "x"))
            case "s" if running:
                table.hear(connection, Trouble("signal", "SIGTERM", signal=15))
            case "l":
                ready.discard(connection)
                running.pop(connection, None)
                table.lose(connection)
            case "b":
                table.hear(connection, Beat(3))
            case "t":
                table.later(7.0)
        starts = {c: told.pop() for c, told in table.told.items() if told and isinstance(told[-1], Start)}
        if starts:
            assert sorted(start.node for start in starts.values()) == [0, 1]
            assert len({start.incarnation for start in starts.values()}) == 1
            assert starts.keys() <= ready
            assert not starts.keys() & running.keys()
            ready -= starts.keys()
            running = dict.fromkeys(starts, "")
        for told in table.told.values():
            if told and isinstance(told[-1], Outcome):
                running.clear()
        table.told.clear()
        assert running or table.rounds.over or table.rounds.due < NEVER


@contextmanager
def rendezvous(rounds: Rounds, key: bytes, **settings: float) -> Iterator[int]:
    listener = listen("localhost", 0, 0)
    assert listener is not None
    port = listener.getsockname()[1]
    with Rendezvous(listener, rounds, key=key, keep_alive=ALIVE, own_address="localhost"):
        yield port


def line(port: int, key: bytes, instance: str, timeout: float = 30.0) -> Line:
    def greeting(nonce: str, proved: str) -> Hello:
        return Hello(nonce, proved, instance, "here", (2, 2), 1, None, Standing())

    made = Line("localhost", port, key=key, hello=greeting, timeout=timeout, say=lambda _line: None)
    made.start()
    return made


def event(one: Line) -> Any:
    found = until(one.events, "an event", 30)
    assert len(found) == 1
    return found[0]


def test_a_rendezvous_without_the_key_is_not_believed() -> None:
    """Proves that nodes find out whom they talk to, too."""
    with socket.create_server(("localhost", 0)) as impostor:
        one = line(impostor.getsockname()[1], b"key", "a")
        accepted, _ = impostor.accept()
        wire = Wire(accepted)
        wire.say(Challenge(VERSION, "nonce"))
        answer = until(lambda: next(wire.read(), None), "its answer", 30)
        wire.say(Welcome(proof(b"guessed", "rendezvous", answer.nonce, "nonce"), 0, ALIVE))
        lost = event(one)
        assert (lost.exit_code, "has another key" in lost.why) == (65, True)
        one.close()
        wire.close()


def test_strangers_cost_nothing_but_their_connection() -> None:
    """Proves that garbage, a half message, one that is too long, a wrong key and silence, more of it than there is room for, do
    not keep two nodes from meeting."""
    table = Table(now=time.monotonic())
    with rendezvous(table.rounds, key_of("job", "secret")) as port:
        strangers = [socket.create_connection(("localhost", port)) for _ in range(STRANGERS)]
        junk = [b"GET / HTTP/1.1\r\n\r\n" * 99, b"\x00\x00\x00\x09half", b"\x00\x00\x00\x03abc", b"\xff" * 9]
        for stranger, words in zip(strangers, junk, strict=False):
            stranger.sendall(words)
        one = line(port, key_of("job", "secret"), "a")
        wrong = line(port, key_of("job", "guessed"), "b")
        refused = event(wrong)
        assert isinstance(refused, Lost)
        assert (refused.exit_code, "refused this node: it has another key" in refused.why) == (65, True)
        two = line(port, key_of("job", "secret"), "c")
        assert {event(each).node for each in (one, two)} == {0, 1}
        one.tell(Ready(1))
        two.tell(Ready(2))
        assert {event(each).first_rank for each in (one, two)} == {0, 1}
        two.tell(Trouble("failed", "x"))
        assert until(one.told, "the trouble", 30)[0].sentence == "node 1 (here): x"
        for each in (one, two, wrong):
            each.close()
        for stranger in strangers:
            with suppress(OSError):
                stranger.close()
    gone = line(port, b"", "d", timeout=0.01)
    assert event(gone).exit_code == 70
    gone.close()
