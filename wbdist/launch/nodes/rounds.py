"""What the rendezvous of a job's nodes decides: who is who, when a generation begins, what its end means. No I/O, no clock.

gathering  all nodes are here and ready, and the pause is over        -> running: Start to all
           at least the fewest, and LAST_CALL seconds nobody came     -> the same
           `join_timeout` is over                                     -> over, 70, naming who did not come
           a signal came to any launcher                              -> over, 75 or 128+signal
running    a rank failed, a signal came, a node was lost              -> told to all other nodes, once
           another node came, for which there is a place              -> told as well: the ranks save, and all start again
           the ranks of all nodes that are left have ended            -> judged as one attempt (`judgement`, `policy`):
                                                                         gathering again, or over
A lost node makes the attempt one that failed, whatever the others could still save: they wait for it to come back.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import msgspec

from wbdist.errors import EXIT_FINISHED, EXIT_PREEMPTED, EXIT_RETRYABLE
from wbdist.launch.attempt import Trouble
from wbdist.launch.judgement import Judgement, judge
from wbdist.launch.nodes.messages import Beat, Ended, Gone, Hello, Message, Outcome, Ready, Refused, Standing, Start, Welcome
from wbdist.launch.policy import Decision, Policy

NEVER = float("inf")
LAST_CALL = 10.0
"""Seconds that a job which could begin waits for more nodes after the last that came or was lost."""


class Member(msgspec.Struct):
    """A node that is here."""

    number: int
    hello: Hello
    address: str
    """Where the others reach it."""
    ready: Ready | None = None
    playing: bool = False
    """Its ranks are part of the generation that runs; False for one that came meanwhile."""
    ended: Ended | None = None
    """Of the generation that runs; its ends are by our clock."""

    @property
    def name(self) -> str:
        return f"node {self.number} ({self.hello.host})"


class Waiting(msgspec.Struct):
    """One for whom there is no place, or not the one that it wants; an old holder may turn out to be lost."""

    hello: Hello
    address: str
    until: float


class Rounds:
    """The state of one rendezvous. Nodes are known by their connection's number; what they are to get is put into `out`."""

    def __init__(
        self,
        *,
        nnodes: tuple[int, int],
        policy: Policy,
        join_timeout: float,
        keep_alive: float,
        say: Callable[[str], None],
        now: float,
    ) -> None:
        """`nnodes`: at least and at most so many."""
        (self._fewest, self._most), self._policy = nnodes, policy
        self._join_timeout, self._keep_alive = join_timeout, keep_alive
        self._say = say
        self.out: list[tuple[int, Message]] = []
        """(connection, message), in order; whoever sends them empties it. A Welcome still lacks its proof."""
        self.members: dict[int, Member] = {}
        self._waiting: dict[int, Waiting] = {}
        self._final: Outcome | None = None
        """What became of the job, once it is over."""
        self._generation = 0
        self._running = False
        self._cause = ""
        self._committed = -1
        """The newest step that anybody said is committed."""
        self._not_before, self._deadline = now, now + join_timeout
        self._last_call = now + LAST_CALL
        self._came = ""
        """Who has come to take part in the next generation."""
        self._stopped_by: int | None = None
        self._told: set[str] = set()
        """Kinds of trouble that all have been told of in this generation."""
        self._lost: list[str] = []
        """Nodes lost in this generation, and why."""

    @property
    def over(self) -> bool:
        return self._final is not None

    @property
    def standing(self) -> Standing:
        return Standing(self._generation, max(self._committed, self._policy.committed), self._policy.idle)

    # Coming and going -----------------------------------------------------------------------------------

    def join(self, connection: int, hello: Hello, address: str, now: float) -> None:
        """A node that has proved to have the key: Welcome, Refused, or neither yet."""
        if hello.nnodes != (self._fewest, self._most):
            ours = counted((self._fewest, self._most))
            why = f"it was started with --nnodes {counted(hello.nnodes)}, the node that hosts the rendezvous with {ours}"
            self.out.append((connection, Refused(why)))
            return
        for other, member in list(self.members.items()):
            if member.hello.instance == hello.instance:
                self.lose(other, "it connected anew", now)
        number = self._place(hello)
        if self._final is not None:
            self.out += [(connection, Welcome("", number or 0, self._keep_alive)), (connection, self._final)]
            return
        if number is None:
            self._waiting[connection] = Waiting(hello, address, now + self._keep_alive)
            return
        self.members[connection] = Member(number, hello, address)
        self.out.append((connection, Welcome("", number, self._keep_alive)))
        if hello.standing.generation > self._generation:
            # The rendezvous before this one was lost, and an attempt with it, of which nobody knows what it came to.
            self._generation = hello.standing.generation
            self._policy.idle = max(self._policy.idle, hello.standing.idle + 1)
            self._policy.committed = max(self._policy.committed, hello.standing.committed)
        missing = self._missing()
        came = self.members[connection].name
        self._say(f"{came} is here" + (f"; waiting for {_nodes(missing)}" if missing and not self._running else ""))
        self._last_call = now + LAST_CALL
        if self._running:
            self._came = f"{came} has come"
            self._tell_others(Trouble("regroup", self._came), connection)

    def _place(self, hello: Hello) -> int | None:
        free = self._missing()
        if hello.node_rank is None:
            return free[0] if free else None
        return hello.node_rank if hello.node_rank in free else None

    def _missing(self) -> list[int]:
        taken = {member.number for member in self.members.values()}
        return [number for number in range(self._most) if number not in taken]

    def lose(self, connection: int, why: str, now: float) -> None:
        """The connection is gone, or silent for too long."""
        self._waiting.pop(connection, None)
        member = self.members.pop(connection, None)
        if member is None or self.over:
            return
        lost = f"{member.name} was lost: {why}"
        self._last_call = now + LAST_CALL
        if not self._running:
            self._deadline = max(self._deadline, now + self._join_timeout)
        if not member.playing:
            self._say(lost)
        else:  # all are told
            self._lost.append(lost)
            self._tell_others(Trouble("failed", lost), connection)
            self._conclude_if_ended(now)
        for other, waiting in list(self._waiting.items()):
            if self._place(waiting.hello) is not None:
                del self._waiting[other]
                self.join(other, waiting.hello, waiting.address, now)

    # What nodes say -------------------------------------------------------------------------------------

    def hear(self, connection: int, message: Message, now: float) -> None:
        """A message of a node that was welcomed."""
        member = self.members.get(connection)
        if member is None:
            return
        match message:
            case Ready():
                member.ready = message
                self._begin_if_ready(now)
            case Trouble():
                self._on_trouble(connection, member, message, now)
            case Ended() if member.playing:
                ends = tuple(msgspec.structs.replace(end, at=now - end.at) for end in message.ends)
                member.ended = msgspec.structs.replace(message, ends=ends)
                self._committed = max(self._committed, message.newest)
                self._conclude_if_ended(now)
            case Beat():
                self._committed = max(self._committed, message.committed)
            case Gone():
                self.lose(connection, message.sentence, now)
            case _:
                why = f"it said {type(message).__name__} out of turn"
                self.out.append((connection, Refused(why)))
                self.lose(connection, why, now)

    def _on_trouble(self, connection: int, member: Member, trouble: Trouble, now: float) -> None:
        if trouble.kind == "signal" and not self._running:
            self._finish(self._policy.stopped(trouble.signal))
            return
        if trouble.kind == "signal" and self._stopped_by is None:
            self._stopped_by = trouble.signal
        self._tell_others(msgspec.structs.replace(trouble, sentence=f"{member.name}: {trouble.sentence}"), connection)

    def _tell_others(self, trouble: Trouble, connection: int) -> None:
        if trouble.kind in self._told:
            return
        self._told.add(trouble.kind)
        for other, member in self.members.items():
            if other != connection and member.playing and member.ended is None:
                self.out.append((other, trouble))

    # Generations ----------------------------------------------------------------------------------------

    @property
    def due(self) -> float:
        """When `tick` has something to do, if nothing happens before."""
        times = [waiting.until for waiting in self._waiting.values()]
        if not self._running and not self.over:
            times.append(self._deadline)
            if self._enough():
                times.append(self._not_before if not self._missing() else max(self._not_before, self._last_call))
        return min(times, default=NEVER)

    def tick(self, now: float) -> None:
        for connection, waiting in list(self._waiting.items()):
            if now >= waiting.until:
                del self._waiting[connection]
                here = ", ".join(member.name for member in self._in_order())
                wanted = "" if waiting.hello.node_rank is None else f" with --node-rank {waiting.hello.node_rank}"
                self.out.append((connection, Refused(f"there is no place for another node{wanted}: {here} are here already")))
        if self._running or self.over:
            return
        if self._enough():
            self._begin_if_ready(now)
        elif now >= self._deadline:
            here = ", ".join(member.name for member in self._in_order())
            missing = _nodes(self._missing()) if self._missing() else "nodes that are here, to be ready"
            why = f"waited {self._join_timeout:g} s for {missing}; here: {here}; giving up (--join-timeout, exit code"
            self._finish(Decision(EXIT_RETRYABLE, f"{why} {EXIT_RETRYABLE})"))

    def _in_order(self) -> list[Member]:
        return sorted(self.members.values(), key=lambda member: member.number)

    def _enough(self) -> bool:
        """As many as are needed, and all that are here are ready."""
        return len(self.members) >= self._fewest and all(member.ready is not None for member in self.members.values())

    def _begin_if_ready(self, now: float) -> None:
        if self._running or self.over or now < self._not_before or not self._enough():
            return
        if self._missing() and now < self._last_call:
            return
        self._generation += 1
        self._came = ""
        self._running, self._stopped_by = True, None
        self._told.clear()
        self._lost.clear()
        incarnation, first = secrets.token_hex(8), 0
        members = self._in_order()
        world = sum(member.hello.nproc for member in members)
        ports = [member.ready.port for member in members if member.ready is not None]
        connections = {member.number: connection for connection, member in self.members.items()}
        for place, member in enumerate(members):
            member.ready, member.playing = None, True
            start = Start(
                standing=self.standing,
                incarnation=incarnation,
                cause=self._cause,
                first_rank=first,
                world_size=world,
                node=place,
                nnodes=len(members),
                address=members[0].address,
                port=ports[0],
            )
            self.out.append((connections[member.number], start))
            first += member.hello.nproc

    def _conclude_if_ended(self, now: float) -> None:
        if any(member.playing and member.ended is None for member in self.members.values()):
            return
        ends = [end for member in self.members.values() if member.ended is not None for end in member.ended.ends]
        for member in self.members.values():
            member.playing, member.ended = False, None
        idle = self._policy.idle
        self._policy.note(self._committed)
        stopped_by = self._stopped_by
        judged = judge(ends, stopped_by, committed=self._policy.committed >= 0)
        # What a lost node's ranks came to is not known, so what the others say is not the whole.
        partial = {EXIT_FINISHED} if stopped_by is not None else {EXIT_FINISHED, EXIT_PREEMPTED, EXIT_RETRYABLE}
        if self._lost and judged.exit_code in partial:
            judged = Judgement(EXIT_RETRYABLE, self._lost[0])
        elif self._came and stopped_by is None and judged.exit_code in {EXIT_PREEMPTED, EXIT_RETRYABLE}:
            judged = Judgement(EXIT_RETRYABLE, self._came)
            self._policy.idle = min(self._policy.idle, idle)  # nobody's failure
        self._running, self._cause = False, judged.why
        decision = self._policy.decide(judged, stopped_by)
        if decision.exit_code is not None:
            self._finish(decision, judged.culprit)
            return
        self._not_before = now + decision.pause
        self._deadline = self._not_before + self._join_timeout
        self._last_call = now + LAST_CALL
        sentence = decision.sentence
        if len(self.members) < self._fewest:
            sentence += f" when {_nodes(self._missing())} is back, which may take {self._join_timeout:g} s"
        self._to_all(Outcome(None, sentence, judged.culprit, standing=self.standing))

    def _finish(self, decision: Decision, culprit: int | None = None) -> None:
        self._running = False
        self._final = Outcome(decision.exit_code, decision.sentence, culprit, decision.requeue, self.standing)
        self._to_all(self._final)

    def _to_all(self, message: Message) -> None:
        self.out += [(connection, message) for connection in self.members]


def _nodes(numbers: Sequence[int]) -> str:
    return ("node " if len(numbers) == 1 else "nodes ") + ", ".join(map(str, numbers))


def counted(nnodes: tuple[int, int]) -> str:
    """As the command line has it."""
    fewest, most = nnodes
    return str(most) if fewest == most else f"{fewest}:{most}"
