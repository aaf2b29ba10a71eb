"""Deleted runs: gone at once, their ids taken for good, their lines there as long as a fork shows them."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from support.storing import NOW, StoredRun, rows

from wbdist.core.position import CONSOLE
from wbdist.core.states import RunEvent
from wbdist.errors import UsageError
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import SqlStore
from wbdist.server.store.interface import DeletedRunError, Opening, RunFields, UnknownRunError
from wbdist.server.store.schema import chunks, columns, console_lines, cursors, runs

LINES = (chunks, columns, console_lines, cursors)


def stored(store: SqlStore) -> int:
    with store._db.read() as db:
        return sum(db.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in LINES)


def fork(store: SqlStore, run_id: str, source: str, step: int) -> StoredRun:
    made = StoredRun(store, run_id)
    store.begin_attempt(made.pk, BeginAttempt(1, "n1", "w", base_run=source, at_step=step), NOW)
    return made


@pytest.mark.usefixtures("tiny")
def test_a_deleted_run_is_gone(store: SqlStore) -> None:
    """For every reader and writer; nothing of it is left but its name, under which no run is made again."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(50), x=lambda s: s))
    run.append(1, 0, ["a"], stream=CONSOLE)
    store.delete_run(run.pk, NOW)
    assert (store.get_run("e", "p", "r"), store.find_run("e", "p", "r:1"), store.get_run_by_pk(run.pk)) == (None, None, None)
    assert (store.list_runs("e", "p"), store.list_projects(), store.silent_runs(NOW + 1)) == ([], [], [])
    assert (run.history(), stored(store)) == ([], 0)
    for opening in (None, Opening("start"), Opening("resume")):
        with pytest.raises(DeletedRunError, match="e/p/r was previously created and deleted"):
            store.upsert_run("e", "p", "r", RunFields(), NOW, opening=opening)
    for attempt in (1, 2):
        with pytest.raises(UsageError, match="no run with the key"):
            run.begin(attempt)
    with pytest.raises(UsageError, match="no run with the key"):
        run.append(1, 50, rows([50]))
    with pytest.raises(UnknownRunError):
        fork(store, "late", "r", 3)


@pytest.mark.usefixtures("tiny")
def test_a_fork_outlives_its_source(store: SqlStore) -> None:
    """Its history stays whole; the lines go with the last run that shows them, over several levels."""
    source = StoredRun(store, "a")
    source.begin(1)
    source.append(1, 0, rows(range(40)))
    second = fork(store, "b", "a", 20)
    second.append(1, 0, rows(range(21, 30)))
    third = fork(store, "c", "b", 25)
    third.append(1, 0, rows(range(26, 28)))
    store.delete_run(source.pk, NOW)
    store.delete_run(second.pk, NOW)
    assert third.steps() == list(range(28))
    assert [entry["run"] for entry in store.lineage(third.row)] == ["b", "a"]
    with pytest.raises(UnknownRunError):
        fork(store, "d", "a", 3)
    store.delete_run(third.pk, NOW)
    with store._db.read() as db:
        left = db.execute(sa.select(chunks.c.run_pk).distinct()).scalars().all()
        assert db.execute(sa.select(sa.func.count()).select_from(runs)).scalar_one() == 4
    assert left == []


def test_a_run_that_was_asked_to_stop(store: SqlStore) -> None:
    """The flag stands until the process ends, or the run is opened again; its first process hears it, however early it was."""
    run = StoredRun(store)
    store.ask_to_stop(run.pk)
    run.begin(1)
    run.append(1, 0, rows([0]))
    assert run.row.stopping
    store.record_event(run.pk, RunEvent.KILL, NOW, attempt=1, exit_code=255)
    assert (run.row.stopping, run.row.state) == (False, "killed")
    store.ask_to_stop(run.pk)
    run.begin(2)
    assert not run.row.stopping
