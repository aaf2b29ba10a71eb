"""Strategy rank0 when nobody is left: what the ranks' feeds hold and the run's journal does not becomes a journal of the run.

A killed aggregator is started again by rank 0. When all of them die at once (a machine, a scheduler's SIGKILL) the last rows
that ranks were promised lie in their feeds alone. A replay takes the feeds the way an aggregator does, leaves out what the
run's journals hold, and writes the rest as one more writer of the same attempt, `rank0.replay`. Lines are known to the server
by (attempt, nonce, writer, seq), and what a replay writes depends on the journals alone; so it may be made and sent any number
of times, before or after the next attempt has begun, and its rows are live or archived as the aggregator's would have been.

Who does it: `wbdist sync`, and, in a process beside the next attempt's aggregator, whoever continues the job on this disk.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import msgspec

from wbdist.disk import sync_directory
from wbdist.distributed.merging import Feed, Merger, exit_code_of
from wbdist.errors import Error, InitStartError, JournalCorruptError
from wbdist.run import machine
from wbdist.run.handle import Run
from wbdist.run.journal import (
    SUFFIX,
    JournalHeader,
    JournalReader,
    JournalWriter,
    Kind,
    journal_name,
    writer_alive,
)
from wbdist.run.journal_storage import is_local
from wbdist.run.shipper import client
from wbdist.run.shipper.marks import settle, settled

WRITER = "rank0.replay"
_BESIDE = ".replay-"
CHUNK = 1 << 18
QUIET = 3600.0
"""Seconds without a word after which a journal on a shared file system is no longer taken for another host's living one."""
TICK = 0.5
"""Seconds between two looks of a process in the background for the one it works beside."""


class Group(msgspec.Struct):
    """The journals of one attempt that were found."""

    feeds: dict[int, Path]
    """By rank."""
    headers: dict[int, JournalHeader]
    """Of the feeds."""
    runs: list[tuple[JournalHeader, Path]]
    """Of the run, in the order in which they were written."""

    @property
    def header(self) -> JournalHeader:
        """Of a feed."""
        return next(iter(self.headers.values()))

    def missing(self) -> list[int]:
        """Ranks whose feeds are on other machines' disks; one that is missing beside others of its host never began."""
        facts = self.header.feed
        here = {header.host: header.feed.here for header in self.headers.values() if header.feed is not None}
        if facts is None or sum(here.values()) >= facts.ranks:
            return []
        return [rank for rank in range(facts.ranks) if rank not in self.feeds]


class Replayed(msgspec.Struct, frozen=True):
    """What became of a group. `word`: "replayed" (`journal` is new), "nothing" (all is in the run's journals), "running" (one
    of its writers lives), "elsewhere" (one may, on another host), "incomplete", "failed"; `why` says why."""

    word: Literal["replayed", "nothing", "running", "elsewhere", "incomplete", "failed"]
    journal: Path | None = None
    rows: int = 0
    why: str = ""


def groups(journals: Iterable[Path]) -> list[Group]:
    """The attempts whose feeds, or some of them, are among `journals` or lie below the same roots; oldest first."""
    found: dict[tuple[str, str, int, str], Group] = {}
    for path, header in _with_siblings(journals):
        group = found.setdefault((header.project, header.run_id, header.attempt, header.nonce), Group({}, {}, []))
        if header.role == "run":
            group.runs.append((header, path))
        elif header.feed is not None and _is_longer(path, group.feeds.get(header.rank)):
            group.feeds[header.rank], group.headers[header.rank] = path, header
    for group in found.values():
        by_writer: dict[str, tuple[JournalHeader, Path]] = {}
        for header, path in group.runs:
            if header.writer not in by_writer or _is_longer(path, by_writer[header.writer][1]):
                by_writer[header.writer] = (header, path)
        group.runs = sorted(
            by_writer.values(), key=lambda run: (run[0].writer.startswith(WRITER), run[0].created, run[0].writer)
        )
    return [found[key] for key in sorted(found) if found[key].feeds]


def _with_siblings(journals: Iterable[Path]) -> list[tuple[Path, JournalHeader]]:
    headers: dict[Path, JournalHeader] = {}
    looked: set[tuple[Path, str]] = set()
    for path in {path.resolve() for path in journals}:
        header = headers.get(path) or _header(path)
        if header is None:
            continue
        headers[path] = header
        place = (path.parent.parent, header.run_id)
        if place in looked:
            continue
        looked.add(place)
        for other in path.parent.parent.glob(f"*run-*-{header.run_id}*/*{SUFFIX}"):
            if other not in headers and (its := _header(other)) is not None:
                headers[other] = its
    return sorted(headers.items())


def _header(path: Path) -> JournalHeader | None:
    try:
        with JournalReader.open(path) as reader:
            return reader.header
    except (JournalCorruptError, OSError):
        return None  # its writer was killed before it began: it never was a journal


def _is_longer(path: Path, other: Path | None) -> bool:
    """Of two of one writer, one is a copy."""
    return other is None or path.stat().st_size > other.stat().st_size


def replay(group: Group, *, without_missing: bool = False) -> Replayed:
    """Brings what only the feeds hold into a journal of the run, in the directory of its first one.

    `without_missing`: as if ranks whose feeds are not here had logged nothing; what they logged for the steps written now never
    counts then. Can be killed at any moment and repeated; of two at once one wins, and both have the same to write. Takes about
    20 us a row of a feed.
    """
    if all(settled(path) for path in group.feeds.values()):
        return Replayed("nothing")
    if any(writer_alive(path) for path in [*group.feeds.values(), *(path for _, path in group.runs)]):
        return Replayed("running", why="its processes live")
    if (host := _perhaps_alive_on(group)) is not None:
        return Replayed(
            "elsewhere",
            why=f"attempt {group.header.attempt} of run {group.header.run_id} was written by host {host} within the last hour, "
            "and this file system does not say whether it still is: run wbdist sync there, or later",
        )
    if not group.runs and any(header.feed is not None and header.feed.aggregated for header in group.headers.values()):
        return Replayed("nothing", why="the journal of the run itself is not here")
    if (missing := group.missing()) and not without_missing:
        return Replayed("incomplete", why=_not_here(group, missing))
    try:
        replayed = _replay(group)
        for path in group.feeds.values():
            settle(path)
    except (Error, OSError) as error:
        return Replayed("failed", why=str(error))
    return replayed


def _perhaps_alive_on(group: Group) -> str | None:
    """The host, not this one, of which a process may still write, where another host's locks cannot be believed."""
    for header, path in [*((group.headers[rank], path) for rank, path in group.feeds.items()), *group.runs]:
        if header.host in {"", machine.host()} or is_local(path.parent):
            continue
        if path.stat().st_mtime > time.time() - QUIET:
            return header.host
    return None


def _not_here(group: Group, missing: list[int]) -> str:
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    return (
        f"attempt {group.header.attempt} of run {group.header.run_id} was lost with all its processes, and what {ranks} logged "
        "last is on other machines: name their `wandb` directories, too, in one command; or, when they are lost, "
        "go on without with --without-missing-ranks"
    )


def _replay(group: Group) -> Replayed:
    header = _header_of_replay(group)
    directory = (group.runs[0][1] if group.runs else group.feeds[min(group.feeds)]).parent
    final = directory / journal_name(header.writer, header.attempt)
    for stale in directory.glob(f"{_BESIDE}*/new/*{SUFFIX}"):
        if not writer_alive(stale):
            shutil.rmtree(stale.parent.parent, ignore_errors=True)
    # Two levels down: nobody takes it for a journal of the run before it is whole.
    beside = Path(tempfile.mkdtemp(prefix=_BESIDE, dir=directory))
    try:
        (beside / "new").mkdir()
        with JournalWriter.create(beside / "new" / final.name, header) as journal:
            rows = _write(group, journal)
        if rows is None:
            return Replayed("nothing")
        with suppress(FileExistsError):  # another replay was faster, with the same
            os.link(journal.path, final)
        sync_directory(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Replayed("replayed", final, rows)


def _header_of_replay(group: Group) -> JournalHeader:
    like = group.runs[0][0] if group.runs else group.header
    before = sum(header.writer.startswith(WRITER) for header, _ in group.runs)
    return msgspec.structs.replace(
        like, writer=f"{WRITER}{before + 1}" if before else WRITER, role="run", feed=None, rank=0, pid=os.getpid(), copied=False
    )


def _write(group: Group, journal: JournalWriter) -> int | None:
    """Writes and closes it; how many rows it has, None when there is nothing to say."""
    facts = group.header.feed
    assert facts is not None
    feeds = [Feed(rank) for rank in range(facts.ranks)]
    marked: list[float] = []
    merger = Merger(feeds, journal, [path for _, path in group.runs], marked.append, hold=math.inf)
    with ExitStack() as stack:
        readers = {rank: stack.enter_context(JournalReader.open(path)) for rank, path in group.feeds.items()}
        for feed in feeds:
            if feed.number in readers:
                merger.begin(feed)
            else:
                merger.lose(feed)
        while not merger.ended and (behind := [feed for feed in feeds if not feed.gone]):
            # Whoever is furthest behind: what is held is as little as it was while they lived.
            feed = min(behind, key=lambda feed: merger.aligner.next_of(feed.number))
            reader = readers[feed.number]
            frames, _ = reader.frames(reader.first + feed.received, CHUNK)
            if not frames or not merger.take(feed, frames):
                merger.lose(feed)
            merger.write_complete_steps()
    if merger.ended:
        return None
    if marked and not merger.was_preempting:
        journal.append(Kind.PREEMPTING, {}, marked[0])
    said = journal.seq >= 0
    if (end := feeds[0].ended) is not None:
        journal.close(exit_code_of(feeds), str(end.get("cause", "exit")))
        return merger.rows
    journal.abandon()  # the run was lost; that it speaks once more must not look like life
    return merger.rows if said else None


# Beside the next attempt ---------------------------------------------------------------------------------


class Order(msgspec.Struct):
    """What the process does: for the attempts of a run below `attempt`."""

    root: str
    run_id: str
    attempt: int
    base_url: str
    """Where the run goes; empty offline."""
    api_key: str | None


def in_background(run: Run) -> subprocess.Popen[bytes] | None:
    """Starts a process that replays what attempts before `run`'s left on this disk, and has it shipped; None when there is
    nothing. It ends with this process at the latest: what it had not done is done later."""
    path = run.journal_path
    assert path is not None
    root = path.parent.parent
    if all(settled(feed) for feed in _first_feeds(root, run.id) if not feed.name.endswith(f".a{run.attempt}{SUFFIX}")):
        return None
    with JournalReader.open(path) as reader:
        base_url = reader.header.base_url
    order = Order(str(root), run.id, run.attempt, base_url, run.settings.api_key)
    process = subprocess.Popen(
        [sys.executable, "-m", "wbdist.distributed.replay"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(msgspec.json.encode(order))
        process.stdin.close()
    return process


def _first_feeds(root: Path, run_id: str) -> list[Path]:
    return list(root.glob(f"*run-*-{run_id}*/feed0.a*{SUFFIX}"))


def main() -> None:
    """Entry of the process."""
    os.nice(10)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    root = Path(order.root)
    for group in groups(_first_feeds(root, order.run_id)):
        if group.header.run_id != order.run_id or group.header.attempt >= order.attempt:
            continue
        replayed = replay(group)
        if replayed.journal is not None and order.base_url:
            with suppress(InitStartError):  # the next shipper of this root finds it
                client.watch(root, replayed.journal, order.base_url, order.api_key)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(TICK)
    os._exit(0)


if __name__ == "__main__":
    main()
