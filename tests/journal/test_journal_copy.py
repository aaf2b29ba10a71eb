"""Prefixes of journals for a checkpoint, and the journals made of them on another disk."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from wbdist.checkpoint import history
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.history import Kept, write_history
from wbdist.core.position import HISTORY
from wbdist.core.tails import JournalCopy, JournalPrefix
from wbdist.distributed.cut import PositionCursor
from wbdist.errors import CheckpointError
from wbdist.run.journal import JournalHeader, JournalReader, JournalWriter, Kind
from wbdist.run.journal_copy import bring_back, journal_prefix, locate
from wbdist.run.shipper.lines import Translator

HERE = JournalHeader(
    run_id="r", project="p", entity="e", attempt=3, nonce="n", writer="rank0", online=True, base_url="http://b"
)


def header(writer: str = "rank0") -> JournalHeader:
    return JournalHeader(run_id="r", project="p", entity="", attempt=1, nonce="n1", writer=writer, created=5.0, host="a")


def write_randomly(journal: JournalWriter, chance: random.Random, first: int, steps: int) -> None:
    """Rows that are closed in every way there is, with other records between them."""
    for step in range(first, first + steps):
        for _ in range(chance.randint(1, 3)):
            journal.append_row({f"k{chance.randint(0, 3)}": chance.random()}, step=step, commit=False, time=6.0 + step)
            if chance.random() < 0.3:
                journal.append(Kind.CONSOLE, {"text": f"in {step}", "stream": "stdout"}, time=6.0)
                journal.append(Kind.ALERT, {"title": f"in {step}", "text": "", "level": "INFO", "wait": 0.0, "_step": step})
                journal.append(Kind.FILE, {"path": "/x", "name": f"x{step}", "policy": "now"})
                journal.append(Kind.ARTIFACT, {"name": f"a{step}"})
        how = chance.choice(("commit", "row", "next"))
        if how == "commit":
            journal.append(Kind.COMMIT, {})
        elif how == "row":
            journal.append_row({"last": None, "text": "ä"}, step=step, commit=True, time=6.5 + step)
        if chance.random() < 0.3:
            journal.append(Kind.SUMMARY, {"set": {"best": step}})


def lines_of(path: Path) -> Translator:
    with JournalReader.open(path) as reader:
        translator = Translator(reader.header)
        while records := reader.read():
            translator.feed(records)
        translator.close_row()
        assert not reader.torn()
    return translator


@pytest.mark.parametrize("seed", range(12))
def test_a_copy_holds_exactly_what_lies_below_the_cut(tmp_path: Path, seed: int) -> None:
    """Proves that frames up to a cut give the very lines that its watermark counts, however rows were closed and whatever was
    printed in between, and over the journals of an aggregator and its successor."""
    chance = random.Random(seed)
    first = JournalWriter.create(tmp_path / "a.wbdj", header())
    write_randomly(first, chance, 0, 6)
    first.close(None)
    second = JournalWriter.create(tmp_path / "b.wbdj", header("rank0.1"))
    write_randomly(second, chance, 6, 6)
    second.append(Kind.COMMIT, {})
    cursor = PositionCursor([first.path, second.path])
    walked: dict[Path, tuple[int, int]] = {}
    for step in range(12):
        watermark = cursor.position(step).watermark
        counted: dict[str, dict[str, int]] = {}
        for path, frame in cursor.cut():
            prefix = journal_prefix(path, frame)
            assert prefix == journal_prefix(path, frame, walked.get(path, (0, 0)))
            walked[path] = (prefix.size, frame + 1)
            piece = tmp_path / f"{step}-{path.stem}.part"
            piece.write_bytes(path.read_bytes()[: prefix.size])
            [copy] = bring_back([JournalCopy((str(piece),))], tmp_path / "none", HERE, lambda _, s=step: made(tmp_path, s))
            lines = lines_of(copy)
            with JournalReader.open(copy) as reader:
                for stream, count in lines.produced.items():
                    counted.setdefault(stream, {})[reader.header.writer] = count
            if lines.lines[HISTORY]:
                assert msgspec.json.decode(lines.lines[HISTORY][-1])["_step"] <= step
        wanted = {(s, w): n for s, of in watermark.counts.items() for w, n in of.items() if n}
        assert {(s, w): n for s, of in counted.items() for w, n in of.items() if n} == wanted
    second.close(0)


def made(root: Path, number: int) -> Path:
    directory = root / f"new-{number}-{random.getrandbits(40)}"
    directory.mkdir()
    return directory


def test_whole_segments_are_linked_and_the_rest_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a growing journal costs each save one segment at most, and that every checkpoint is complete by itself."""
    monkeypatch.setattr(history, "SEGMENT", 1000)
    journal = JournalWriter.create(tmp_path / "a.wbdj", header())
    kept = Kept()
    seen: list[set[int]] = []
    for save in range(4):
        for step in range(10 * save, 10 * save + 10):
            journal.append_row({"loss": step / 7, "note": "x" * 40}, step=step, commit=True, time=1.0)
        cursor = PositionCursor([journal.path])
        cursor.position(10 * save + 9)
        [(path, frame)] = cursor.cut()
        prefix = journal_prefix(path, frame)
        directory = tmp_path / f"ckpt-{save}"
        directory.mkdir()
        kept = Kept(directory, write_history(FileLayer(), directory, 0, [prefix], kept))
        files = [directory / name for name in sorted(kept.files)]
        assert b"".join(file.read_bytes() for file in files) == path.read_bytes()[: prefix.size]
        assert [kept.files[f"history-0/{file.name}"].size for file in files[:-1]] == [1000] * (len(files) - 1)
        seen.append({file.stat().st_ino for file in files})
    assert len(seen[-1]) > 2
    assert [len(after - before) for before, after in itertools.pairwise(seen)] == [
        len(after) - len(before) + 1 for before, after in itertools.pairwise(seen)
    ]
    journal.close(0)


def test_nothing_is_linked_where_links_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a file system without links only costs copies."""

    class NoLinks(FileLayer):
        def link(self, old: Path, new: Path) -> None:
            raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(history, "SEGMENT", 10)
    source = tmp_path / "j"
    source.write_bytes(b"0123456789abc")
    kept = Kept()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        kept = Kept(tmp_path / name, write_history(NoLinks(), tmp_path / name, 0, [JournalPrefix("j", str(source), 13)], kept))
    assert [(tmp_path / "two" / name).read_bytes() for name in sorted(kept.files)] == [b"0123456789", b"abc"]
    with pytest.raises(CheckpointError, match="ends 7 bytes before"):
        write_history(NoLinks(), tmp_path / "two", 1, [JournalPrefix("j", str(source), 20)], kept)


def test_the_original_is_found_and_not_doubled(tmp_path: Path) -> None:
    """Proves that a job which goes on beside its old journals brings nothing back, and takes the same prefix of the original
    along; and that a copy brought back once is found the next time, with where it goes taken from the new run."""
    root = tmp_path / "wandb"
    (root / "run-1").mkdir(parents=True)
    journal = JournalWriter.create(root / "run-1" / "rank0.a1.wbdj", header())
    for step in range(20):
        journal.append_row({"loss": float(step)}, step=step, commit=True, time=1.0)
    cursor = PositionCursor([journal.path])
    cursor.position(9)
    [(path, frame)] = cursor.cut()
    prefix = journal_prefix(path, frame)
    data = path.read_bytes()[: prefix.size]
    pieces = []
    for number, start in enumerate(range(0, len(data), 300)):
        pieces.append(str(tmp_path / f"piece.{number}"))
        Path(pieces[-1]).write_bytes(data[start : start + 300])
    copy = JournalCopy(tuple(pieces))

    assert locate(root, copy) == prefix
    assert bring_back([copy], root, HERE, lambda _: made(root, 1)) == []
    journal.close(0)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    [brought] = bring_back([copy], elsewhere, HERE, lambda _: made(elsewhere, 1))
    with JournalReader.open(brought) as reader:
        facts: Any = reader.header
    assert (facts.online, facts.base_url, facts.entity, facts.copied, facts.nonce) == (True, "http://b", "e", True, "n1")
    assert lines_of(brought).produced[HISTORY] == 10
    assert bring_back([copy], elsewhere, HERE, lambda _: made(elsewhere, 2)) == []
    assert locate(elsewhere, copy) == JournalPrefix(prefix.name, str(brought), brought.stat().st_size)
