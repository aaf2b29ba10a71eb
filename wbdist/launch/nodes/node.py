"""The launcher on one of several hosts: its ranks are part of attempts that all hosts begin and end together.

join -> Welcome -> Ready -> Start -> the ranks run (`attempt.py`, told of the other hosts) -> Ended -> Outcome -> Ready, or
leave. When the rendezvous is lost, the ranks are ended as after a failure, and the node joins again for `join_timeout` seconds:
the host may come back. Every other wait is on a rendezvous that is heard of every few seconds.
"""

from __future__ import annotations

import secrets
import selectors
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from wbdist.errors import EXIT_PREEMPTED, UsageError
from wbdist.launch import intent, times
from wbdist.launch.attempt import Attempt, Signals, StartRanks, Trouble
from wbdist.launch.judgement import RankEnd, judge, signal_name
from wbdist.launch.nodes.line import Event, Line, Lost
from wbdist.launch.nodes.messages import Ended, Gone, Hello, Outcome, Ready, Standing, Start, Welcome, key_of
from wbdist.launch.nodes.rendezvous import Rendezvous, listen
from wbdist.launch.nodes.rounds import Rounds, counted
from wbdist.launch.policy import Decision, Policy
from wbdist.launch.sentinel import Sentinel
from wbdist.launch.supervisor import LaunchSpec, environments, free_port, leave_with, say_to_person

ANSWER = 15.0
"""Seconds that a node which was told to stop waits for what becomes of the job, besides the grace of ranks elsewhere."""


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """How the launchers of one job find each other. The same on all hosts, but for `node_rank`."""

    nnodes: tuple[int, int]
    """At least and at most so many hosts; the same number twice, or hosts may come and go."""
    host: str
    port: int
    job: str = "wbdist"
    """Tells this job from others that may meet at the same place."""
    secret: str = ""
    """Where strangers reach the port: what only this job's nodes know."""
    node_rank: int | None = None
    """None: by order of arrival."""
    join_timeout: float = 600.0
    """Seconds to wait for all nodes to be there, at the start and after a node was lost."""
    keep_alive: float = 15.0
    """Seconds of silence after which a node is lost. The hosting node's counts."""

    def __post_init__(self) -> None:
        fewest, most = self.nnodes
        if not 1 <= fewest <= most:
            raise UsageError(f"{fewest}:{most} nodes: give at least 1, and no more at least than at most")
        if self.node_rank is not None and not 0 <= self.node_rank < most:
            raise UsageError(f"node rank {self.node_rank} of {most} nodes: count from 0")
        if not 0 < self.port < 65536:
            raise UsageError(f"port {self.port} is none; give 1 to 65535")
        try:
            self.host.encode("idna")  # as the look-up of names does
        except UnicodeError as error:
            raise UsageError(f"{self.host!r} can be no host: {error}; give a name or an address") from None
        if self.keep_alive < 1 or self.join_timeout <= 0:
            raise UsageError(f"keep_alive={self.keep_alive}, join_timeout={self.join_timeout}: give seconds, 1 or more")

    @property
    def place(self) -> str:
        return f"{self.host}:{self.port}"


def supervise_node(
    spec: LaunchSpec,
    meeting: Meeting,
    start_ranks: StartRanks,
    say: Callable[[str], None] | None = None,
    last_lines: Callable[[int], Sequence[str]] | None = None,
) -> int:
    """Main thread, on every host: as `supervise`, for the `spec.nprocs` ranks that run here. The same code on all hosts.

    `spec`'s budget and `on_preempt` count on the host of the rendezvous; its grace where a signal arrives.
    """
    say = say or say_to_person
    key = key_of(meeting.job, meeting.secret)
    directory = Path(tempfile.mkdtemp(prefix="wbdist-launch-"))
    try:
        with Signals() as signals, Sentinel() as sentinel, ExitStack() as stack:
            listener = listen(meeting.host, meeting.port, meeting.node_rank)
            if listener is not None:
                rounds = Rounds(
                    nnodes=meeting.nnodes,
                    policy=Policy(max_restarts=spec.max_restarts, on_preempt=spec.on_preempt),
                    join_timeout=meeting.join_timeout,
                    keep_alive=meeting.keep_alive,
                    say=say,
                    now=time.monotonic(),
                )
                here = Rendezvous(listener, rounds, key=key, keep_alive=meeting.keep_alive, own_address=meeting.host)
                stack.enter_context(here)
            node = _Node(spec, meeting, key, start_ranks, say=say, last_lines=last_lines, signals=signals, sentinel=sentinel)
            return node.run(directory, hosting=listener is not None)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Node:
    def __init__(
        self,
        spec: LaunchSpec,
        meeting: Meeting,
        key: bytes,
        start_ranks: StartRanks,
        *,
        say: Callable[[str], None],
        last_lines: Callable[[int], Sequence[str]] | None,
        signals: Signals,
        sentinel: Sentinel,
    ) -> None:
        self._spec, self._meeting, self._key = spec, meeting, key
        self._start_ranks, self._say, self._last_lines = start_ranks, say, last_lines
        self._signals, self._sentinel = signals, sentinel
        self._instance = secrets.token_hex(8)
        self._standing = Standing()
        self._events: deque[Event] = deque()
        self._stopped_by: int | None = None
        """The first signal that came to us, or of which we heard while our ranks ran."""
        self._ends: list[RankEnd] = []
        """Of the newest attempt."""
        self._start = times.Start(times.process_began())
        """When this start of the ranks began, and what became of the one before."""

    def run(self, directory: Path, *, hosting: bool) -> int:
        while True:
            line = Line(
                "localhost" if hosting else self._meeting.host,
                self._meeting.port,
                key=self._key,
                hello=self._hello,
                timeout=self._meeting.join_timeout,
                say=self._say,
            )
            line.start()
            try:
                code = self._take_part(line, directory, hosting=hosting)
            finally:
                line.close()
            if code is not None:
                return code

    def _hello(self, nonce: str, proved: str) -> Hello:
        return Hello(
            nonce=nonce,
            proof=proved,
            instance=self._instance,
            host=socket.gethostname(),
            nnodes=self._meeting.nnodes,
            nproc=self._spec.nprocs,
            node_rank=self._meeting.node_rank,
            standing=self._standing,
        )

    def _take_part(self, line: Line, directory: Path, *, hosting: bool) -> int | None:
        """The exit code when the job is over, or None when the connection is lost and worth another."""
        joined = False
        while True:
            event = self._next(line, joined=joined)
            match event:
                case int():
                    return event
                case Welcome():
                    joined = True
                    where = "here" if hosting else f"at {self._meeting.place}"
                    self._say(f"this is node {event.node} of {counted(self._meeting.nnodes)}; the rendezvous is {where}")
                    line.tell(Ready(free_port("")))
                case Start():
                    line.tell(self._attempt(event, line, directory))
                case Outcome():
                    self._standing = event.standing
                    self._show_culprit(event.culprit)
                    if event.exit_code is not None:
                        # Once for the job: every node hears the same.
                        decision = Decision(event.exit_code, event.sentence, requeue=event.requeue and hosting)
                        return leave_with(decision, self._say)
                    self._say(event.sentence)
                    line.tell(Ready(free_port("")))
                case Lost(why=why, exit_code=code):
                    self._say(why)
                    if code is not None or self._stopped_by is not None:
                        return self._leave_alone() if code is None else code
                    self._standing = msgspec.structs.replace(
                        self._standing, committed=max(self._standing.committed, line.committed, line.progress())
                    )
                    return None

    def _next(self, line: Line, *, joined: bool) -> Event | int:
        """What comes next, or an exit code. While the job goes on elsewhere that may be long; lost connections end it."""
        deadline = float("inf")
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals.wake, selectors.EVENT_READ)
            selector.register(line.wake, selectors.EVENT_READ)
            while True:
                self._events.extend(line.events())
                for trouble in line.told():
                    if trouble.kind == "signal" and self._stopped_by is None:
                        self._stopped_by = trouble.signal
                for received in self._signals.take():
                    if not joined:
                        self._stopped_by = received
                        return self._leave_alone()
                    again = self._stopped_by is not None
                    self._stopped_by = self._stopped_by or received
                    kind = Trouble("kill", "Ctrl-C again") if again else Trouble("signal", signal_name(received))
                    line.tell(msgspec.structs.replace(kind, signal=received, grace=self._spec.grace))
                    deadline = min(deadline, time.monotonic() + self._spec.grace + ANSWER)
                if self._events:
                    return self._events.popleft()
                left = deadline - time.monotonic()
                if left <= 0:
                    self._say("the rendezvous did not say what becomes of the job")
                    return self._leave_alone()
                for key, _ in selector.select(None if deadline == float("inf") else left):
                    if key.fd == self._signals.wake:
                        self._signals.drain()

    def _leave_alone(self) -> int:
        """We were told to stop, and there is no rendezvous to say what that came to: what we know ourselves."""
        assert self._stopped_by is not None
        if self._ends:
            code = judge(self._ends, self._stopped_by, committed=self._standing.committed >= 0).exit_code
        else:
            code = EXIT_PREEMPTED if self._standing.committed >= 0 else 128 + self._stopped_by
        self._say(f"stopped by {signal_name(self._stopped_by)}: leaving (exit code {code})")
        return code

    def _attempt(self, start: Start, line: Line, directory: Path) -> Ended:
        """Blocks until no rank of this host is alive."""
        self._standing = start.standing
        self._stopped_by = None
        number = start.standing.generation - 1
        intents = directory / f"{number:04d}"
        intents.mkdir()
        line.progress = lambda: intent.read_progress(intents)
        told = environments(self._spec, number=number, cause=start.cause, intents=str(intents), port=start.port)
        last = start.first_rank + self._spec.nprocs - 1
        ranks = f"rank {last}" if last == start.first_rank else f"ranks {start.first_rank} to {last}"
        again = f", attempt {number + 1}" if number else ""
        self._say(f"starting {self._spec.name} on {start.world_size} rank(s), here {ranks}{again}")
        if self._ends:
            self._start = msgspec.structs.replace(self._start, began=times.now())
        told = [{**one, **_place(start, local), **times.variables(self._start)} for local, one in enumerate(told)]
        try:
            started = self._start_ranks(told)
        except BaseException as error:
            line.tell(Gone(f"its ranks could not be started: {error}"))
            raise
        final = start.standing.idle >= self._spec.max_restarts
        attempt = Attempt(
            started,
            grace=self._spec.grace,
            signals=self._signals,
            sentinel=self._sentinel,
            say=self._say,
            first_rank=start.first_rank,
            elsewhere=line,
            durable=None if final else lambda rank: intent.is_durable(rank, intents),
        )
        ends = attempt.run()
        ended = times.of_monotonic(min(end.at for end in ends))
        self._start = times.Start(self._start.began, self._start.began, ended)
        said = intent.read_all(intents)
        self._ends = [msgspec.structs.replace(end, said=said.get(end.rank)) for end in ends]
        self._stopped_by = attempt.stopped_by
        newest, now = intent.read_progress(intents), time.monotonic()
        return Ended(tuple(msgspec.structs.replace(end, at=now - end.at) for end in self._ends), newest)

    def _show_culprit(self, rank: int | None) -> None:
        if self._last_lines is not None and rank is not None and rank in {end.rank for end in self._ends}:
            for line in self._last_lines(rank):
                self._say(f"  rank {rank}: {line}")


def _place(start: Start, local: int) -> dict[str, str]:
    """What a rank's environment says of where it stands among those of all hosts."""
    return {
        "RANK": str(start.first_rank + local),
        "WORLD_SIZE": str(start.world_size),
        "GROUP_RANK": str(start.node),
        "GROUP_WORLD_SIZE": str(start.nnodes),
        "MASTER_ADDR": start.address,
        "MASTER_PORT": str(start.port),
        "WBDIST_INCARNATION": start.incarnation,
    }


def endpoint(text: str) -> tuple[str, int]:
    """`host:port` or `[v6 address]:port`. Raises UsageError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{text!r} is no place to meet; give host:port, the same on all nodes, such as node0:29400")
    return host.removeprefix("[").removesuffix("]"), int(port)
