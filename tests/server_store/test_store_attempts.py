"""Attempts in the store: bases, fences, late words, ends."""

from __future__ import annotations

import pytest
from support.storing import NOW, StoredRun, cut, rows

from wbdist.core.position import CONSOLE, EVENTS, HISTORY, Watermark
from wbdist.core.states import RunEvent, RunState
from wbdist.errors import UsageError
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import SqlStore
from wbdist.server.store.interface import RunFields


def loss(step: int) -> float:
    return 1 / (step + 1)


def test_a_new_attempt_starts_at_its_base(store: SqlStore) -> None:
    """Log 0-9, resume at 5, log 5-11: each step once, the replaced rows in the archive, the run's row as of the live view."""
    run = StoredRun(store)
    assert run.begin(1).accepted
    run.append(1, 0, rows(range(10), loss=loss, only_first=lambda s: s))
    begun = run.begin(2, cut(1, 5))
    assert (begun.accepted, begun.attempt, begun.next, begun.lines) == (True, 2, {}, {HISTORY: 5})
    at_base = run.row
    assert at_base.summary == {"_step": 4, "loss": loss(4), "only_first": 4}
    assert (at_base.last_step, at_base.line_counts, at_base.attempt) == (4, {HISTORY: 5}, 2)
    run.append(2, 0, rows(range(5, 12), loss=lambda s: -loss(s)))
    assert run.history(keys=["_step", "loss"]) == [*rows(range(5), loss=loss), *rows(range(5, 12), loss=lambda s: -loss(s))]
    assert run.steps(attempt=1) == list(range(10))
    assert (run.row.last_step, run.row.line_counts) == (11, {HISTORY: 12})
    assert [(a.attempt, a.rows, a.rows_live, a.base_attempt, a.base_step) for a in store.attempts(run.pk)] == [
        (1, 10, 5, None, -1),
        (2, 7, 7, 1, 4),
    ]


def test_time_lost_is_what_was_trained_in_vain(store: SqlStore) -> None:
    """Proves that lost time counts from the last row that stayed to the last that was logged, by the rows' own clock, also
    for an attempt of which nothing stayed, for several writers, and over bases of bases."""
    run = StoredRun(store)

    def timed(attempt: int, seq: int, steps: range, at: float, writer: str = "rank0") -> None:
        run.append(attempt, seq, [{"_step": s, "_runtime": at + 10.0 * (s - steps.start)} for s in steps], writer=writer)

    def lost() -> list[float]:
        return [a.lost_seconds for a in store.attempts(run.pk)]

    run.begin(1)
    assert lost() == [0.0]
    timed(1, 0, range(10), 100.0)  # rows at 100, 110, ... 190
    assert lost() == [0.0]
    run.begin(2, cut(1, 5, writer="rank0"))
    assert lost() == [50.0, 0.0]
    timed(2, 0, range(5, 8), 145.0)  # 145, 155, 165: its base stood at 140
    run.begin(3, cut(1, 5, writer="rank0"))
    assert lost() == [50.0, 25.0, 0.0]
    timed(3, 0, range(5, 7), 141.0, "rank0")
    timed(3, 0, range(7, 9), 161.0, "rank0.1")
    run.begin(4)
    assert lost() == [90.0 + 100.0, 25.0, 31.0, 0.0]


def test_attempts_that_arrive_late_are_told_as_of_their_own_time(store: SqlStore) -> None:
    """Proves that begin and end of an offline attempt are when they were, not when they arrived; clocks ahead of ours are not
    believed, and a client that says nothing gets the time of arrival."""
    run = StoredRun(store)

    def times() -> list[tuple[float, float | None]]:
        return [(a.started_at - NOW, None if a.ended_at is None else a.ended_at - NOW) for a in store.attempts(run.pk)]

    store.begin_attempt(run.pk, BeginAttempt(1, "n1", "w", started=NOW - 500), NOW)
    store.begin_attempt(run.pk, BeginAttempt(2, "n2", "w", started=NOW - 400), NOW)
    assert times() == [(-500, -400), (-400, None)]
    store.record_event(run.pk, RunEvent.LOST, NOW + 1, attempt=1, cause="lost", ended=NOW - 450)
    store.record_event(run.pk, RunEvent.EXIT_ZERO, NOW + 1, attempt=2, exit_code=0, cause="exit", ended=NOW - 300)
    assert times() == [(-500, -450), (-400, -300)]
    store.begin_attempt(run.pk, BeginAttempt(3, "n3", "w", started=NOW + 900), NOW + 2)
    store.record_event(run.pk, RunEvent.EXIT_ZERO, NOW + 3, attempt=3, exit_code=0, cause="exit")
    assert times()[2] == (2, 3)


def test_a_repeated_begin_changes_nothing(store: SqlStore) -> None:
    """The answer to a begin may be lost; asking again gives the same answer with the position reached meanwhile."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(4)))
    run.begin(2, cut(1, 2))
    run.append(2, 0, rows(range(2, 5)))
    before = run.row
    again = run.begin(2, cut(1, 2), now=NOW + 50)
    assert (again.accepted, again.next, again.lines) == (True, {HISTORY: {"w": 3}}, {HISTORY: 2})
    assert run.row == before


def test_a_rival_of_the_same_number_is_refused_and_kept_apart(store: SqlStore) -> None:
    """Two jobs open attempt 2: the first holds it; what the other sends is in an archive of its own, at the same seqs."""
    run = StoredRun(store)
    run.begin(1)
    run.begin(2, nonce="first")
    assert not run.begin(2, nonce="second").accepted
    assert run.append(2, 0, rows(range(3), who="first"), nonce="first").code == ""
    fenced = run.append(2, 0, rows(range(4), who="second"), nonce="second")
    assert (fenced.code, fenced.attempt, fenced.next) == ("fenced", 2, {HISTORY: 4})
    assert run.append(2, 0, rows(range(1), who="nobody"), nonce="").code == "fenced"
    assert run.append(2, 2, rows(range(2, 5), who="second"), nonce="second").next == {HISTORY: 5}
    assert run.append(2, 9, rows(range(9, 10)), nonce="second").code == "gap"
    assert [row["who"] for row in run.history()] == ["first"] * 3
    assert [row["who"] for row in run.history(attempt=2, nonce="second")] == ["second"] * 5
    assert [row["who"] for row in run.history(attempt=2, nonce="")] == ["nobody"]
    assert (run.row.line_counts, run.row.last_step) == ({HISTORY: 3}, 2)


def test_a_zombie_is_fenced_and_archived(store: SqlStore) -> None:
    """An old attempt goes on posting: nothing of it shows, all of it is in the archive, the run's beat is not its beat."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(3)))
    run.begin(2, cut(1, 3), now=NOW + 1)
    before = run.row
    for start in range(3, 9, 3):
        done = run.append(1, start, rows(range(start, start + 3), zombie=1.0), now=NOW + 99)
        assert (done.code, done.attempt, done.next) == ("fenced", 2, {HISTORY: start + 3})
    after = run.row
    assert run.steps() == [0, 1, 2]
    assert run.steps(attempt=1) == list(range(9))
    assert (after.metrics, after.last_step, after.line_counts, after.heartbeat_at) == ([], 2, before.line_counts, NOW + 1)


def test_late_lines_below_the_base_are_live(store: SqlStore) -> None:
    """The server was away: attempt 2 is begun on 5 lines of attempt 1 of which 2 had come; the rest arrive and are shown."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(2), loss=loss))
    begun = run.begin(2, cut(1, 5))
    assert begun.lines == {HISTORY: 5}
    assert run.append(1, 2, rows(range(2, 5), loss=loss, late=True)).code == ""
    assert run.row.summary == {"_step": 4, "loss": loss(4), "late": True}
    assert run.append(1, 5, rows(range(5, 7))).code == "fenced"
    run.append(2, 0, rows(range(5, 6), loss=loss))
    assert run.steps() == [0, 1, 2, 3, 4, 5]
    assert run.row.line_counts == {HISTORY: 6}


def test_late_lines_do_not_undo_a_summary_that_the_attempt_gave(store: SqlStore) -> None:
    """A summary sent in attempt 2 stands when rows of attempt 1 arrive afterwards, or attempt 1 is begun afterwards."""
    run = StoredRun(store)
    run.begin(2, cut(1, 3))
    store.set_summary(run.pk, {"best": 1.5}, NOW, attempt=2)
    run.begin(1)
    run.append(1, 0, rows(range(3), loss=loss))
    store.set_summary(run.pk, {"best": 9.0}, NOW, attempt=1)
    assert run.row.summary == {"best": 1.5}
    run.begin(3, cut(2, 0, step=-1))
    assert run.row.summary == {"_step": 2, "loss": loss(2)}


def test_the_order_of_arrival_does_not_matter(store: SqlStore) -> None:
    """Three segments of an offline run, uploaded in every order: the same history, counts, summary and next."""
    segments = {
        1: (None, rows(range(4), loss=loss)),
        2: (cut(1, 3), rows(range(3, 8), loss=lambda s: 2 * loss(s))),
        3: (cut(2, 2), rows(range(5, 7), loss=lambda s: 3 * loss(s))),
    }
    seen = []
    for number, order in enumerate([(1, 2, 3), (3, 2, 1), (2, 3, 1), (3, 1, 2), (2, 1, 3), (1, 3, 2)]):
        run = StoredRun(store, f"r{number}")
        for attempt in order:
            base, lines = segments[attempt]
            run.begin(attempt, base)
            run.append(attempt, 0, lines)
        row = run.row
        lines_live = [(a.attempt, a.rows, a.rows_live) for a in store.attempts(run.pk)]
        seen.append((run.history(), row.summary, row.line_counts, row.last_step, row.metrics, row.attempt, lines_live))
    assert seen == [seen[0]] * 6
    assert [row["_step"] for row in seen[0][0]] == [0, 1, 2, 3, 4, 5, 6]


def test_lines_of_an_attempt_never_begun_are_not_taken(store: SqlStore) -> None:
    """Neither of an unknown attempt nor of a mere base: the client is to begin it first."""
    run = StoredRun(store)
    run.begin(3, cut(2, 4))
    for attempt in (1, 2, 7):
        done = run.append(attempt, 0, rows(range(1)))
        assert (done.code, done.next) == ("gap", {})
    assert run.history() == []


def test_a_gap_stores_nothing_of_any_stream(store: SqlStore) -> None:
    """One stream is ahead: the answer names the next seq of each, and none was stored."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(3)))
    both = {HISTORY: (3, ['{"_step":3}']), EVENTS: (2, ['{"cpu":1}'])}
    done = store.append(run.pk, both, NOW, attempt=1, nonce="n1", writer="w")
    assert (done.code, done.next) == ("gap", {HISTORY: 3, EVENTS: 0})
    assert (run.steps(), run.history(stream=EVENTS)) == ([0, 1, 2], [])


def test_duplicates_are_skipped_line_by_line(store: SqlStore) -> None:
    """A repeated request, also one that overlaps with what is known: each seq is stored once, the first content stands."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(4), v=1))
    version = run.row.version
    assert run.append(1, 0, rows(range(4), v=2)).next == {HISTORY: 4}
    assert run.row.version == version
    assert run.append(1, 2, rows(range(2, 6), v=3)).next == {HISTORY: 6}
    assert [row["v"] for row in run.history()] == [1, 1, 1, 1, 3, 3]
    assert run.row.line_counts == {HISTORY: 6}


def test_console_and_events_follow_the_base_too(store: SqlStore) -> None:
    """The cut goes through every stream and every writer by its own count."""
    run = StoredRun(store)
    run.begin(1)
    for writer in ("a", "b"):
        run.append(1, 0, [f"{writer}{i}" for i in range(4)], stream=CONSOLE, writer=writer)
        run.append(1, 0, [{"cpu": i, "w": writer} for i in range(3)], stream=EVENTS, writer=writer)
    run.begin(2, Watermark(1, {CONSOLE: {"a": 3, "b": 1}, EVENTS: {"b": 2}}))
    run.append(2, 0, ["next"], stream=CONSOLE, writer="a")
    assert store.console(run.pk) == ["a0", "a1", "a2", "b0", "next"]
    assert [store.console(run.pk, first=i, limit=2) for i in range(6)] == [
        ["a0", "a1"], ["a1", "a2"], ["a2", "b0"], ["b0", "next"], ["next"], [],
    ]  # fmt: skip
    assert run.history(stream=EVENTS) == [{"cpu": 0, "w": "b"}, {"cpu": 1, "w": "b"}]
    assert run.row.line_counts == {CONSOLE: 5, EVENTS: 2, HISTORY: 0} or run.row.line_counts == {CONSOLE: 5, EVENTS: 2}


def test_summary_is_the_last_value_of_each_visible_key(store: SqlStore) -> None:
    """Non-internal keys with _step, _timestamp and _runtime; None does not count; values cut away do not either."""
    run = StoredRun(store)
    run.begin(1)
    lines = [
        {"_step": 0, "_timestamp": 1.5, "_runtime": 0.5, "_wbdist/x": 1, "rare": "once", "a": 1, "d": {"x": [1, None]}},
        {"_step": 1, "_timestamp": 2.5, "_runtime": 1.5, "a": 2, "flag": True},
        {"_step": 2, "_timestamp": 3.5, "_runtime": 2.5, "a": None},
        {"_step": 3, "a": 4, "gone": 1},
    ]
    run.append(1, 0, lines)
    run.begin(2, cut(1, 3))
    assert run.row.summary == {
        "_step": 2, "_timestamp": 3.5, "_runtime": 2.5, "rare": "once", "a": 2, "d": {"x": [1, None]}, "flag": True,
    }  # fmt: skip
    assert run.row.metrics == ["a"]


def test_senseless_attempts_are_refused(store: SqlStore) -> None:
    """Numbers below 1, no nonce, a base that is not older, two bases: UsageError, and nothing changes."""
    run = StoredRun(store)
    run.begin(1)
    before = run.row
    for request in (
        BeginAttempt(0, "n", "w"),
        BeginAttempt(2, "", "w"),
        BeginAttempt(2, "n", "w", cut(2, 1)),
        BeginAttempt(2, "n", "w", cut(-1, 1)),
        BeginAttempt(2, "n", "w", cut(1, 1), at_step=0),
    ):
        with pytest.raises(UsageError, match="attempt"):
            store.begin_attempt(run.pk, request, NOW)
    with pytest.raises(UsageError, match="no run with the key 99"):
        store.begin_attempt(99, BeginAttempt(1, "n", "w"), NOW)
    assert run.row == before


def test_ends_of_attempts(store: SqlStore) -> None:
    """An end is recorded once; a later word corrects a guess; events of a superseded attempt leave the run's state alone."""
    run = StoredRun(store)
    run.begin(1)
    store.record_event(run.pk, RunEvent.PREEMPT, NOW, attempt=1)
    store.record_event(run.pk, RunEvent.SILENCE, NOW + 1, cause="silence")
    assert run.row.state is RunState.PREEMPTED
    run.begin(2, cut(1, 0), now=NOW + 2)
    store.record_event(run.pk, RunEvent.EXIT_NONZERO, NOW + 3, attempt=1, exit_code=75, cause="exit")
    store.record_event(run.pk, RunEvent.BEAT, NOW + 4, attempt=1)
    assert (run.row.state, run.row.heartbeat_at) == (RunState.RUNNING, NOW + 2)
    store.record_event(run.pk, RunEvent.EXIT_ZERO, NOW + 5, attempt=2, exit_code=0, cause="exit")
    store.record_event(run.pk, RunEvent.SILENCE, NOW + 6, cause="silence")
    assert run.row.state is RunState.FINISHED
    assert [(a.end_cause, a.exit_code, a.ended_at) for a in store.attempts(run.pk)] == [
        ("exit", 75, NOW + 3),
        ("exit", 0, NOW + 5),
    ]


def test_a_run_of_the_plain_sdk(store: SqlStore) -> None:
    """Offsets of W&B's client: repeats are skipped, rewritten console lines are replaced, a gap is told."""
    run = StoredRun(store)
    assert run.append(None, 0, rows(range(3), v=1)).code == ""
    assert run.append(None, 1, rows(range(1, 5), v=2)).code == ""
    assert run.append(None, 7, rows(range(7, 8))).code == "gap"
    assert [(row["_step"], row["v"]) for row in run.history()] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
    run.append(None, 0, ["a", "50%"], stream=CONSOLE)
    run.append(None, 1, ["100%", "b"], stream=CONSOLE)
    assert store.console(run.pk) == ["a", "100%", "b"]
    assert (run.row.attempt, run.row.line_counts) == (0, {HISTORY: 5, CONSOLE: 3})


def test_the_plain_sdk_within_an_attempt(store: SqlStore) -> None:
    """Its offset counts the live view: lines below the attempt's base are known already, wherever the request starts."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(3), v=1), writer="sdk")
    run.begin(2, cut(1, 2, writer="sdk"))
    assert run.append(None, 0, rows(range(5), v=2)).code == ""
    assert [(row["_step"], row["v"]) for row in run.history()] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]
    assert run.append(None, 3, rows(range(3, 6), v=3)).code == ""
    assert run.steps() == [0, 1, 2, 3, 4, 5]


def test_runs_projects_and_upserts(store: SqlStore) -> None:
    """Unset fields stay, set ones change, config merges `_wandb` per writer, lists are newest first, silence is found."""
    first, inserted = store.upsert_run("e", "p", "a", RunFields(tags=["x"], group="g", summary={"nan": float("inf")}), NOW)
    again, inserted_again = store.upsert_run(
        "e", "p", "a", RunFields(config={"lr": {"value": 1}, "_wandb": {"value": {"e": {"w1": 1}}}}), NOW + 1
    )
    assert (inserted, inserted_again, again.pk) == (True, False, first.pk)
    assert (again.tags, again.group, again.display_name) == (["x"], "g", first.display_name)
    assert again.version > first.version
    merged, _ = store.upsert_run("e", "p", "a", RunFields(config={"_wandb": {"value": {"e": {"w2": 2}}}}), NOW + 2)
    assert merged.config == {"_wandb": {"value": {"e": {"w1": 1, "w2": 2}}}}
    assert merged.summary == {"nan": float("inf")}
    store.upsert_run("e", "p", "b", RunFields(group="g2"), NOW + 10)
    assert [run.run_id for run in store.list_runs("e", "p")] == ["b", "a"]
    assert [run.run_id for run in store.list_runs("e", "p", group="g")] == ["a"]
    assert [run.run_id for run in store.list_runs("e", "p", limit=1)] == ["b"]
    assert store.silent_runs(NOW + 5) == [first.pk]
    projects = store.list_projects()
    assert projects == [{"entity": "e", "project": "p", "runs": 2, "created_at": NOW, "updated_at": NOW + 10}]
    assert store.get_run("e", "p", "nul\x00") is None


def test_without_a_clients_summary_the_last_values_are_it(store: SqlStore) -> None:
    """Also of two writers, by step and not by arrival; a summary that a client gives stays until the next attempt."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(5, 8), v=lambda s: s, a=1))
    store.set_summary(run.pk, {"mine": 1}, NOW, attempt=1)
    run.append(1, 3, rows(range(8, 9), v=0))
    assert run.row.summary == {"mine": 1}
    run.begin(2, Watermark(1, {HISTORY: {"w": 2}}, 6))
    assert run.row.summary == {"_step": 6, "v": 6, "a": 1}
    run.append(2, 0, rows(range(9, 10), v=9), writer="a")
    run.append(2, 0, rows(range(7, 9), v=lambda s: -s, b=2), writer="b")
    assert run.row.summary == {"_step": 9, "v": 9, "a": 1, "b": 2}


def test_rows_of_a_pools_workers_are_in_the_summary_beside_their_parents(store: SqlStore) -> None:
    """Proves that what workers log into their parent's run is in its summary, by step, before and after the parent, which knows
    its own rows alone, has said its own; and that what only the parent says stays."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(3), loss=lambda s: s), writer="w0-x")
    run.append(1, 0, rows(range(3, 4), score=1), writer="rank0")
    store.set_summary(run.pk, {"_step": 3, "score": 5, "best": 7}, NOW, attempt=1)  # 5: by hand, or a metric that was defined
    assert run.row.summary == {"_step": 3, "loss": 2, "score": 5, "best": 7}
    run.append(1, 3, rows(range(6, 8), loss=lambda s: s), writer="w0-x")
    run.append(1, 0, rows(range(4, 6), loss=lambda s: -s, only=1), writer="w1-y")
    assert run.row.summary == {"_step": 7, "loss": 7, "score": 5, "best": 7, "only": 1}
    run.append(1, 1, rows(range(8, 9), score=2), writer="rank0")
    store.set_summary(run.pk, {"_step": 8, "score": 2, "best": 8}, NOW, attempt=1)
    assert run.row.summary == {"_step": 8, "loss": 7, "score": 2, "best": 8, "only": 1}


def test_what_is_set_by_hand_in_a_shared_run_stays(store: SqlStore) -> None:
    """Proves that the server, which makes a shared run's summary of all writers' rows, adds what one of them set by hand, keeps
    it whatever rows come in whatever order, and does not take a row's older value for it."""
    run = StoredRun(store)
    run.begin(1, nonce="shared-x")
    run.append(1, 0, rows(range(3), v=1), writer="rank0", nonce="shared-x")
    store.set_summary(run.pk, {"best": 7, "v": 0, "_step": 2}, NOW, attempt=1)
    assert run.row.summary == {"_step": 2, "v": 1, "best": 7}
    run.append(1, 0, rows(range(5), v=2), writer="rank1", nonce="shared-x")
    run.append(1, 3, rows(range(3, 4), v=3), writer="rank0", nonce="shared-x")
    assert run.row.summary == {"_step": 4, "v": 2, "best": 7}
    store.set_summary(run.pk, {"best": 8}, NOW, attempt=1)
    run.append(1, 4, rows(range(9, 10), v=9), writer="rank0", nonce="shared-x")
    assert run.row.summary == {"_step": 9, "v": 9, "best": 8}


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
def test_the_summary_of_several_writers_is_that_of_all(store: SqlStore, order: tuple[int, ...]) -> None:
    """Proves that of a writer and the one that took over from it both summaries count, the later one's values first, in
    whatever order and however often they come."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(3), v=1), writer="a")
    run.append(1, 0, rows(range(3, 5), v=2), writer="b")
    said: list[dict[str, object]] = [{"_step": 2, "v": 1, "only_a": 1}, {"_step": 4, "v": 2, "only_b": 2}]
    for writer in order:
        store.set_summary(run.pk, said[writer], NOW, attempt=1)
    assert run.row.summary == {"_step": 4, "v": 2, "only_a": 1, "only_b": 2}
