"""Files belong to attempts: which versions are live after a rewind, a fork, a preemption, a fenced writer."""

from __future__ import annotations

import hashlib

from support.storing import NOW, StoredRun, cut, rows

from wbdist.core.position import FILES, Watermark
from wbdist.protocol.attempts import BeginAttempt, FileStamp
from wbdist.server.store import SqlStore
from wbdist.server.store.files import Filed, FileVersion
from wbdist.server.store.interface import RunRow


def file(name: str, content: str) -> FileVersion:
    digest = hashlib.sha256(content.encode()).hexdigest() if content else ""
    return FileVersion(name=name, sha256=digest, md5=content, size=len(content), mimetype="text/plain", updated_at=NOW)


def put(
    run: StoredRun, name: str, content: str, attempt: int | None = None, seq: int = 0, nonce: str = "", writer: str = "w"
) -> Filed:
    stamp = None if attempt is None else FileStamp(attempt, nonce or f"n{attempt}", writer, seq)
    return run.store.files.add(run.pk, file(name, content), stamp)


def live(run: StoredRun, name: str = "r") -> dict[str, str]:
    return {version.name: version.md5 for version in run.store.files.live(found(run.store, name))}


def found(store: SqlStore, name: str) -> RunRow:
    row = store.find_run("e", "p", name)
    assert row is not None
    return row


def test_a_preemption_cuts_files_with_the_history(store: SqlStore) -> None:
    """Files above the checkpoint's watermark go to the archive, those below are live, of each name the newest; the archived
    attempt reads by its immutable id as it was."""
    run = StoredRun(store)
    run.begin(1)
    for seq, (name, content) in enumerate([("a", "1"), ("b", "1"), ("a", "2"), ("c", "1")]):
        assert put(run, name, content, 1, seq) == Filed("", 1)
    run.begin(2, Watermark(1, {FILES: {"w": 2}}))
    assert live(run) == {"a": "1", "b": "1"}
    put(run, "b", "3", 2, 0)
    assert live(run) == {"a": "1", "b": "3"}
    assert live(run, "r:1") == {"a": "2", "b": "1", "c": "1"}
    assert live(run, "r:2") == {"a": "1", "b": "3"}
    run.begin(3)
    assert live(run) == {}
    assert run.store.files.get(found(store, "r:2"), "b") == file("b", "3")


def test_repeats_change_nothing_and_order_does_not_count(store: SqlStore) -> None:
    """A stamp that is known is a no-op, whatever comes with it; a version that arrives late is not newer for it."""
    run = StoredRun(store)
    run.begin(1)
    put(run, "a", "new", 1, 5)
    version = run.row.version
    for _ in range(3):
        put(run, "a", "other", 1, 5)
    assert run.row.version == version
    put(run, "a", "old", 1, 2)
    assert live(run) == {"a": "new"}
    assert store.position(run.row).watermark.counts[FILES] == {"w": 6}


def test_a_fenced_writers_files_go_to_the_archive(store: SqlStore) -> None:
    """A superseded attempt and a rival are told so; what they sent is seen in no live view; an unknown attempt stores none."""
    run = StoredRun(store)
    run.begin(1)
    put(run, "a", "1", 1, 0)
    run.begin(2, Watermark(1, {FILES: {"w": 1}}))
    assert put(run, "a", "zombie", 1, 1) == Filed("fenced", 2)
    assert put(run, "a", "rival", 2, 0, nonce="other") == Filed("fenced", 2)
    assert put(run, "a", "early", 7, 0) == Filed("unknown", 2)
    assert put(run, "a", "1", 1, 0) == Filed("", 2), "below the cut: the live version itself, repeated"
    assert live(run) == {"a": "1"}
    assert live(run, "r:1") == {"a": "zombie"}


def test_a_cut_by_step_takes_the_files_that_had_arrived(store: SqlStore) -> None:
    """Without stamps (W&B's own client): rewind and fork at step N keep the files that came by then."""
    run = StoredRun(store)
    for step in range(6):
        run.append(None, step, rows([step]))
        put(run, "state", f"at {step}")
    put(run, "state", "at 5")
    fork = StoredRun(store, "f")
    store.begin_attempt(fork.pk, BeginAttempt(1, "n1", "w", base_run="r", at_step=2), NOW)
    store.begin_attempt(run.pk, BeginAttempt(1, "n1", "w", at_step=3), NOW)
    assert (live(run), live(run, "f"), live(run, "r:0")) == ({"state": "at 3"}, {"state": "at 2"}, {"state": "at 5"})
    put(fork, "state", "own", 1, 0)
    assert (live(run), live(run, "f")) == ({"state": "at 3"}, {"state": "own"})


def test_a_watermark_keeps_what_others_uploaded_until_its_step(store: SqlStore) -> None:
    """A checkpoint counts its own uploads; a file that came through the API before its step is not lost by a preemption."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(5)))
    put(run, "api", "before")
    run.append(1, 5, rows(range(5, 10)))
    put(run, "api", "after")
    run.begin(2, cut(1, 5))
    assert live(run) == {"api": "before"}
    assert run.steps() == list(range(5))


def test_unchanged_content_is_no_new_version_and_deletion_is_one(store: SqlStore) -> None:
    """Without a stamp the same content again stores nothing; a deletion hides the file, and only from its attempt on."""
    run = StoredRun(store)
    run.append(None, 0, rows([0]))
    put(run, "a", "1")
    version = run.row.version
    put(run, "a", "1")
    assert run.row.version == version
    run.begin(1, store.position(run.row).watermark)
    put(run, "a", "")
    put(run, "a", "")
    assert live(run) == {}
    assert run.store.files.get(run.row, "a") is None
    assert live(run, "r:0") == {"a": "1"}
    put(run, "a", "2")
    assert live(run) == {"a": "2"}
