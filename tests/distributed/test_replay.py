"""Feeds of a job that lost all its processes at once: what they hold and the run's journal does not is brought into the run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from support.feeding import Ranks
from support.inprocess import World, cut
from support.journals import records_of, rows_of
from support.waiting import until

from wbdist.cli.clean import removable
from wbdist.cli.feeds import replayed as sync_replays
from wbdist.cli.sync import command as sync
from wbdist.core.position import CONSOLE
from wbdist.distributed import replay as replaying
from wbdist.distributed.merging import Feed, Merger
from wbdist.distributed.replay import Group, groups, replay
from wbdist.run.journal import JournalHeader, JournalReader, JournalWriter, Kind, find_journals
from wbdist.run.journal_format import FeedFacts

STEPS = 30


class Attempt:
    """Feeds of `ranks` ranks of an attempt that was killed at a random moment, and the run's journal up to a random one."""

    def __init__(self, world: World, attempt: int, rng: random.Random, *, ranks: int = 3, **facts: Any) -> None:
        self.ranks = ranks
        self.logged: dict[int, dict[int, dict[str, int]]] = {}
        """step -> rank -> its row."""
        self.printed: list[str] = []
        feeds = [
            world.journal(
                attempt,
                writer=f"feed{rank}",
                role="feed",
                rank=rank,
                feed=FeedFacts(ranks, ranks, aggregated=True),
                online=False,
                **facts,
            )
            for rank in range(ranks)
        ]
        first = feeds[0].header.starting_step
        for rank, feed in enumerate(feeds):
            feed.append(Kind.DEFINE, {"reduce": {"sum": "sum", "again": "sum"}})
            for step in range(first, first + rng.randint(STEPS // 2, STEPS)):
                self._log(feed, rank, step, rng)
        self.feeds = [feed.path for feed in feeds]
        self.run = self._aggregated(world, attempt, rng, facts)
        for feed in feeds:
            world.lose(feed)

    def _log(self, feed: JournalWriter, rank: int, step: int, rng: random.Random) -> None:
        if rank == 0:
            self.printed.append(f"step {step}")
            feed.append(Kind.CONSOLE, {"text": self.printed[-1], "stream": "stdout"})
        if rng.random() < 0.1:
            return
        row = self.logged.setdefault(step, {}).setdefault(rank, {})
        for key in ("sum", "again")[: rng.randint(1, 2)]:
            row[key] = rng.randrange(1000)
            feed.log({key: row[key]}, step=step)
        if rng.random() < 0.8:
            feed.commit_row()

    def _aggregated(self, world: World, attempt: int, rng: random.Random, facts: dict[str, Any]) -> JournalWriter:
        """What an aggregator had taken and written when it was killed."""
        run = world.journal(attempt, **facts)
        feeds = [Feed(rank) for rank in range(self.ranks)]
        merger = Merger(feeds, run, [], lambda _: None)
        for feed, path in zip(feeds, self.feeds, strict=True):
            merger.begin(feed)
            with JournalReader.open(path) as reader:
                frames, _ = reader.frames(max_bytes=1 << 30)
            merger.take(feed, frames[: rng.randint(0, len(frames))])
        merger.write_complete_steps()
        world.lose(run)
        return run

    @property
    def paths(self) -> list[Path]:
        return [self.run.path, *self.feeds]

    def expected(self) -> dict[int, dict[str, int]]:
        """step -> the row of all ranks."""
        rows = {}
        for step, of in self.logged.items():
            keys = {key for row in of.values() for key in row}
            rows[step] = {key: sum(row.get(key, 0) for row in of.values()) for key in keys}
        return rows


def by_step(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found = {row["_step"]: {key: value for key, value in row.items() if not key.startswith("_")} for row in rows}
    assert len(found) == len(rows), "a step stands twice"
    return found


def only(found: list[Group]) -> Group:
    (group,) = found
    return group


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(4))
def test_the_run_is_whole_whatever_the_aggregator_had_written(world: World, seed: int) -> None:
    """Proves that with all processes killed at any moments the run's journal and the replay's hold each step that any rank
    logged once, open ones too, and each printed line once; that a second replay changes nothing; and what a server then has."""
    rng = random.Random(seed)
    job = Attempt(world, 1, rng, ranks=rng.randint(1, 4))
    done = replay(only(groups(rng.sample(job.paths, len(job.paths)))))
    journals = [job.run.path, *([done.journal] if done.journal else [])]
    assert by_step([row for path in journals for row in rows_of(path)]) == job.expected()
    texts = [record["text"] for path in journals for record in records_of(path, Kind.CONSOLE)]
    assert texts == job.printed
    assert replay(only(groups(job.paths))).word == "nothing"
    for path in job.feeds:
        path.with_name(path.name + ".settled").unlink()
    assert replay(only(groups([*job.paths, *journals]))).word == "nothing", "also when nobody remembers"

    world.sync(journals)
    assert by_step(world.rows()) == job.expected()
    assert world.console() == job.printed
    before = world.attempts()
    world.sync([*journals, *journals])
    assert by_step(world.rows()) == job.expected()
    assert world.attempts() == before
    assert (before[1].end_cause, before[1].exit_code) == ("lost", None)


@pytest.mark.parametrize("first", ["replay", "next attempt"])
def test_beside_a_next_attempt_the_rows_are_archived_whichever_comes_first(world: World, first: str) -> None:
    """Proves that a job which goes on from its checkpoint shows nothing of what its dead ranks logged after it, whether the
    replay or the next attempt reaches the server first; and that the archive then has all of it."""
    job = Attempt(world, 1, random.Random(7))
    step = max(by_step(rows_of(job.run.path)), default=-1)
    base = cut([job.run], step)
    world.sync([job.run.path])
    following = world.journal(2, base=base)
    for number in range(3):
        following.append_row({"sum": -number}, step=step + 1 + number, commit=True, time=world.now)
    world.lose(following)
    if first == "next attempt":
        world.sync([following.path])
    done = replay(only(groups(job.paths)))
    assert done.journal is not None
    assert done.rows > 0
    for path in [done.journal, following.path, done.journal]:
        world.sync([path])
    shown = {at: row for at, row in job.expected().items() if at <= step}
    assert by_step(world.rows()) == shown | {step + 1 + number: {"sum": -number} for number in range(3)}
    assert by_step(world.rows(attempt=1)) == job.expected()
    assert len(world.console()) == base.counts[CONSOLE]["rank0"]


def test_two_replays_at_once_make_one_journal(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that who finds the other's journal in its place leaves it there, with the same in it; and that what a killed one
    left lying is removed and never taken for a journal."""
    job = Attempt(world, 1, random.Random(3))
    group = only(groups(job.paths))
    again = only(groups(job.paths))
    stale = job.run.path.parent / ".replay-dead" / "new"
    stale.mkdir(parents=True)
    (stale / "rank0.replay.a1.wbdj").write_bytes(b"WBDJ")
    found = find_journals(job.run.path.parent)
    assert found == [job.run.path]
    one = replay(group)
    assert not stale.exists()
    kept = one.journal.read_bytes() if one.journal else b""
    for path in job.feeds:
        path.with_name(path.name + ".settled").unlink()
    other = replay(again)  # as one that had looked before the first was done
    assert one.journal == other.journal
    assert one.journal is not None
    assert one.journal.read_bytes() == kept
    assert one.rows == other.rows


def test_what_is_not_here_is_not_made_up(world: World) -> None:
    """Proves that an attempt is left alone while a process of it lives, while hosts' feeds are missing (unless that is wanted),
    and when the run's own journal was removed; that a rank which never began is not waited for."""
    job = Attempt(world, 1, random.Random(5))
    alive = world.journal(1, writer="rank0.1")
    assert replay(only(groups([*job.paths, alive.path]))).word == "running"
    world.lose(alive)
    job.run.path.rename(job.run.path.with_suffix(".away"))
    alive.path.unlink()
    assert (replay(only(groups(job.feeds))).word, job.run.path.exists()) == ("nothing", False)
    job.run.path.with_suffix(".away").rename(job.run.path)

    apart = _with_headers(job, here=1)
    refused = replay(only(groups([job.run.path, *apart[:2]])))
    assert refused.word == "incomplete"
    assert "what rank 2 logged" in refused.why
    assert "--without-missing-ranks" in refused.why
    assert replay(only(groups([job.run.path, *apart[:2]])), without_missing=True).word == "replayed"


def test_a_shared_file_system_s_locks_are_not_believed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that where another host's locks say nothing its fresh journals are left alone: its aggregator may be
    alive, and would write the same rows once more."""
    job = Attempt(world, 1, random.Random(5), host="other-host")
    monkeypatch.setattr(replaying, "is_local", lambda _: False)
    refused = replay(only(groups(job.paths)))
    assert refused.word == "elsewhere"
    assert "other-host" in refused.why
    for path in job.paths:
        os.utime(path, (1.0, 1.0))
    assert replay(only(groups(job.paths))).word == "replayed"


def _with_headers(job: Attempt, here: int) -> list[Path]:
    """The feeds, as if of hosts with so many ranks each."""
    made = []
    for rank, path in enumerate(job.feeds):
        with JournalReader.open(path) as reader:
            header = reader.header
            facts = {name: getattr(header, name) for name in JournalHeader.__struct_fields__}
            facts |= {"feed": FeedFacts(job.ranks, here, aggregated=True), "host": f"host{rank // here}"}
            directory = path.parent.with_name(f"{path.parent.name}-{here}")
            directory.mkdir()
            copy = JournalWriter.create(directory / path.name, JournalHeader(**facts))
            while records := reader.read():
                for record in records:
                    if record.kind is Kind.ROW:
                        copy.append_row(record.data, step=record.step, commit=record.commit, time=record.time)
                    else:
                        copy.append(record.kind, record.data, record.time)
        copy._release()
        path.unlink()
        made.append(copy.path)
    return made


def test_all_processes_killed_then_sync(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves with real ranks, whose aggregator had written a part when all were killed, that `wbdist sync` of one directory
    brings the rest of all ranks' rows; and that the feeds may be cleaned away then, and not before."""
    ranks.start(3, strategy="rank0", steps=60, gate={"0": 40, "1": 45, "2": 55}, prints=True)
    ranks.until("open", 3)
    aggregator = psutil.Process(ranks.events("open")[0]["aggregator"])
    (journal,) = ranks.journals()
    until(lambda: len(rows_of(journal)) > 0, "some rows")
    aggregator.send_signal(signal.SIGSTOP)
    ranks.until("gate", 3)
    for process in [*ranks.processes, aggregator]:
        process.send_signal(signal.SIGKILL)
    ranks.wait()
    aggregator.wait(60)
    root = ranks.root / "wandb"
    assert removable(root, 1e12, include_unsynced=False) == []
    made, problems = sync_replays([journal.resolve()], without_missing=False)
    assert problems == 0
    assert len(made) == 1
    rows = ranks.rows()
    assert [row["_step"] for row in rows] == list(range(55))
    assert [row["count"] for row in rows] == [6] * 40 + [5] * 5 + [3] * 10
    texts = [record["text"] for path in ranks.journals() for record in records_of(path, Kind.CONSOLE)]
    assert [text for text in texts if text.startswith("at step")] == [f"at step {step}" for step in range(40)]
    assert sync_replays([journal.resolve()], without_missing=False) == ([], 0)
    assert {path.name for directory in removable(root, 1e12, include_unsynced=False) for path in directory.glob("*.wbdj")} == {
        "feed0.a1.wbdj",
        "feed1.a1.wbdj",
        "feed2.a1.wbdj",
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(6))
def test_eight_ranks_killed_at_once(ranks: Ranks, seed: int) -> None:
    """Proves that of 8 ranks that log as fast as they can, killed with their aggregator at a random moment, one after the other
    in a random order, the run has after a replay each step that any of them was promised, with the values of all of those."""
    rng = random.Random(seed)
    ranks.start(8, strategy="rank0", steps=200_000)
    ranks.until("open", 8, 60)
    aggregator = psutil.Process(ranks.events("open")[0]["aggregator"])
    (journal,) = ranks.journals()
    until(lambda: len(rows_of(journal)) > rng.randint(1, 3000), "some rows", 60)
    doomed = [*ranks.processes, aggregator]
    for process in rng.sample(doomed, len(doomed)):
        process.send_signal(signal.SIGKILL)
    ranks.wait()
    aggregator.wait(90)
    sync_replays([journal.resolve()], without_missing=False)
    counts: dict[int, int] = {}
    for path in find_journals(ranks.root / "wandb"):
        with JournalReader.open(path) as reader:
            rank = reader.header.rank
            while reader.header.role == "feed" and (records := reader.read(1 << 22)):
                for record in records:
                    if record.kind is Kind.ROW and "count" in record.data:
                        assert record.step is not None
                        counts[record.step] = counts.get(record.step, 0) + rank + 1
    rows = ranks.rows()
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert {row["_step"]: row["count"] for row in rows if "count" in row} == counts


def test_sync_says_what_it_cannot_replay(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that `wbdist sync` ends with 70 and names the ranks when feeds of the newest attempt are on other machines."""
    job = Attempt(world, 1, random.Random(5))
    apart = _with_headers(job, here=1)
    apart[2].unlink()
    monkeypatch.setenv("WBDIST_DATA_DIR", str(world.directory / "data"))
    paths = [str(path) for path in apart[:2]] + [str(job.run.path)]
    done = CliRunner().invoke(sync, ["--skip-online", "--skip-offline", *paths])
    assert done.exit_code == 70, done.output
    assert "what rank 2 logged last is on other machines" in done.output
    again = CliRunner().invoke(sync, ["--skip-online", "--skip-offline", "--without-missing-ranks", *paths])
    assert again.exit_code == 0, again.output
    assert "rows that were in the ranks' journals alone are in the run" in again.output


def test_the_next_attempt_replays_what_the_last_one_left(ranks: Ranks) -> None:
    """Proves that a job that goes on brings what its dead ranks had logged last into a journal by itself."""
    ranks.start(2, strategy="rank0", steps=30, gate={"0": 20, "1": 25})
    ranks.until("open", 2)
    aggregator = psutil.Process(ranks.events("open")[0]["aggregator"])
    aggregator.send_signal(signal.SIGSTOP)
    ranks.until("gate", 2)
    for process in [*ranks.processes, aggregator]:
        process.kill()
    ranks.wait()
    aggregator.wait(60)
    following = Ranks(ranks.root / "again")
    try:
        (ranks.root / "wandb").rename(following.root / "wandb")
        following.start(2, strategy="rank0", steps=5, attempt=2, gate={"0": 3}, settings={"run_id": "job"})
        until(lambda: any("replay" in path.name for path in following.journals()), "the replay", 60)
    finally:
        following.stop()
    rows = [row["_step"] for path in following.journals() if ".a1." in path.name for row in rows_of(path)]
    assert rows == list(range(25))


def test_a_process_in_the_background_ends_with_the_one_it_works_beside() -> None:
    """Proves that a replay does not outlive its job."""
    program = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-m', 'wbdist.distributed.replay'], stdin=subprocess.PIPE); print(p.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    until(lambda: not psutil.pid_exists(int(done.stdout)), "it to be gone", 60)
