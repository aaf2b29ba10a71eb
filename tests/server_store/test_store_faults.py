"""Many threads, SIGKILL, a full disk, an old or a foreign database."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
import zstandard
from alembic import command
from alembic.config import Config
from support.storing import NOW, StoredRun, cut, rows

from wbdist.core.position import CONSOLE, HISTORY
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server.store import SqlStore, StoreError, open_store
from wbdist.server.store import __file__ as store_file
from wbdist.server.store.engine import Connections, sqlite_module
from wbdist.server.store.interface import RunFields

THREADS = 8


def in_threads(work: Callable[[int], object]) -> list[object]:
    """Runs `work(0..THREADS-1)` at the same time; the first error is raised."""
    start = threading.Barrier(THREADS)

    def one(number: int) -> object:
        start.wait(60)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result(timeout=60) for future in [pool.submit(one, number) for number in range(THREADS)]]


def test_threads_on_one_run_and_on_many(store: SqlStore, tiny: None) -> None:
    """Eight writers append to a run they share and to one of their own, while readers see whole prefixes only."""
    shared = StoredRun(store, "shared")
    shared.begin(1)
    each, portion = 15, 3

    def work(number: int) -> None:
        own = StoredRun(store, f"own{number}")
        for at in range(0, each, portion):
            lines = [{"_step": s * THREADS + number, "w": number} for s in range(at, at + portion)]
            assert shared.append(1, at, lines, writer=f"w{number}").code == ""
            assert own.append(None, at, lines).code == ""
            seen = [row["_step"] for row in own.history()]
            assert seen == [s * THREADS + number for s in range(at + portion)]
            mine = [row for row in shared.history() if row["w"] == number]
            assert len(mine) == at + portion
            assert sum(bucket.count for bucket in own.store.series(own.pk, "w")) == at + portion

    in_threads(work)
    assert shared.steps() == list(range(THREADS * each))
    assert (shared.row.line_counts, shared.row.last_step) == ({HISTORY: THREADS * each}, THREADS * each - 1)


def test_threads_that_repeat_each_other(store: SqlStore) -> None:
    """Eight senders deliver the same 60 lines in portions of their own: every line is stored once."""
    run = StoredRun(store)
    run.begin(1)
    lines = rows(range(60), v=lambda s: s / 3)

    def work(number: int) -> None:
        randomness = random.Random(number)
        at = 0
        while at < len(lines):
            size = randomness.randint(1, 12)
            done = run.append(1, at, lines[at : at + size])
            at = done.next[HISTORY] if done.code else at + size

    in_threads(work)
    assert run.history() == lines
    assert run.row.line_counts == {HISTORY: 60}


def test_one_of_many_rivals_wins(store: SqlStore) -> None:
    """Eight jobs create the same run and begin the same attempt at once: one run, one holder, whose lines are live."""

    def work(number: int) -> tuple[int, bool]:
        run = StoredRun(store)
        accepted = run.begin(1, nonce=f"job{number}").accepted
        code = run.append(1, 0, rows(range(5), who=number), nonce=f"job{number}").code
        assert code == ("" if accepted else "fenced")
        return run.pk, accepted

    done = in_threads(work)
    assert len({pk for pk, _ in done}) == 1  # type: ignore[misc]
    holders = [number for number, (_, accepted) in enumerate(done) if accepted]  # type: ignore[misc]
    run = StoredRun(store)
    assert len(holders) == 1
    assert [row["who"] for row in run.history()] == holders * 5
    for number in set(range(THREADS)) - set(holders):
        assert [row["who"] for row in run.history(attempt=1, nonce=f"job{number}")] == [number] * 5


def test_a_new_attempt_amid_appends(store: SqlStore, tiny: None) -> None:
    """Attempts are begun while writers of older ones still append: the live counts are those of the rows, nothing is lost."""
    run = StoredRun(store)
    run.begin(1)

    def work(number: int) -> int:
        if number == 0:
            for attempt in range(2, 8):
                assert run.begin(attempt, cut(attempt - 1, 2)).accepted
                assert run.append(attempt, 0, rows(range(2, 5))).next == {HISTORY: 3}
            return 0
        for at in range(0, 12, 2):
            run.append(1, at, [{"_step": at}, {"_step": at + 1}], writer=f"z{number}")
        return 12

    stored = sum(in_threads(work))  # type: ignore[call-overload]
    row = run.row
    assert row.line_counts == {HISTORY: len(run.history())}
    assert (row.attempt, row.last_step) == (7, 4)
    assert len(run.history(attempt=1)) == stored


APPENDER = """
import sys
from support.storing import StoredRun
from wbdist.core.position import CONSOLE, HISTORY
from wbdist.server.store import chunks, open_store
chunks.FAN, chunks.SEAL_ROWS, chunks.COLUMNAR_CELLS = 3, 64, 24
store = open_store(sys.argv[1])
run = StoredRun(store)
run.begin(1)
at = run.begin(1).next.get(HISTORY, {}).get("w", 0)
while True:
    lines = ['{"_step":%d,"v":%d.5}' % (s, s) for s in range(at, at + 1 + at % 4)]
    done = store.append(run.pk, {HISTORY: (at, lines), CONSOLE: (at, lines)}, 1.0, attempt=1, nonce="n1", writer="w")
    at = done.next[HISTORY]
    print(at, flush=True)
"""


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    """A process that appends is killed with SIGKILL at any moment, again and again: each acknowledged line is there once, of
    requests without an answer all lines or none, and the database is whole."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    randomness = random.Random(4)
    known = 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", APPENDER, url], stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        acknowledged = known
        for line, _ in zip(child.stdout, range(randomness.randint(20, 90)), strict=False):
            acknowledged = int(line)
        child.kill()
        acknowledged = max([acknowledged, *map(int, child.stdout.read().split())])
        child.wait(10)
        store = open_store(url)
        run = StoredRun(store)
        history = run.history()
        stored = len(history)
        assert acknowledged > known
        assert acknowledged <= stored <= acknowledged + 4
        assert history == [{"_step": s, "v": s + 0.5} for s in range(stored)]
        assert [json.loads(line)["_step"] for line in store.console(run.pk, limit=10**6)] == list(range(stored))
        assert run.row.line_counts == {HISTORY: stored, CONSOLE: stored}
        store.close()
        with sqlite_module.connect(tmp_path / "store.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        known = stored


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """An append that finds no space raises StoreError and stores nothing; what was there stays, and with space it goes on."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 600_000)
    store = open_store(f"sqlite:///{small_disk / 'store.db'}")
    run = StoredRun(store)
    randomness = random.Random(1)
    stored = 0
    with pytest.raises(StoreError, match=r"nothing of it was stored: .*(full|I/O)"):
        while stored < 100_000:
            run.append(None, stored, rows(range(stored, stored + 500), v=lambda _: randomness.random()))
            stored += 500
    assert stored > 0
    assert run.steps() == list(range(stored))
    assert run.row.line_counts == {HISTORY: stored}
    ballast.unlink()
    assert run.append(None, stored, rows(range(stored, stored + 500), v=1)).code == ""
    assert run.steps() == list(range(stored + 500))
    store.close()


def test_a_database_at_its_size_limit(tmp_path: Path) -> None:
    """The same where the database itself may not grow."""
    store = open_store(f"sqlite:///{tmp_path / 'store.db'}")
    run = StoredRun(store)
    run.append(None, 0, rows(range(3)))
    with store._db.write() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar_one()
        db.exec_driver_sql(f"PRAGMA max_page_count={pages + 2}")
    before = run.row
    with pytest.raises(StoreError, match="full"):
        run.append(None, 0, ["x" * 100_000], stream=CONSOLE)
    assert run.row == before
    assert run.steps() == [0, 1, 2]
    store.close()


def test_reopening_keeps_everything(url: str) -> None:
    """Closing and opening again, twice: the same run, rows and position; closing twice is fine."""
    for number in range(3):
        store = open_store(url, durable=number == 1)
        run = StoredRun(store)
        assert run.append(None, number, rows(range(number, number + 1))).next == {HISTORY: number + 1}
        assert run.steps() == list(range(number + 1))
        store.close()
        store.close()


def test_a_newer_database_is_refused(url: str) -> None:
    """A database that a newer version migrated is left alone, with a message that names it."""
    open_store(url).close()
    connections = Connections(url)
    with connections.write() as db:
        db.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"cannot be used.*9999"):
        open_store(url)
    connections.close()


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("nonsense", "no database URL"),
        ("sqlite://", "names no file"),
        ("mysql://u@h/db", "mysql"),
        ("sqlite:////proc/nowhere/x.db", "no directory"),
        ("postgresql://u:secret@127.0.0.1:1/db", "cannot be used"),
    ],
)
def test_urls_that_cannot_be_opened(url: str, word: str) -> None:
    """Each is refused with what is wrong, and without the password."""
    with pytest.raises(StoreError, match=word) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """It is refused and not touched."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database\n" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_store(f"sqlite:///{path}")
    assert path.read_text() == "not a database\n" * 100


def test_a_database_of_the_first_version(url: str) -> None:
    """Chunks and packed columns as version 0001 wrote them are read, drawn, continued and merged after the migration."""
    connections = Connections(url)
    config = Config()
    config.set_main_option("script_location", str(Path(store_file).with_name("migrations")))
    with connections.write() as db:
        config.attributes["connection"] = db
        command.upgrade(config, "0001")
        texts = ("display_name", "run_group", "job_type", "notes", "host", "program", "git_commit", "repo")
        run = {"entity": "e", "project": "p", "run_id": "r", "state": "running", "config": "{}", "summary": "{}", "tags": "[]"}
        run |= dict.fromkeys(texts, "") | {"created_at": 1.0, "heartbeat_at": 1.0, "attempt": 0, "version": 1, "last_step": 5}
        run |= {"line_counts": json.dumps({HISTORY: 6}), "metrics": '["v"]'}
        names = ", ".join(run)
        db.execute(sa.text(f"INSERT INTO runs ({names}) VALUES ({', '.join(':' + name for name in run)})"), run)
        pk = db.execute(sa.text("SELECT pk FROM runs")).scalar_one()
        sequence = {"run_pk": pk, "attempt": 0, "lane": "", "stream": HISTORY, "writer": "sdk"}
        fields = "run_pk, attempt, lane, stream, writer"
        values = ":run_pk, :attempt, :lane, :stream, :writer"
        db.execute(sa.text(f"INSERT INTO cursors ({fields}, next) VALUES ({values}, 6)"), sequence)
        insert = sa.text(
            f"INSERT INTO chunks ({fields}, seq_lo, seq_hi, step_lo, step_hi, level, keys, blob) "
            f"VALUES ({values}, :lo, :hi, :lo, :hi - 1, :level, :keys, :blob)"
        )
        keys = '{"_step": true, "v": true}'
        packed = zstandard.compress(msgspec.msgpack.encode(_old_columns([3, 4, 5])))
        db.execute(insert, {**sequence, "lo": 0, "hi": 3, "level": 1, "keys": keys, "blob": None})
        db.execute(insert, {**sequence, "lo": 3, "hi": 6, "level": 0, "keys": keys, "blob": packed})
        first = db.execute(sa.text("SELECT pk FROM chunks WHERE blob IS NULL")).scalar_one()
        for key, column in _old_columns([0, 1, 2]).items():
            blob = zstandard.compress(msgspec.msgpack.encode(column))
            db.execute(
                sa.text("INSERT INTO columns (chunk_pk, key, blob) VALUES (:pk, :key, :blob)"),
                {"pk": first, "key": key, "blob": blob},
            )
    connections.close()
    store = open_store(url)
    run = StoredRun(store)
    expected = rows(range(6), v=lambda s: s / 2)
    assert run.history() == expected
    assert [bucket.last for bucket in store.series(run.pk, "v")] == [row["v"] for row in expected]
    for s in range(6, 60):
        run.append(None, s, rows([s], v=s / 2))
    assert run.history() == rows(range(60), v=lambda s: s / 2)
    assert sum(bucket.count for bucket in store.series(run.pk, "v", buckets=3)) == 60
    store.close()


def _old_columns(steps: list[int]) -> dict[str, tuple[str, int, bytes, bytes]]:
    whole = b"".join(step.to_bytes(8, "little") for step in steps)
    return {"_step": ("i", len(steps), b"", whole), "v": ("j", len(steps), b"", json.dumps([s / 2 for s in steps]).encode())}


def test_begin_is_one_transaction(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A begin that fails half-way leaves the attempt, the counts and the summary before it."""
    run = StoredRun(store)
    run.begin(1)
    run.append(1, 0, rows(range(4), v=1))
    before, attempts = run.row, store.attempts(run.pk)
    monkeypatch.setattr("wbdist.server.store.attempts.recount", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.begin_attempt(run.pk, BeginAttempt(2, "n2", "w", cut(1, 2)), NOW)
    monkeypatch.undo()
    assert (run.row, store.attempts(run.pk)) == (before, attempts)
    assert run.begin(2, cut(1, 2)).accepted


def test_upserts_at_once_make_one_run(store: SqlStore) -> None:
    """Eight first upserts of one id: one of them inserts, all answer with the same run."""
    done = in_threads(lambda number: store.upsert_run("e", "p", "same", RunFields(notes=str(number)), NOW))
    assert sum(inserted for _, inserted in done) == 1  # type: ignore[misc]
    assert len({row.pk for row, _ in done}) == 1  # type: ignore[misc]
