"""Writing files so that they are there: exclusive creation, checksum on the way, fsync of files and directories.

Everything a checkpoint puts on disk goes through a `FileLayer`; tests inject disk faults by subclassing it.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import xxhash
from typing_extensions import Buffer

from wbdist.checkpoint.manifest import FileEntry
from wbdist.disk import sync_directory

_BUFFER = 1 << 18
_DIRECT = 1 << 20
"""Bytes from which on a file goes past the page cache."""
_BLOCK = 4096
_CHUNK = 16 << 20


Ready = Callable[[Path, int], None]


def _at_once(_: Path, __: int) -> None:
    """The data is there."""


class DigestStream(io.RawIOBase):
    """An append-only file that hashes what passes through. Not seekable: a digest of rewritten bytes would be wrong."""

    def __init__(self, layer: FileLayer, path: Path) -> None:
        super().__init__()
        self._layer = layer
        self._path = path
        self._fd = layer.create(path)
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self._buffer = bytearray()
        """Small writes, gathered: torch's file format makes a dozen for each tensor."""
        self.failure: OSError | None = None
        """The first write that failed: torch's C++ writer does not pass it on, but reports an internal error of its own."""

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _BUFFER:
            self._buffer += view
            if len(self._buffer) >= _BUFFER:
                self._flush()
        else:
            self._flush()
            self._write(view)
        self._size += len(view)
        return len(view)

    def _flush(self) -> None:
        with memoryview(self._buffer) as view:
            self._write(view)
        self._buffer.clear()

    def _write(self, view: memoryview) -> None:
        written = 0
        try:
            while written < len(view):
                written += self._layer.write(self._fd, view[written:])
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._hash.update(view)

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        return self._fd

    def entry(self) -> FileEntry:
        """Size and digest of the whole file, once it is closed."""
        return FileEntry(self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Makes the file durable, then closes it. Idempotent."""
        if not self.closed:
            try:
                self._flush()
                self._layer.sync_file(self._fd)
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Closes without any promise about the content."""
        if not self.closed:
            super().close()
            os.close(self._fd)


class FileLayer:
    """The system calls of a save, in the order in which they happen. Raises OSError as the system does."""

    def make_directory(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """A new file, never an existing one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def sync_file(self, fd: int) -> None:
        os.fsync(fd)

    def sync_directory(self, path: Path) -> None:
        sync_directory(path)

    def rename(self, old: Path, new: Path) -> None:
        """Refuses to replace a directory that holds anything (ENOTEMPTY)."""
        old.rename(new)

    def link(self, old: Path, new: Path) -> None:
        """A second name for the same file."""
        os.link(old, new)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def store(self, path: Path, data: memoryview) -> FileEntry:
        """One new file; see `store_all`."""
        return self.store_all({path: data})[path]

    def store_all(self, files: Mapping[Path, memoryview], ready: Ready = _at_once) -> dict[Path, FileEntry]:
        """New files, all durable when this returns. Any thread; holds the GIL for microseconds only.

        `ready(path, size)` returns once the first `size` bytes of that file's data may be read; what it raises ends this.
        All are written before the first is synced: what one sync makes the file system do serves the others.

        Big data in page-aligned memory goes to the disk as it is, past the page cache: written and synced through it, the
        same bytes cost five times the processor time, which training would miss (docs/adr/0004). Digests are made beside it.
        """
        digests = _Digests(files, ready)
        digests.start()
        opened: list[int] = []
        try:
            for path, data in files.items():
                opened.append(self.create(path))
                self._write_file(opened[-1], data, partial(ready, path))
            for fd in opened:
                self.sync_file(fd)
        finally:
            for fd in opened:
                os.close(fd)
        return {path: FileEntry(len(data), digests.of(path)) for path, data in files.items()}

    def _write_file(self, fd: int, data: memoryview, ready: Callable[[int], None]) -> None:
        aligned = len(data) // _BLOCK * _BLOCK
        if len(data) >= _DIRECT and _bypass_cache(fd, True):
            self._write_all(fd, data, 0, aligned, ready)
            _bypass_cache(fd, False)
        else:
            aligned = 0
        self._write_all(fd, data, aligned, len(data), ready)

    def _write_all(self, fd: int, data: memoryview, start: int, end: int, ready: Callable[[int], None]) -> None:
        while start < end:
            upto = min(start + _CHUNK, end)
            ready(upto)
            try:
                written = self.write(fd, data[start:upto])
            except OSError as error:
                # Some file systems take the flag and refuse the blocks.
                if error.errno != errno.EINVAL or not _bypass_cache(fd, False):
                    raise
                continue
            start += written
            if written % _BLOCK and start < end:  # the disk is nearly full: what follows is no longer aligned
                _bypass_cache(fd, False)

    @contextmanager
    def writing(self, path: Path) -> Generator[DigestStream, None, None]:
        """A stream into a new file; durable when the block ends without an error."""
        stream = DigestStream(self, path)
        try:
            yield stream
            if stream.failure is None:
                stream.close()
        finally:
            stream.abandon()
            if stream.failure is not None:
                raise stream.failure


class _Digests(threading.Thread):
    """Hashes while the disk writes; both let go of the GIL."""

    def __init__(self, files: Mapping[Path, memoryview], ready: Ready) -> None:
        super().__init__(name="wbdist-digest", daemon=True)
        self._files = files
        self._ready = ready
        self._found: dict[Path, str] = {}
        self._failure: Exception | None = None

    def run(self) -> None:
        try:
            for path, data in self._files.items():
                self._ready(path, len(data))
                self._found[path] = xxhash.xxh3_128_hexdigest(data)
        except Exception as error:  # noqa: BLE001  (raised by `of`)
            self._failure = error

    def of(self, path: Path) -> str:
        self.join()
        if self._failure is not None:
            raise self._failure
        return self._found[path]


def _bypass_cache(fd: int, wanted: bool) -> bool:
    """Switches O_DIRECT; False where the file system has none, or where nothing was to be changed."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    changed = flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT
    if changed == flags:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, changed)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
