"""Writing files so that they are there: exclusive creation, checksum on the way, fsync of files and directories.

Everything a checkpoint puts on disk goes through a `FileLayer`; tests inject disk faults by subclassing it.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import xxhash
from typing_extensions import Buffer

from wbdist.checkpoint.manifest import FileEntry


class DigestStream(io.RawIOBase):
    """An append-only file that hashes what passes through. Not seekable: a digest of rewritten bytes would be wrong."""

    def __init__(self, layer: FileLayer, path: Path) -> None:
        super().__init__()
        self._layer = layer
        self._path = path
        self._fd = layer.create(path)
        self._hash = xxhash.xxh3_128()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += self._layer.write(self._fd, view[written:])
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        return self._fd

    def entry(self) -> FileEntry:
        """Size and digest of what was written so far."""
        return FileEntry(self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Makes the file durable, then closes it. Idempotent."""
        if not self.closed:
            try:
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
        """Makes the names in `path` durable, not only the files behind them."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Refuses to replace a directory that holds anything (ENOTEMPTY)."""
        old.rename(new)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    @contextmanager
    def writing(self, path: Path) -> Generator[DigestStream, None, None]:
        """A stream into a new file; durable when the block ends without an error."""
        stream = DigestStream(self, path)
        try:
            yield stream
            stream.close()
        finally:
            stream.abandon()
