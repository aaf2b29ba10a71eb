"""Artifacts and attempts: aliases follow the live history, versions stay."""

from __future__ import annotations

from typing import Any

from support.storing import NOW, StoredRun, rows

from wbdist.core.position import ARTIFACTS, Watermark
from wbdist.protocol.attempts import BeginAttempt, FileStamp
from wbdist.server.store import SqlStore
from wbdist.server.store.artifact_lines import Wanted
from wbdist.server.store.artifacts import Artifact, Draft


def log(run: StoredRun, digest: str, *aliases: str, stamp: FileStamp | None = None) -> Artifact:
    draft = Draft(collection="ck", type="model", digest=digest, client_id="", wanted=Wanted(aliases, stamp))
    made = run.store.artifacts.create(run.row, draft, NOW)
    return run.store.artifacts.commit(made.pk, size=1, file_count=1, now=NOW)


def named(run: StoredRun) -> dict[str, str]:
    """alias -> digest"""
    table = run.store.artifacts
    found = table.find("e", "p", "ck")
    assert found is not None
    return {alias: art.digest for alias, pk in table.aliases(found.pk).items() if (art := table.get(pk)) is not None}


def logged(run: StoredRun, name: str = "r") -> list[str]:
    row = run.store.find_run("e", "p", name)
    assert row is not None
    return [artifact.digest for artifact in run.store.artifacts.of_run(row, "output")]


def at(attempt: int, seq: int, nonce: str = "") -> FileStamp:
    return FileStamp(attempt, nonce or f"n{attempt}", "w", seq)


def test_aliases_go_back_with_the_history(store: SqlStore) -> None:
    """A preemption takes back what its lost stretch named; the version itself stays, and logging the same again is it."""
    run = StoredRun(store)
    run.begin(1)
    log(run, "one", "best", stamp=at(1, 0))
    log(run, "two", "best", stamp=at(1, 1))
    assert named(run) == {"latest": "two", "best": "two"}
    run.begin(2, Watermark(1, {ARTIFACTS: {"w": 1}}))
    assert named(run) == {"latest": "one", "best": "one"}
    assert (logged(run), logged(run, "r:1")) == (["one"], ["one", "two"])
    again = log(run, "two", stamp=at(2, 0))
    assert named(run) == {"latest": "two", "best": "one"}
    members = store.artifacts.members(again.collection_pk)
    assert [member.version for member in members] == [1, 0]


def test_fenced_and_repeated_lines_name_nothing(store: SqlStore) -> None:
    """A zombie's and a rival's aliases never count; a stamp that is known says nothing more."""
    run = StoredRun(store)
    run.begin(1)
    log(run, "one", "best", stamp=at(1, 0))
    run.begin(2, Watermark(1, {ARTIFACTS: {"w": 1}}))
    log(run, "zombie", "best", stamp=at(1, 1))
    log(run, "rival", "best", stamp=at(2, 0, "other"))
    log(run, "unknown", "best", stamp=at(9, 0))
    assert named(run) == {"latest": "one", "best": "one"}
    version = run.row.version
    log(run, "one", "best", stamp=at(1, 0))
    assert run.row.version == version


def test_without_stamps_a_cut_by_step_takes_aliases_back(store: SqlStore) -> None:
    """W&B's own client: a rewind to step N keeps what was named by then; a person's word stays."""
    run = StoredRun(store)
    made: list[Any] = []
    for step in range(4):
        run.append(None, step, rows([step]))
        made.append(log(run, f"at {step}"))
    store.artifacts.set_aliases(made[3].pk, [(made[3].collection_pk, "prod")], NOW, add=True)
    store.begin_attempt(run.pk, BeginAttempt(1, "n1", "w", at_step=1), NOW)
    assert named(run) == {"latest": "at 1", "prod": "at 3"}
    assert logged(run) == ["at 0", "at 1"]
    store.artifacts.set_aliases(made[3].pk, [(made[3].collection_pk, "prod")], NOW, add=False)
    assert named(run) == {"latest": "at 1"}


def test_deleted_versions_give_their_number_to_nobody(store: SqlStore) -> None:
    run = StoredRun(store)
    first = log(run, "one")
    store.artifacts.delete(first.pk, NOW)
    second = log(run, "one")
    assert [member.version for member in store.artifacts.members(second.collection_pk)] == [1]
    assert store.artifacts.get(first.pk) is None
    assert store.artifacts.commit(second.pk, size=9, file_count=9, now=NOW).size == 1, "a committed version never changes"
