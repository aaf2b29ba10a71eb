"""Journals that leave this disk and come back on another one: prefixes for a checkpoint, and copies made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from wbdist.core.tails import JournalCopy, JournalPrefix
from wbdist.errors import JournalCorruptError
from wbdist.run.journal_format import FRAME_HEAD, JournalHeader, decode_header, encode_header, header_size
from wbdist.run.journal_reader import SUFFIX, JournalReader, find_journals

_READ = 1 << 18
_CHUNK = 1 << 20

Read = Callable[[int, int], bytes]
"""(offset, size) -> bytes, fewer at the end."""


def name_of(header: JournalHeader) -> str:
    """Names a journal among all of a job."""
    return f"a{header.attempt:06d}-{header.writer}-{header.nonce}"


def journal_prefix(path: Path, through: int, known: tuple[int, int] = (0, 0)) -> JournalPrefix:
    """The prefix of `path` that ends with frame number `through`, which must have been read, so verified, before.

    `known`: (size, number of frames) of a shorter prefix, to walk on from. Raises JournalCorruptError when there are fewer
    frames, or OSError.
    """
    with JournalReader.open(path) as reader:
        start, before = known if known[0] else (reader.first, 0)
        size, frames = _walk(_reading(path), start, through + 1 - before)
        frames += before
        if frames <= through:
            raise JournalCorruptError(f"{path} has {frames} frames; frame {through} was read from it before")
        return JournalPrefix(name_of(reader.header), str(path), size)


class _Joined:
    """The segments of a copy as one file. Raises OSError."""

    def __init__(self, copy: JournalCopy) -> None:
        self._files = [open(path, "rb", buffering=0) for path in copy.segments]  # noqa: SIM115  (closed by `close`)
        self._sizes = [os.fstat(file.fileno()).st_size for file in self._files]
        self.size = sum(self._sizes)
        head = self.read(0, _READ)
        if (size := header_size(head)) > len(head):
            head = self.read(0, size)
        self.header, self.first = decode_header(head, copy.segments[0])

    def read(self, at: int, size: int) -> bytes:
        parts = []
        for file, length in zip(self._files, self._sizes, strict=True):
            if at < length and size:
                part = os.pread(file.fileno(), size, at)
                parts.append(part)
                size -= len(part)
                at += len(part)
            at -= length
        return b"".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()


def locate(root: Path, copy: JournalCopy) -> JournalPrefix | None:
    """The same history in a journal below `root`: the original, or a copy made of it before; None when there is none.

    Raises JournalCorruptError or OSError when the copy cannot be read.
    """
    with _Joined(copy) as joined:
        frames = _walk(joined.read, joined.first, None)[1]
        wanted = _identity(joined.header)
    for path in find_journals(root):
        try:
            with JournalReader.open(path) as reader:
                if _identity(reader.header) != wanted:
                    continue
            return journal_prefix(path, frames - 1)
        except (JournalCorruptError, OSError):
            continue  # damaged, or it lost its end: then it is not what we look for
    return None


def bring_back(copies: Sequence[JournalCopy], root: Path, like: JournalHeader, directory: Callable[[str], Path]) -> list[Path]:
    """Makes journals below `root` of those `copies` that have no equal there; returns the new ones.

    They go where the journal with the header `like` goes. `directory` makes a run directory for a run id. Raises OSError,
    JournalCorruptError.
    """
    made = []
    for copy in copies:
        if locate(root, copy) is not None:
            continue
        with _Joined(copy) as joined:
            header = msgspec.structs.replace(
                joined.header,
                entity=like.entity,
                online=like.online,
                base_url=like.base_url,
                data_dir=like.data_dir,
                host=like.host,
                copied=True,
            )
            path = directory(header.run_id) / f"{header.writer}.a{header.attempt}{SUFFIX}"
            part = path.with_suffix(".part")
            with part.open("xb") as file:
                file.write(encode_header(header))
                at = joined.first
                while data := joined.read(at, _CHUNK):
                    file.write(data)
                    at += len(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)  # whole, or not there: a shipper may be looking
        made.append(path)
    return made


def _identity(header: JournalHeader) -> tuple[str, str, int, str, str]:
    return header.project, header.run_id, header.attempt, header.nonce, header.writer


def _reading(path: Path) -> Read:
    def read(at: int, size: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, at)

    return read


def _walk(read: Read, at: int, count: int | None) -> tuple[int, int]:
    """Walks over at most `count` whole frames from offset `at` by their lengths alone: (offset behind them, how many)."""
    frames, data, start = 0, b"", at
    while count is None or frames < count:
        if at - start + FRAME_HEAD.size > len(data):
            data, start = read(at, _READ), at
            if len(data) < FRAME_HEAD.size:
                break
        (length, _) = FRAME_HEAD.unpack_from(data, at - start)
        end = at + FRAME_HEAD.size + length
        if length == 0 or (end - start > len(data) and len(read(end - 1, 1)) == 0):
            break
        at, frames = end, frames + 1
    return at, frames
