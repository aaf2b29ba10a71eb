"""The run-state table, walked at random: W&B's documented endings hold from wherever a run has come to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbdist.core.states import TERMINAL, RunEvent, RunState, next_state

S, E = RunState, RunEvent
walks = st.lists(st.sampled_from(list(RunEvent)), max_size=12)


def after(events: list[RunEvent], state: RunState = S.PENDING) -> RunState:
    for event in events:
        state = next_state(state, event)
    return state


@given(walks)
def test_a_run_can_always_be_opened_again(events: list[RunEvent]) -> None:
    """Proves that there is no state out of which a new attempt (or a resuming client) does not lead to running."""
    assert after([*events, E.START]) is S.RUNNING


@given(walks, st.sampled_from([E.EXIT_NONZERO, E.LOST, E.SILENCE]))
def test_marked_runs_end_preempted_unless_they_end_well(events: list[RunEvent], end: RunEvent) -> None:
    """Proves W&B's table of mark_preempting: exit 0 is finished even so, every other end is preempted."""
    assert after([*events, E.START, E.PREEMPT, E.EXIT_ZERO]) is S.FINISHED
    assert after([*events, E.START, E.PREEMPT, end]) is S.PREEMPTED
    assert after([*events, E.START, end]) in {S.FAILED, S.CRASHED}


@given(walks)
def test_beats_revive_only_what_was_believed_dead(events: list[RunEvent]) -> None:
    """Proves that late data undo a crash that was a guess, and nothing that was somebody's word."""
    before = after(events)
    beaten = next_state(before, E.BEAT)
    if before in {S.FINISHED, S.FAILED, S.KILLED, S.RUNNING, S.PREEMPTING}:
        assert beaten is before
    else:
        assert beaten not in TERMINAL


@given(
    walks, st.sampled_from([E.BEAT, E.PREEMPT, E.EXIT_ZERO, E.EXIT_NONZERO, E.LOST, E.SILENCE, E.KILL, E.REQUEUE, E.GIVE_UP])
)
def test_telling_twice_is_telling_once(events: list[RunEvent], event: RunEvent) -> None:
    """Proves that a repeated request cannot move a run further than the first did."""
    once = after([*events, event])
    assert next_state(once, event) is once


@pytest.mark.parametrize("state", list(RunState))
@pytest.mark.parametrize("event", list(RunEvent))
def test_every_pair_has_an_answer(state: RunState, event: RunEvent) -> None:
    """Proves that no event raises in any state."""
    assert next_state(state, event) in RunState
