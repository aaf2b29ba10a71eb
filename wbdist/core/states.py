"""The state of a run, as one table of state x event.

Theory: a run is *running* while something beats for it. It ends by its own word (`complete` with an exit code), by the
word of a witness that saw its process die (`lost`), or by silence (`silence`, 5 minutes unless set otherwise). Being
marked `preempting` changes what an end means: a non-zero end, a lost process or silence are then *preempted*, which a
scheduler answers by requeueing, while exit 0 is *finished* even so (W&B's documented rule). A beat revives a run that
was only believed dead (crashed, preempted); a run that ended by its own word needs a new attempt or a first upsert of a
resuming client (`start`). Events that make no sense in a state leave it as it is.
"""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CRASHED = "crashed"
    KILLED = "killed"
    PREEMPTING = "preempting"
    PREEMPTED = "preempted"


class RunEvent(StrEnum):
    START = "start"
    """A client opened the run, or a new attempt began."""
    BEAT = "beat"
    """Data or a heartbeat arrived."""
    PREEMPT = "preempt"
    """The client marked the run preempting."""
    EXIT_ZERO = "exit_zero"
    EXIT_NONZERO = "exit_nonzero"
    LOST = "lost"
    """A witness (the shipper) saw the process end without a word."""
    SILENCE = "silence"
    """Nothing was heard for the heartbeat window."""
    KILL = "kill"
    """Stopped by a person or by the API."""
    REQUEUE = "requeue"
    """Put back in a queue."""
    GIVE_UP = "give_up"
    """Declared failed through the API."""


S, E = RunState, RunEvent

TABLE: dict[RunState, dict[RunEvent, RunState]] = {
    S.PENDING: {E.START: S.RUNNING, E.BEAT: S.RUNNING, E.KILL: S.KILLED, E.GIVE_UP: S.FAILED},
    S.RUNNING: {
        E.PREEMPT: S.PREEMPTING,
        E.EXIT_ZERO: S.FINISHED,
        E.EXIT_NONZERO: S.FAILED,
        E.LOST: S.CRASHED,
        E.SILENCE: S.CRASHED,
        E.KILL: S.KILLED,
        E.REQUEUE: S.PENDING,
        E.GIVE_UP: S.FAILED,
    },
    S.PREEMPTING: {
        E.START: S.RUNNING,
        E.EXIT_ZERO: S.FINISHED,
        E.EXIT_NONZERO: S.PREEMPTED,
        E.LOST: S.PREEMPTED,
        E.SILENCE: S.PREEMPTED,
        E.KILL: S.KILLED,
        E.REQUEUE: S.PENDING,
    },
    S.PREEMPTED: {E.START: S.RUNNING, E.BEAT: S.PREEMPTING, E.EXIT_ZERO: S.FINISHED, E.REQUEUE: S.PENDING, E.KILL: S.KILLED},
    S.CRASHED: {
        E.START: S.RUNNING,
        E.BEAT: S.RUNNING,
        E.PREEMPT: S.PREEMPTING,
        E.EXIT_ZERO: S.FINISHED,
        E.EXIT_NONZERO: S.FAILED,
        E.REQUEUE: S.PENDING,
        E.KILL: S.KILLED,
    },
    S.FAILED: {E.START: S.RUNNING, E.REQUEUE: S.PENDING},
    S.FINISHED: {E.START: S.RUNNING},
    S.KILLED: {E.START: S.RUNNING, E.REQUEUE: S.PENDING},
}

TERMINAL = frozenset({S.FINISHED, S.FAILED, S.CRASHED, S.KILLED, S.PREEMPTED})
"""States in which nobody is expected to be working on the run."""


def next_state(state: RunState, event: RunEvent) -> RunState:
    """The state after `event`; unchanged when the table has no entry."""
    return TABLE[state].get(event, state)
