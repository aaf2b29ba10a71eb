"""Forks, rewinds, streams that start empty, positions, lineage, immutable ids: one primitive in the store."""

from __future__ import annotations

import random

import pytest
import sqlalchemy as sa
from support.storing import NOW, StoredRun, cut, rows

from wbdist.core.position import CONSOLE, EVENTS, HISTORY, Watermark
from wbdist.core.states import RunEvent
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt
from wbdist.server.store import SqlStore
from wbdist.server.store.interface import BranchError, RunRow, UnknownRunError
from wbdist.server.store.schema import attempts, chunks

FRESH = (CONSOLE, EVENTS)


def begin(run: StoredRun, attempt: int, nonce: str = "", **how: object) -> BegunAttempt:
    request = BeginAttempt(attempt, nonce or f"n{attempt}", "w", **how)  # type: ignore[arg-type]
    return run.store.begin_attempt(run.pk, request, NOW)


def found(store: SqlStore, name: str) -> RunRow:
    row = store.find_run("e", "p", name)
    assert row is not None
    return row


def chunk_rows(store: SqlStore) -> int:
    with store._db.read() as db:
        return int(db.execute(sa.select(sa.func.count()).select_from(chunks)).scalar_one())


@pytest.mark.usefixtures("tiny")
def test_a_rewind_by_step_keeps_rows_up_to_it(store: SqlStore) -> None:
    """Rows to the step, inclusive, then the new ones; the summary is recomputed; console and system metrics start empty; the
    old incarnation stays readable, whole, by its immutable id."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(30), x=lambda s: s, best=lambda s: s))
    run.append(1, 0, ["old"], stream=CONSOLE)
    run.append(1, 0, [{"cpu": 1}], stream=EVENTS)
    begun = begin(run, 2, at_step=20, fresh=FRESH)
    assert (begun.accepted, begun.lines) == (True, {HISTORY: 21})
    assert run.row.summary == {"_step": 20, "x": 20, "best": 20}
    run.append(2, 0, rows(range(21, 25), x=lambda s: -s))
    run.append(2, 0, ["new"], stream=CONSOLE)
    assert run.steps() == list(range(25))
    assert (store.console(run.pk), run.history(stream=EVENTS)) == (["new"], [])
    assert run.row.line_counts == {HISTORY: 25, CONSOLE: 1, EVENTS: 0}
    old = found(store, "r:1")
    assert (old.last_step, old.summary["best"], old.line_counts, old.view) == (29, 29, {HISTORY: 30, CONSOLE: 1, EVENTS: 1}, 1)
    assert (run.steps(attempt=1), store.console(run.pk, attempt=1)) == (list(range(30)), ["old"])
    assert store.history_tail(run.pk, HISTORY, attempt=1) == {"_step": 29, "x": 29, "best": 29}
    assert len(store.series(run.pk, "x", attempt=1)) == 30
    assert store.lineage(run.row) == [{"run": "r", "attempt": 1, "step": 20, "kind": "rewind"}]


def test_a_step_is_resolved_once(store: SqlStore) -> None:
    """A repeat of the begin gives the first answer, whatever has been written since to the attempt below or to this one."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows([0, 10, 20]))
    first = begin(run, 2, at_step=15)
    run.append(1, 3, rows([21, 22]))
    run.append(2, 0, rows([11]))
    again = begin(run, 2, at_step=15)
    assert (first.lines, again.lines, again.next) == ({HISTORY: 2}, {HISTORY: 2}, {HISTORY: {"w": 1}})
    assert run.steps() == [0, 10, 11]


def test_a_rewind_below_an_older_base(store: SqlStore) -> None:
    """The cut lies in the attempt that has the step; what was rewound before does not come back."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(10), of=1))
    begin(run, 2, at_step=5)
    run.append(2, 0, rows(range(6, 12), of=2))
    begin(run, 3, at_step=8)
    run.append(3, 0, rows(range(9, 11), of=3))
    assert [row["of"] for row in run.history()] == [1] * 6 + [2] * 3 + [3] * 2
    begin(run, 4, at_step=3)
    assert run.steps() == [0, 1, 2, 3]
    begin(run, 5, base_run="r:2", at_step=10)
    assert [row["of"] for row in run.history()] == [1] * 6 + [2] * 5
    kinds = [(entry["attempt"], entry["step"], entry["kind"]) for entry in store.lineage(run.row)]
    assert kinds == [(2, 10, "rewind"), (1, 5, "rewind")]
    assert [run.steps(attempt=a)[-1] for a in (1, 2, 3, 4)] == [9, 11, 10, 3]


def test_a_cut_before_the_first_row_leaves_nothing(store: SqlStore) -> None:
    """A run whose steps begin at 5, rewound to 2."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(5, 9)))
    begin(run, 2, at_step=2)
    assert (run.steps(), run.row.last_step, run.row.summary) == ([], -1, {})


@pytest.mark.usefixtures("tiny")
def test_several_writers_are_cut_by_step(store: SqlStore) -> None:
    """Each writer keeps its rows up to the step, wherever in its chunks that is."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(0, 60, 2), a=1), writer="a")
    run.append(1, 0, rows(range(1, 60, 3), b=1), writer="b")
    begin(run, 2, at_step=25)
    assert run.steps() == sorted([*range(0, 26, 2), *range(1, 26, 3)])


@pytest.mark.usefixtures("tiny")
def test_a_fork_shows_its_source_by_reference(store: SqlStore) -> None:
    """No row is copied; both go on alone; the source, which is running, does not change by it."""
    source, fork = StoredRun(store, "source"), StoredRun(store, "fork")
    source.begin(1)
    source.append(1, 0, rows(range(50), x=lambda s: s))
    source.append(1, 0, ["text"], stream=CONSOLE)
    before, stored = source.row, chunk_rows(store)
    begun = begin(fork, 1, base_run="source", at_step=19, fresh=FRESH)
    assert (begun.lines, begun.accepted, chunk_rows(store)) == ({HISTORY: 20}, True, stored)
    assert source.row == before
    source.append(1, 50, rows(range(50, 55), x=lambda s: s))
    fork.append(1, 0, rows(range(20, 24), x=lambda s: -s, y=1))
    assert (fork.steps(), source.steps()) == (list(range(24)), list(range(55)))
    assert (fork.row.summary, fork.row.metrics) == ({"_step": 23, "x": -23, "y": 1}, ["x", "y"])
    assert (store.console(fork.pk), store.console(source.pk)) == ([], ["text"])
    assert [bucket.last for bucket in store.series(fork.pk, "x")] == [*map(float, range(20)), -20.0, -21.0, -22.0, -23.0]
    assert store.lineage(fork.row) == [{"run": "source", "attempt": 1, "step": 19, "kind": "fork"}]
    assert store.lineage(source.row) == []


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_many_forks_take_the_space_of_their_own_rows(store: SqlStore) -> None:
    """Fifty forks of a long run, at steps of their own, take hardly more than fifty short runs with the same new rows."""

    def pages() -> int:
        with store._db.read() as db:
            return int(db.exec_driver_sql("PRAGMA page_count").scalar_one())

    noise = random.Random(0)
    before = pages()
    source = StoredRun(store, "source")
    source.begin(1)
    for first in range(0, 20_000, 10_000):
        source.append(1, first, rows(range(first, first + 10_000), x=lambda _: noise.random()))
    long = pages() - before
    grown = []
    for name, base_run in (("short", ""), ("fork", "source")):
        before = pages()
        for n in range(50):
            run = StoredRun(store, f"{name}{n}")
            at = 19_999 - 37 * n
            begin(run, 1, **({"base_run": base_run, "at_step": at} if base_run else {}))
            run.append(1, 0, rows(range(at + 1, at + 21), x=lambda _: noise.random()))
        grown.append(pages() - before)
    short, forks = grown
    assert forks < 1.5 * short + 10
    assert forks < long  # as copies they would be fifty times that
    assert StoredRun(store, "fork49").steps(min_step=19_999 - 37 * 49) == list(range(19_999 - 37 * 49, 19_999 - 37 * 49 + 21))


def test_a_fork_of_a_fork_and_of_an_archived_incarnation(store: SqlStore) -> None:
    """Three levels; a cut below the branch point lies in the grandparent, the lineage names what was asked for."""
    first, second, third, fourth, fifth = (StoredRun(store, name) for name in ("a", "b", "c", "d", "f"))
    first.append(None, 0, rows(range(10), of="a"))
    begin(second, 1, base_run="a", at_step=6)
    second.append(1, 0, rows(range(7, 12), of="b"))
    begin(third, 1, base_run="b", at_step=9)
    third.append(1, 0, rows(range(10, 12), of="c"))
    assert [row["of"] for row in third.history()] == ["a"] * 7 + ["b"] * 3 + ["c"] * 2
    begin(fourth, 1, base_run="b", at_step=3)
    fourth.append(1, 0, rows(range(4, 6), of="d"))
    assert [row["of"] for row in fourth.history()] == ["a"] * 4 + ["d"] * 2
    assert store.lineage(fourth.row) == [
        {"run": "b", "attempt": 1, "step": 3, "kind": "fork"},
        {"run": "a", "attempt": 0, "step": 6, "kind": "fork"},
    ]
    begin(first, 1, at_step=2)
    begin(fifth, 1, base_run="a:0", at_step=8)
    assert (first.steps(), fifth.steps()) == ([0, 1, 2], list(range(9)))
    assert third.steps() == list(range(12))


def test_a_fork_without_a_step_takes_what_is_there(store: SqlStore) -> None:
    """All that the source shows at that moment, of every stream; nothing that comes later."""
    source, fork = StoredRun(store, "source"), StoredRun(store, "fork")
    source.begin(1)
    source.append(1, 0, rows(range(3)))
    source.append(1, 0, ["a", "b"], stream=CONSOLE)
    begin(fork, 1, base_run="source")
    source.append(1, 3, rows(range(3, 5)))
    source.append(1, 2, ["c"], stream=CONSOLE)
    assert (fork.steps(), store.console(fork.pk)) == ([0, 1, 2], ["a", "b"])
    assert store.lineage(fork.row) == [{"run": "source", "attempt": 1, "step": 2, "kind": "fork"}]


def test_a_fork_on_a_watermark_that_has_not_arrived(store: SqlStore) -> None:
    """An offline fork comes before its source's rows: they show as they come, up to the watermark."""
    source, fork = StoredRun(store, "source"), StoredRun(store, "fork")
    base = Watermark(2, {HISTORY: {"w": 2}}, 4)
    begin(fork, 1, base_run="source", base=base)
    fork.append(1, 0, rows([5], x=5))
    source.begin(1)
    source.append(1, 0, rows(range(3), x=1))
    source.begin(2, cut(1, 3))
    source.append(2, 0, rows(range(3, 9), x=2))
    assert (fork.steps(), source.steps()) == ([0, 1, 2, 3, 4, 5], list(range(9)))
    assert begin(fork, 1, base_run="source", base=base).lines == {HISTORY: 5}


def test_senseless_branches_change_nothing(store: SqlStore) -> None:
    """Beyond the end, negative, of an empty or unknown run, of an unknown incarnation, based on itself by a detour."""
    run, empty = StoredRun(store), StoredRun(store, "empty")
    run.begin(1)
    run.append(1, 0, rows(range(5)))
    before = run.row, store.attempts(run.pk), empty.row
    for how, error, message in (
        ({"at_step": 5}, BranchError, "run r has no step 5: its steps end at 4"),
        ({"at_step": -1}, BranchError, "no step -1"),
        ({"at_step": 0, "base_run": "empty"}, BranchError, "run empty has no step 0: it has none"),
        ({"at_step": 0, "base_run": "nobody"}, UnknownRunError, "run e/p/nobody does not exist"),
        ({"at_step": 0, "base_run": "r:7"}, UnknownRunError, "r:7 does not exist"),
        ({"at_step": 0, "base_run": "r:x"}, UnknownRunError, "r:x does not exist"),
    ):
        with pytest.raises(error, match=message):
            begin(run, 2, **how)
    assert (run.row, store.attempts(run.pk), empty.row) == before
    begin(empty, 1, base_run="r", base=Watermark(3, {}))
    with pytest.raises(BranchError, match="based on itself"):
        begin(run, 3, base_run="empty", base=Watermark(1, {}))
    assert run.row == before[0]


def test_the_position_of_a_run(store: SqlStore) -> None:
    """Whole: everything of the newest attempt. At a step: the attempt that has it. A begin on either gives the same view."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(6), _runtime=lambda s: s / 2))
    run.append(1, 0, ["a"], stream=CONSOLE)
    run.begin(2, cut(1, 4))
    run.append(2, 0, rows(range(4, 8), _runtime=lambda s: s / 2, x=1))
    at_end = store.position(run.row)
    assert (at_end.run_id, at_end.entity, at_end.project) == ("r", "e", "p")
    assert at_end.watermark == Watermark(2, {HISTORY: {"w": 4}}, 7)
    assert (at_end.summary, at_end.runtime) == ({"_step": 7, "_runtime": 3.5, "x": 1}, 3.5)
    inside = store.position(run.row, step=5)
    assert (inside.watermark, inside.runtime) == (Watermark(2, {HISTORY: {"w": 2}}, 5), 2.5)
    below = store.position(run.row, step=2)
    assert (below.watermark, below.summary) == (Watermark(1, {HISTORY: {"w": 3}}, 2), {"_step": 2, "_runtime": 1.0})
    assert store.position(found(store, "r:1")).watermark == Watermark(1, {HISTORY: {"w": 6}, CONSOLE: {"w": 1}}, 5)
    with pytest.raises(BranchError, match="no step 8"):
        store.position(run.row, step=8)
    begin(run, 3, base=inside.watermark)
    assert run.steps() == [0, 1, 2, 3, 4, 5]
    assert store.lineage(run.row)[0] == {"run": "r", "attempt": 2, "step": 5, "kind": "resume"}
    fork = StoredRun(store, "fork")
    begin(fork, 1, base_run="r", at_step=4)
    assert store.position(fork.row, step=1).run_id == "r"


def test_an_immutable_id_is_constant(store: SqlStore) -> None:
    """Over later rewinds; an id of no attempt is no run; an incarnation cannot be written to by its name."""
    run = StoredRun(store)
    run.append(None, 0, rows(range(8), x=1))
    begin(run, 1, at_step=5)
    run.append(1, 0, rows(range(6, 10), x=2))
    seen = {name: (found(store, name).summary, run.steps(attempt=int(name[-1]))) for name in ("r:0", "r:1")}
    begin(run, 2, at_step=1)
    store.record_event(run.pk, RunEvent.EXIT_ZERO, NOW, exit_code=0)
    assert {name: (found(store, name).summary, run.steps(attempt=int(name[-1]))) for name in ("r:0", "r:1")} == seen
    assert seen["r:1"] == ({"_step": 9, "x": 2}, list(range(10)))
    assert found(store, "r:1").run_id == "r:1"
    for name in ("r:3", "r:", ":1", "r:1:1", "r:-1"):
        assert store.find_run("e", "p", name) is None
    assert store.get_run("e", "p", "r:1") is None


def test_an_aborted_begin_leaves_the_old_state(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that dies inside the transaction, after the attempt was opened: the run is as before, and can be rewound."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(5)))
    before = run.row

    def die(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wbdist.server.store.attempts.recount", die)
        with pytest.raises(KeyboardInterrupt):
            begin(run, 2, at_step=2)
    with store._db.read() as db:
        assert db.execute(sa.select(attempts.c.attempt)).scalars().all() == [1]
    assert run.row == before
    begin(run, 2, at_step=2)
    assert run.steps() == [0, 1, 2]


def test_a_fork_follows_what_its_source_still_receives(store: SqlStore) -> None:
    """Begun before its source was: its counts, last step, metrics and summary are brought up to date as that comes."""
    source, fork, second = StoredRun(store, "source"), StoredRun(store, "fork"), StoredRun(store, "second")
    begin(fork, 1, base_run="source", base=Watermark(2, {HISTORY: {"w": 2}}, 4))
    begin(second, 1, base_run="fork", base=Watermark(1, {HISTORY: {"w": 9}}, 9))
    source.begin(1)
    source.append(1, 0, rows(range(3), x=1))
    source.begin(2, cut(1, 3))
    for run in (fork, second):
        assert (run.steps(), run.row.line_counts, run.row.metrics) == ([0, 1, 2], {HISTORY: 3}, ["x"])
    source.append(2, 0, rows(range(3, 9), y=2))
    for run in (fork, second):
        assert (run.steps(), run.row.line_counts, run.row.last_step) == (list(range(5)), {HISTORY: 5}, 4)
        assert (run.row.metrics, run.row.summary) == (["x", "y"], {"_step": 4, "x": 1, "y": 2})
    version = fork.row.version
    source.append(2, 6, rows(range(9, 12)))
    assert fork.row.version == version


def test_streams_that_start_empty(store: SqlStore) -> None:
    """Of what is cut nowhere, and over several levels: a stream once left behind does not come back with a later attempt."""
    run, fork = StoredRun(store), StoredRun(store, "fork")
    run.begin(1)
    run.append(1, 0, rows(range(3)))
    run.append(1, 0, ["a"], stream=CONSOLE)
    run.append(1, 0, [{"cpu": 1}], stream=EVENTS)
    at_end = store.position(run.row).watermark
    begun = begin(run, 2, base=at_end, fresh=(CONSOLE,))
    assert (begun.lines, store.console(run.pk)) == ({HISTORY: 3, EVENTS: 1}, [])
    run.append(2, 0, ["b"], stream=CONSOLE)
    begin(run, 3, base=store.position(run.row).watermark)
    assert (store.console(run.pk), run.history(stream=EVENTS)) == (["b"], [{"cpu": 1}])
    begin(fork, 1, base_run="r", fresh=FRESH)
    assert (fork.steps(), store.console(fork.pk), fork.history(stream=EVENTS)) == ([0, 1, 2], [], [])
    assert run.row.line_counts == {HISTORY: 3, CONSOLE: 1, EVENTS: 1}
