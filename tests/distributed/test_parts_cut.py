"""A checkpoint's position counts the rows of a pool's workers, up to the moment at which the step was done."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.inprocess import World, lines_of

from wbdist.core.position import ALERTS, ARTIFACTS, CONSOLE, EVENTS, FILES, HISTORY
from wbdist.core.tails import JournalCopy
from wbdist.distributed.parts_cut import RunCut
from wbdist.run.journal import JournalWriter, Kind, journal_name
from wbdist.run.journal_copy import bring_back, journal_prefix

STEPS = 6


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def part_of(world: World, run: JournalWriter, writer: str) -> JournalWriter:
    facts = {name: getattr(run.header, name) for name in run.header.__struct_fields__}
    header = type(run.header)(**{**facts, "writer": writer, "primary": False})
    made = JournalWriter.create(run.path.parent / journal_name(writer, 1), header)
    world.writers.append(made)
    return made


@pytest.mark.parametrize("seed", range(2))
def test_what_workers_logged_before_the_step_was_done_is_within_the_cut(world: World, tmp_path: Path, seed: int) -> None:
    """Proves that a job which goes back to any of its checkpoints shows what its workers had logged until then, and no more,
    also when they go on while it is made and when one comes late; and that the frames which travel in it hold just that."""
    rng = random.Random(seed)
    run = world.journal(1)
    cut = RunCut(run.path)
    workers = [part_of(world, run, "w0-a")]
    logged: list[tuple[float, int]] = []
    steps = 0
    for step in range(STEPS):
        if step == STEPS // 2:
            workers.append(part_of(world, run, "w1-b"))
        for _ in range(rng.randint(0, 4)):
            worker, steps = rng.choice(workers), steps + 1
            world.now += 1
            worker.append_row({"score": steps}, step=1000 + steps, commit=True, time=world.now)
            worker.append(Kind.CONSOLE, {"text": "scored", "stream": "stdout"}, world.now)
            logged.append((world.now, steps))
        world.now += 1
        run.append_row({"loss": 1.0}, step=step, commit=True, time=world.now)
    for number, worker in enumerate(workers):  # an open row at the end
        worker.append_row({"score": -1}, step=5000 + number, commit=False, time=world.now)
        worker.append(Kind.CONSOLE, {"text": "within", "stream": "stdout"}, world.now)
    world.sync([run.path, *(worker.path for worker in workers)])
    times = {row["_step"]: row["_timestamp"] for row in world.rows(attempt=1) if "loss" in row}
    for step in range(STEPS):
        position = cut.position(step)
        told = [score for time, score in logged if time < times[step]]
        counts = position.watermark.counts
        assert sum(count for writer, count in counts[HISTORY].items() if writer != "rank0") == len(told)
        assert counts[HISTORY]["rank0"] == step + 1
        for path, frame in cut.cut():
            piece = tmp_path / f"{step}-{path.name}"
            piece.write_bytes(path.read_bytes()[: journal_prefix(path, frame).size])
            place = tmp_path / f"copies-{step}-{path.stem}"
            place.mkdir()
            [copy] = bring_back([JournalCopy((str(piece),))], tmp_path / "none", run.header, lambda _, at=place: at)
            writer = path.name.removesuffix(".a1.wbdj")
            assert len(lines_of(copy)[HISTORY]) == counts[HISTORY].get(writer, 0)
            assert len(lines_of(copy)[CONSOLE]) == counts.get(CONSOLE, {}).get(writer, 0)
        following = world.journal(step + 2, base=position.watermark)
        world.sync([following.path])
        shown = world.rows()
        assert sorted(row["score"] for row in shown if "score" in row) == told
        assert [row["_step"] for row in shown if "loss" in row] == list(range(step + 1))


def test_files_and_artifacts_are_counted(world: World) -> None:
    """Proves that a position counts all streams of a journal: what it does not count is out of sight when a job goes on."""
    run = world.journal(1)
    run.append(Kind.FILE, {"path": "/x", "name": "x", "policy": "now"})
    run.append(Kind.ARTIFACT, {"name": "a"})
    run.append(Kind.STATS, {"system.cpu": 1.0})
    run.append(Kind.ALERT, {"title": "t", "text": "", "level": "INFO", "wait": 0.0, "_step": 0})
    run.append_row({"loss": 1.0}, step=0, commit=True, time=world.now)
    run.append(Kind.FILE, {"path": "/x", "name": "y", "policy": "now"})
    counts = RunCut(run.path).position(0).watermark.counts
    assert counts == {stream: {"rank0": 1} for stream in (HISTORY, FILES, ARTIFACTS, EVENTS, ALERTS)} | {CONSOLE: {"rank0": 0}}
