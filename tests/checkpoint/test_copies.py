"""Copies on an object store, against a real S3 server: there whole or not at all, one writer wins, a zombie changes nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import obstore
import pytest
import torch
from support import dying
from support.ranks import alone
from support.s3 import BUCKET, S3Server
from support.training import position

from wbdist.checkpoint import copying
from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.claim import Attempt, Claim, JobIdentity
from wbdist.checkpoint.copies import Copies
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import Manifest, committed, verify
from wbdist.checkpoint.retention import Keep
from wbdist.errors import CheckpointError, FencedError, UsageError

JOB = JobIdentity("r1", "p", "e", None, 0.0)
_NUMBER = itertools.count()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "data")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture
def url(s3: S3Server) -> str:
    """A place of the test's own."""
    return f"s3://{BUCKET}/jobs/{next(_NUMBER)}"


def begin(copies: Copies, number: int, *stands: str, nonce: str = "") -> None:
    copies.begin(JOB, Attempt(number, nonce or f"n{number}", 0.0, "h", 1, "start"), stands)


def save(directory: Path, *steps: int, attempt: int = 1) -> list[Manifest]:
    """Checkpoints of a linear layer that holds the number of the step; newest first."""
    model = torch.nn.Linear(2, 2)
    with Checkpointer(directory, alone(), attempt=attempt, keep_last=9) as checkpoints:
        checkpoints.track(model=model)
        for step in steps:
            torch.nn.init.constant_(model.weight, step)
            checkpoints.save(step, position(step, attempt), block=True, timeout=20)
    return committed(directory)


def restored_step(directory: Path, attempt: int) -> int | None:
    model = torch.nn.Linear(2, 2)
    with Checkpointer(directory, alone(), attempt=attempt) as checkpoints:
        checkpoints.track(model=model)
        restored = checkpoints.restore(timeout=20)
        if restored is None:
            return None
        assert restored.notes == ()
        assert model.weight.tolist() == [[restored.step] * 2] * 2
        return restored.step


def life(url: str, directory: Path) -> tuple[Claim, tuple[str, ...]]:
    """What rank 0 does at the start of an attempt on a machine with this disk."""
    copies = Copies(url)
    copying.adopt(copies, directory)
    claim = Claim.take(directory, run_id=None, project="p", entity="e", name=None, timeout=1)
    try:
        return claim, copying.take_over(copies, FileLayer(), claim)
    except BaseException:
        claim.release()
        raise


def names(copies: Copies) -> list[str]:
    return [manifest.name for manifest in copies.scan()[0]]


def test_there_and_back(url: str, tmp_path: Path) -> None:
    """A copy is the checkpoint, byte by byte; removed, nothing of it is left."""
    copies = Copies(url)
    begin(copies, 1)
    newest, older = save(tmp_path / "here", 1, 2)
    for manifest in (newest, older, newest):  # shipping again changes nothing
        copies.ship(manifest, Path(manifest.directory), 1)
    assert names(copies) == ["step-2.a1", "step-1.a1"]
    found = copies.scan()[0][0]
    copies.verify(found)
    path = copies.fetch(found, FileLayer(), tmp_path / "there")
    verify(committed(tmp_path / "there")[0])
    for name in (*newest.files, "manifest.json"):
        assert (path / name).read_bytes() == (Path(newest.directory) / name).read_bytes()
    copies.remove("step-1.a1")
    copies.remove("step-1.a1")
    assert names(copies) == ["step-2.a1"]
    assert not [path for path in copies._list("") if path.startswith("step-1.")]


def test_damage_of_any_object_is_found(url: str, tmp_path: Path) -> None:
    """A flipped bit, a cut, an absent object, in each of them: found, put away, and the one before is brought instead."""
    newest, older = save(tmp_path / "here", 1, 2)
    count = 0
    for name, damage in itertools.product((*newest.files, "manifest.json"), ("flip", "cut", "missing")):
        copies = Copies(f"{url}-{(count := count + 1)}")
        begin(copies, 1)
        for manifest in (older, newest):
            copies.ship(manifest, Path(manifest.directory), 1)
        path = f"step-2.a1/{name}"
        content = bytearray(copies._get(path))
        content[len(content) // 2] ^= 0x10
        if damage == "missing":
            copies._delete([path])
        else:
            copies._put(path, bytes(content[:-1] if damage == "cut" else content))
        claim, notes = life(copies.url, tmp_path / f"there-{count}")
        claim.release()
        assert restored_step(tmp_path / f"there-{count}", 2) == 1, (name, damage)
        assert names(copies) == ["step-1.a1"]
        if (name, damage) != ("manifest.json", "missing"):  # that one was never committed
            assert any("step-2.a1" in note and "quarantine" in note for note in notes), notes
        assert "step-1.a1 was fetched" in notes[-1]


def test_one_of_many_writers_has_the_attempt(url: str) -> None:
    """Eight processes' worth of writers begin attempt 1 at once: one has it, all others are told; nobody is in doubt."""
    won: list[str] = []
    barrier = threading.Barrier(8)

    def try_it(nonce: str) -> None:
        copies = Copies(url)
        barrier.wait(20)
        try:
            begin(copies, 1, nonce=nonce)
        except FencedError:
            return
        won.append(nonce)

    threads = [threading.Thread(target=try_it, args=(f"nonce-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [begun.attempt.nonce for begun in Copies(url).attempts()] == won
    assert len(won) == 1
    begin(Copies(url), 1, nonce=won[0])  # the answer was lost and the request is made again


def test_a_zombie_changes_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an attempt commits after the next has begun is refused; and where it slips in between, it does not count."""
    copies = Copies(url)
    begin(copies, 1)
    third, second, first = save(tmp_path / "here", 1, 2, 3)
    copies.ship(first, Path(first.directory), 1)
    begin(copies, 2, "step-1.a1")
    with pytest.raises(FencedError, match="attempt 2 has taken over"):
        copies.ship(second, Path(second.directory), 1)
    assert names(copies) == ["step-1.a1"]
    late = Copies(url)
    looks = iter([None, None])  # it looked before attempt 2 began, and was stopped then for an hour
    original = late.check_fence
    monkeypatch.setattr(late, "check_fence", lambda attempt: next(looks, original) and original(attempt))
    with pytest.raises(FencedError, match="attempt 2 has taken over"):
        late.ship(third, Path(third.directory), 1)
    assert "step-3.a1/manifest.json" in copies._list("step-3.a1/")
    assert names(copies) == ["step-1.a1"]
    # On the zombie's own disk it lies, too; its machine's next attempt does not take it either.
    claim, notes = life(url, tmp_path / "here")
    claim.release()
    assert claim.attempt.number == 3
    assert "step-3.a1 was committed after attempt 2 had begun without it" in notes[0]
    assert restored_step(tmp_path / "here", 3) == 1


class Killed(BaseException):
    """In place of the end of the process: nothing in `Copies` catches it, and nothing in it cleans up."""


class DyingCopies(Copies):
    """Its process ends at the n-th request, before it or after it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.calls, self.at, self.after, self.really = 0, 0, False, False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in {"_put", "_put_file", "_create", "_delete", "_list", "_get"}:
            return found

        def end() -> None:
            if self.really:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed

        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.at and not self.after:
                end()
            result = found(*args, **options)
            if self.calls == self.at:
                end()
            return result

        return call


def ship_and_die(url: str, here: Path, at: int, after: bool, really: bool) -> int:
    """Ships steps 1 and 2, removes 1, and dies at the request `at` after the first (0: never); returns their number."""
    copies = DyingCopies(url)
    newest, older = committed(here)
    begin(copies, 1)
    copies.ship(older, Path(older.directory), 1)
    copies.calls, copies.at, copies.after, copies.really = 0, at, after, really
    copies.ship(newest, Path(newest.directory), 1)
    copies.remove(older.name)
    return copies.calls


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_every_request(url: str, tmp_path: Path, really: bool) -> None:
    """Dead before or after any request of a copy and a removal: the newest that counts is whole, and leftovers go.

    In `make test-all` by SIGKILL.
    """
    save(tmp_path / "here", 1, 2)
    requests = ship_and_die(f"{url}-whole", tmp_path / "here", 0, after=False, really=really)
    assert requests > 10
    steps = []
    for at in range(1, requests + 1):
        place = f"{url}-{at}"
        arguments = (place, tmp_path / "here", at, at % 2 == 0, really)
        if really:
            process = dying.context().Process(target=ship_and_die, args=arguments)
            process.start()
            assert dying.ended(process) == -signal.SIGKILL, at
        else:
            with pytest.raises(Killed):
                ship_and_die(*arguments)
        there = tmp_path / str(at)
        claim, _ = life(place, there)
        claim.release()
        assert claim.job.run_id == "r1"
        step = restored_step(there, 2)
        assert step is not None, at
        steps.append(step)
        copies = Copies(place)
        whole = {manifest.name for manifest in copies.scan()[0]}
        assert {path.partition("/")[0] for path in copies._list("") if path.startswith("step-")} == whole
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


def test_shipping_in_the_background(url: str, tmp_path: Path) -> None:
    """Offered checkpoints arrive, old copies go, the base stays, and a newer attempt is noticed."""
    claim, notes = life(url, tmp_path / "a")
    assert notes == ()
    copies = Copies(url)
    shipping = copying.Shipping(copying.OnStore(copies), tmp_path / "a", attempt=1, keep=Keep(2))
    manifests = save(tmp_path / "a", 1, 2, 3, 4)[::-1]
    shipping.offer(manifests[0], base=True)
    assert shipping.settle(60) == ""
    for manifest in manifests[1:]:
        shipping.offer(manifest)
        if manifest.step == 4:
            shutil.rmtree(manifest.directory)  # retention may be faster: what was offered is kept
        assert shipping.settle(60) == ""
    assert names(copies) == ["step-4.a1", "step-3.a1", "step-1.a1"]
    assert list((tmp_path / "a" / "outbox").iterdir()) == []
    claim.release()

    other, notes = life(url, tmp_path / "b")
    assert (other.attempt.number, other.job.run_id) == (2, claim.job.run_id)
    assert "step-4.a1 was fetched" in notes[-1]
    shipping.offer(manifests[1])
    assert "attempt 2 has taken over" in shipping.settle(60)
    assert "attempt 2 has taken over" in shipping.fenced()
    shipping.close()
    # A base that is on this disk only (its machine was killed before it could ship) is brought there by who goes on from it.
    copies.remove("step-4.a1")
    shipping = copying.Shipping(copying.OnStore(copies), tmp_path / "b", attempt=2, keep=Keep(2))
    shipping.offer(committed(tmp_path / "b")[0], base=True)
    assert shipping.settle(60) == ""
    assert names(copies)[0] == "step-4.a1"
    shipping.close()
    other.release()


def test_a_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting without the store is refused, since the job may live elsewhere; shipping goes on trying and says why."""
    place = tmp_path / "store"
    copies = Copies(f"file://{place}")
    begin(copies, 1)
    (newest,) = save(tmp_path / "here", 1)
    monkeypatch.setattr(copying, "RETRY", 0.05)
    shipping = copying.Shipping(copying.OnStore(copies), tmp_path / "here", attempt=1, keep=Keep(2))
    away = place.rename(tmp_path / "away")
    place.write_text("not a directory")
    shipping.offer(newest)
    assert "not everything is at file://" in shipping.settle(0.3)
    assert "cannot look for newer attempts" in shipping.problem
    with pytest.raises(CheckpointError, match="cannot read the job's identity"):
        copying.adopt(copies, tmp_path / "there")
    with pytest.raises(UsageError, match="not the address of an object store"):
        Copies(copies.url)
    place.unlink()
    away.rename(place)
    assert shipping.settle(60) == ""
    shipping.close()
    assert names(copies) == ["step-1.a1"]


def test_an_address_that_is_none() -> None:
    """Said at once, with what is allowed."""
    with pytest.raises(UsageError, match="Give s3://bucket/prefix"):
        Copies("what://ever")


def test_records_are_read_strictly(url: str) -> None:
    """An attempt's record that is not one is an error, not an attempt without checkpoints."""
    copies = Copies(url)
    obstore.put(copies._store, "job.json", msgspec.json.encode(JOB))
    obstore.put(copies._store, "attempts/000001.json", msgspec.json.encode({"attempt": 1}))
    with pytest.raises(CheckpointError, match="cannot read"):
        copying.adopt(copies, Path("nowhere"))
