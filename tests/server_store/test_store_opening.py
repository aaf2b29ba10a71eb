"""What W&B's own client opens runs with, and what it sends twice."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from support.storing import NOW, StoredRun, rows

from wbdist.core.position import CONSOLE, EVENTS, HISTORY
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import SqlStore
from wbdist.server.store.interface import BranchError, Opening, RunFields, RunRow, UnknownRunError


def opened(store: SqlStore, run_id: str, kind: str, source: str = "", step: int | None = None, **config: Any) -> RunRow:
    values = {"_wandb": {"value": {"t": {}}}} | {key: {"value": value} for key, value in config.items()}
    return store.upsert_run("e", "p", run_id, RunFields(config=values), NOW, opening=Opening(kind, source, step))[0]


def user(row: RunRow) -> dict[str, Any]:
    return {key: entry["value"] for key, entry in row.config.items() if key != "_wandb"}


def printed(second: float, text: str) -> str:
    return f"{datetime.fromtimestamp(second, UTC).strftime('%Y-%m-%dT%H:%M:%S.%f')} {text}"


def test_an_opening_is_begun_once(store: SqlStore) -> None:
    """Its answer may be lost: the same opening again changes nothing, until there are lines."""
    opened(store, "src", "start")
    StoredRun(store, "src").append(None, 0, rows(range(10)))
    for run_id, kind, source, step in (("src", "resume", "", None), ("src", "rewind", "", 5), ("f", "fork", "src", 3)):
        for _ in range(2):
            if kind == "rewind":
                store.open_run(StoredRun(store, run_id).pk, Opening(kind, source, step), NOW)
            else:
                opened(store, run_id, kind, source, step)
        attempts = store.attempts(StoredRun(store, run_id).pk)
        if kind != "resume":
            assert [attempt.cause for attempt in attempts][-1] == kind
    assert [a.cause for a in store.attempts(StoredRun(store, "src").pk)] == ["", "resume", "rewind"]
    assert [a.cause for a in store.attempts(StoredRun(store, "f").pk)] == ["fork"]
    assert (StoredRun(store, "src").steps(), StoredRun(store, "f").steps()) == (list(range(6)), list(range(4)))
    opened(store, "src", "start")
    opened(store, "src", "start")
    assert [a.cause for a in store.attempts(StoredRun(store, "src").pk)] == ["", "resume", "rewind", "start"]
    assert StoredRun(store, "src").steps() == []


def test_a_fork_that_cannot_be_makes_no_run(store: SqlStore) -> None:
    """Unknown source, or a step it does not have: the run that was to be made is not there."""
    opened(store, "src", "start")
    with pytest.raises(BranchError, match="it has none"):
        opened(store, "f", "fork", "src", 3)
    with pytest.raises(UnknownRunError):
        opened(store, "f", "fork", "nobody", 3)
    assert store.get_run("e", "p", "f") is None


def test_a_fork_inherits_config_and_summary(store: SqlStore) -> None:
    """They stay below what the client gives later, who knows nothing of them; a maximum is over all that shows."""
    opened(store, "src", "start", a=1, b=1)
    source = StoredRun(store, "src")
    source.append(None, 0, rows(range(10), peak=lambda s: s, old=1))
    for _ in range(2):  # the answer to the first may be lost
        fork = opened(store, "f", "fork", "src", 4, b=2)
        assert (user(fork), fork.summary["peak"]) == ({"a": 1, "b": 2}, 4)
    metrics = {"_wandb": {"value": {"e": {"w": {}}, "m": [{"1": "peak", "7": [2]}]}}}
    later = store.upsert_run("e", "p", "f", RunFields(config=metrics | {"b": {"value": 3}, "c": {"value": 4}}), NOW)[0]
    assert user(later) == {"a": 1, "b": 3, "c": 4}
    StoredRun(store, "f").append(None, 5, rows(range(5, 7), peak=0, new=1))
    store.set_summary(fork.pk, {"peak": {"max": 0}, "new": 1, "_step": 6}, NOW)
    assert store.get_run_by_pk(fork.pk).summary == {"peak": {"max": 4}, "old": 1, "new": 1, "_step": 6}  # type: ignore[union-attr]


def test_a_resume_that_is_sent_twice_adds_nothing(store: SqlStore) -> None:
    """A resumed segment is synced again behind its own lines: rows are known by step, console and metrics by their time."""
    opened(store, "r", "start")
    run = StoredRun(store, "r")
    for first, second in ((0, 100), (5, 200), (5, 200)):
        row = opened(store, "r", "resume")
        counts = row.line_counts
        lines = [json.dumps(line) for line in rows(range(first, first + 5))]
        store.append(run.pk, {HISTORY: (counts.get(HISTORY, 0), lines)}, NOW)
        events = [json.dumps({"cpu": n, "_timestamp": second + n}) for n in range(3)]
        store.append(run.pk, {EVENTS: (counts.get(EVENTS, 0), events)}, NOW)
        shown = [printed(second + n, f"line {first + n}") for n in range(4)]
        store.append(run.pk, {CONSOLE: (counts.get(CONSOLE, 0), shown)}, NOW)
    assert run.steps() == list(range(10))
    assert [row["_timestamp"] for row in run.history(stream=EVENTS)] == [100, 101, 102, 200, 201, 202]
    assert [line.partition(" ")[2] for line in store.console(run.pk)] == [f"line {n}" for n in (0, 1, 2, 3, 5, 6, 7, 8)]


def test_a_living_process_may_repeat_its_words(store: SqlStore) -> None:
    """Lines from after the opening are never taken for old ones, also when their clock runs behind the last one's."""
    opened(store, "r", "start")
    run = StoredRun(store, "r")
    run.append(None, 0, [printed(NOW + 50, "a")], stream=CONSOLE)
    opened(store, "r", "resume")
    run.append(None, 1, [printed(NOW + 10, "b")], stream=CONSOLE)
    assert [line[-1] for line in store.console(run.pk)] == ["a", "b"]


def test_what_a_client_edits_is_not_an_opening(store: SqlStore) -> None:
    """Without one: fields change, no attempt is begun; `keep_config` leaves what is not given."""
    opened(store, "r", "start", a=1)
    run = store.upsert_run("e", "p", "r", RunFields(config={"b": {"value": 2}}), NOW, keep_config=True)[0]
    assert (user(run), run.attempt) == ({"a": 1, "b": 2}, 0)
    run = store.upsert_run("e", "p", "r", RunFields(config={"c": {"value": 3}}), NOW)[0]
    assert (user(run), run.attempt) == ({"c": 3}, 0)


def test_an_incarnation_keeps_what_its_client_said(store: SqlStore) -> None:
    """Config, summary and state as they were when the next one took over."""
    opened(store, "r", "start", a=1)
    run = StoredRun(store, "r")
    run.append(None, 0, rows(range(3)))
    store.set_summary(run.pk, {"by hand": 1}, NOW)
    opened(store, "r", "start", a=2)
    run.append(None, 0, rows(range(1)))
    old = store.find_run("e", "p", "r:0")
    assert old is not None
    assert (user(old), old.summary, old.state, old.last_step) == ({"a": 1}, {"by hand": 1}, "running", 2)
    now = store.get_run("e", "p", "r")
    assert now is not None
    assert (user(now), now.last_step) == ({"a": 2}, 0)


def test_shared_writers_count_their_own_lines(store: SqlStore) -> None:
    """Each from 0, under its own steps, in the run's attempt whatever that is; summaries merge."""
    opened(store, "r", "start")
    run = StoredRun(store, "r")
    for turn in range(2):
        for writer in ("sdk-a", "sdk-b"):
            lines = [json.dumps(row) for row in rows(range(turn * 3, turn * 3 + 3), by=writer)]
            for _ in range(2):
                assert store.append(run.pk, {HISTORY: (turn * 3, lines)}, NOW, writer=writer).code == ""
            store.set_summary(run.pk, {writer: turn}, NOW, merge=True)
    assert run.steps() == sorted([*range(6), *range(6)])
    assert {"sdk-a": 1, "sdk-b": 1}.items() <= run.row.summary.items()
    store.begin_attempt(run.pk, BeginAttempt(1, "n", "w", at_step=2), NOW)
    store.append(run.pk, {HISTORY: (0, ['{"_step":3}'])}, NOW, writer="sdk-a")
    assert run.steps() == [0, 0, 1, 1, 2, 2, 3]


def timed(began: float, steps: range, at: float, who: str) -> list[str]:
    return [json.dumps({"_step": s, "_timestamp": at + s, "_runtime": at + s - began, "who": who}) for s in steps]


def test_a_process_that_resumes_at_once_is_not_taken_for_the_old_one(store: SqlStore) -> None:
    """W&B's client counts the run's time on, so its clock looks like that of the process that was killed a moment ago."""
    opened(store, "r", "start")
    run = StoredRun(store, "r")
    store.append(run.pk, {HISTORY: (0, timed(NOW - 50, range(5), NOW - 40, "old"))}, NOW - 30)
    opened(store, "r", "resume")
    done = store.append(run.pk, {HISTORY: (5, timed(NOW - 50, range(5, 9), NOW + 10, "new"))}, NOW + 20)
    assert (done.code, [row["who"] for row in run.history()]) == ("", ["old"] * 5 + ["new"] * 4)


def test_rows_synced_after_a_crash_are_shown(store: SqlStore) -> None:
    """The directory of a run that died with rows unsent is synced: they are of the old process, and belong to the run."""
    opened(store, "r", "start")
    run = StoredRun(store, "r")
    store.append(run.pk, {HISTORY: (0, timed(NOW - 500, range(5), NOW - 100, "old"))}, NOW - 90)
    opened(store, "r", "resume")
    done = store.append(run.pk, {HISTORY: (5, timed(NOW - 500, range(9), NOW - 100, "old"))}, NOW + 5)
    assert (done.code, run.steps()) == ("", list(range(9)))
