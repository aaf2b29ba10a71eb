"""Files of runs, on this machine's disk.

A file is a blob of its own plus a small record that names it; renaming the record into place is the commit, so a reader
sees the old or the new file whole, and a torn upload is never visible. Blobs have random names: no file name of a client
ever becomes a path of ours, so neither `..`, nor case, nor `a` beside `a/b` needs a rule.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import mimetypes
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

_MAX_NAME = 1024


class FileRecord(msgspec.Struct, frozen=True):
    name: str
    blob: str
    size: int
    md5: str
    """Base64, as W&B gives it."""
    mimetype: str
    updated_at: float


def normal_name(name: str) -> str:
    """A run file's name in its one form: relative, '/' between parts; `./x` is `x`. Raises ValueError for no name at all."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in {"", "."}]
    if not parts or ".." in parts or name.startswith("/") or any(ord(char) < 32 for char in name) or len(name) > _MAX_NAME:
        raise ValueError(f"{name[:100]!r} cannot name a run's file: use a relative path, at most {_MAX_NAME} characters")
    return "/".join(parts)


class FileStore:
    """Thread-safe: every write is a rename. Runs are told apart by their key in the store."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def get(self, run: int, name: str) -> FileRecord | None:
        """The file as it is now, None when there is none."""
        try:
            return msgspec.json.decode(self._record_path(run, name).read_bytes(), type=FileRecord)
        except FileNotFoundError:
            return None

    def list(self, run: int) -> list[FileRecord]:
        """All files of a run, by name."""
        found = []
        for path in self._folder(run).glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                found.append(msgspec.json.decode(path.read_bytes(), type=FileRecord))
        return sorted(found, key=lambda record: record.name)

    def path(self, run: int, record: FileRecord) -> Path:
        """Where the bytes lie; a replaced file's bytes are gone from there."""
        return self._folder(run) / record.blob

    def writer(self, run: int, name: str) -> FileWriter:
        """Receives a new version of `name` (in its normal form)."""
        folder = self._folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        return FileWriter(self, run, name, folder / f"{secrets.token_hex(12)}.blob")

    def commit(self, run: int, record: FileRecord) -> None:
        """Makes `record` the current version; its blob must be on disk. The version before it is removed."""
        old = self.get(run, record.name)
        target = self._record_path(run, record.name)
        temporary = target.with_suffix(f".{secrets.token_hex(6)}.tmp")
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.replace(target)
        if old is not None and old.blob != record.blob:
            # A reader that has just opened it keeps reading: the open file outlives its name.
            self.path(run, old).unlink(missing_ok=True)

    def _folder(self, run: int) -> Path:
        return self._root / str(run)

    def _record_path(self, run: int, name: str) -> Path:
        return self._folder(run) / (hashlib.sha256(name.encode()).hexdigest()[:40] + ".json")


class FileWriter:
    """Context manager: leaving it without `commit` removes what was written."""

    def __init__(self, store: FileStore, run: int, name: str, path: Path) -> None:
        self._store = store
        self._run = run
        self._name = name
        self._path = path
        self._file = path.open("xb")
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._committed = False
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Appends; blocks on the disk."""
        self._file.write(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)

    def commit(self, now: float) -> FileRecord:
        """The file is on disk and visible when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        record = FileRecord(
            name=self._name,
            blob=self._path.name,
            size=self.size,
            md5=base64.b64encode(self._md5.digest()).decode(),
            mimetype=mimetypes.guess_type(self._name)[0] or "application/octet-stream",
            updated_at=now,
        )
        self._store.commit(self._run, record)
        self._committed = True
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if not self._committed:
            self._path.unlink(missing_ok=True)
