"""Bytes of files on this machine's disk, each content once, under its SHA-256.

No name of a client ever becomes a path of ours, so neither `..`, nor case, nor `a` beside `a/b` needs a rule. Bytes are written
to a file without meaning, synced, and renamed into place; only then may a row of the store name them. A content that no row
came to name (the process was killed in between) is found there by the next upload of the same.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from wbdist.disk import sync_directory

_MAX_NAME = 1024
_ABANDONED = 86400.0
"""Seconds after which a file in `tmp` is nobody's: no address for an upload is good for longer."""


class FullDiskError(Exception):
    """There is no space for a file; nothing of it was kept."""


class Content(msgspec.Struct, frozen=True):
    """Bytes that lie on disk, synced."""

    sha256: str
    md5: str
    """Base64, as W&B gives it."""
    size: int


def normal_name(name: str) -> str:
    """A run file's name in its one form: relative, '/' between parts; `./x` is `x`. Raises ValueError for no name at all."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in {"", "."}]
    if not parts or ".." in parts or name.startswith("/") or any(ord(char) < 32 for char in name) or len(name) > _MAX_NAME:
        raise ValueError(f"{name[:100]!r} cannot name a run's file: use a relative path, at most {_MAX_NAME} characters")
    return "/".join(parts)


class FileStore:
    """Thread-safe, also for several processes on one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / "tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)
        for left in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _ABANDONED:
                    left.unlink()

    def path(self, sha256: str) -> Path:
        """Where a content lies."""
        return self._root / "blobs" / sha256[:2] / sha256

    def touch(self, sha256: str) -> bool:
        """Whether a content is there; it then counts as received now."""
        with self._locked(fcntl.LOCK_SH):
            try:
                os.utime(self.path(sha256))
            except FileNotFoundError:
                return False
        return True

    def contents(self) -> Iterator[str]:
        """The SHA-256 of every content, in no order."""
        for folder in sorted((self._root / "blobs").glob("??")):
            for path in folder.iterdir():
                yield path.name

    def remove(self, sha256: str, before: float, *, dry_run: bool = False) -> int | None:
        """Removes a content that was last received before `before` (Unix seconds): its size; None when it stays."""
        path = self.path(sha256)
        with self._locked(fcntl.LOCK_EX):  # nobody is told meanwhile that it is there
            try:
                facts = path.stat()
            except FileNotFoundError:
                return None
            if facts.st_mtime >= before:
                return None
            if not dry_run:
                path.unlink()
        return facts.st_size

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Between those that find a content there and those that remove it, of any process; microseconds."""
        descriptor = os.open(self._root / "contents.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    def writer(self) -> ContentWriter:
        """Receives a content. Raises FullDiskError."""
        with _full_disk():
            return ContentWriter(self, self._temporary / secrets.token_hex(12))


class ContentWriter:
    """Context manager: leaving it removes what was written, unless it was kept."""

    def __init__(self, store: FileStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._file = path.open("xb")
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Appends; blocks on the disk. Raises FullDiskError."""
        with _full_disk():
            self._file.write(chunk)
        self._md5.update(chunk)
        self._sha256.update(chunk)
        self.size += len(chunk)

    def keep(self) -> Content:
        """The bytes are on disk, also after a power cut, when this returns. Raises FullDiskError."""
        content = Content(self._sha256.hexdigest(), base64.b64encode(self._md5.digest()).decode(), self.size)
        if self._store.touch(content.sha256):
            return content
        place = self._store.path(content.sha256)
        with _full_disk():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            place.parent.mkdir(parents=True, exist_ok=True)
            self._path.replace(place)
            sync_directory(place.parent)
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What a full disk keeps in the buffer is not wanted any more.
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise FullDiskError(
            f"the server's disk for files is full ({error.strerror}), and nothing of this file was stored: free space"
        ) from error
