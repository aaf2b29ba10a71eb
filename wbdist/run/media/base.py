"""What all media have in common: a record in the row, and mostly a file beside the run that the record names."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from wbdist.errors import UsageError


class Place:
    """Where one value's files go: W&B's `media/<folder>/<key>_<step>_<digest><suffix>` below the run's files."""

    def __init__(self, files: Path, key: str, step: int | str, written: dict[str, Path]) -> None:
        """`written` gets name -> path of each file that is there."""
        self._files = files
        self._key = _as_path(key)
        self._step = step
        self._written = written

    def put(self, folder: str, suffix: str, content: bytes | Path) -> dict[str, Any]:
        """Keeps the content; `path`, `sha256` and `size` of the record. A file of that name is always whole. Raises OSError."""
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else _digest(content)
        name = f"media/{folder}/{self._key}_{self._step}_{digest[:20]}{suffix}"
        path = self._files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        if isinstance(content, bytes):
            fresh.write_bytes(content)
        else:
            shutil.copyfile(content, fresh)
        fresh.replace(path)
        self._written[name] = path
        return {"sha256": digest, "size": path.stat().st_size, "path": name}


class Media(ABC):
    """A value of `log` or of the summary that is kept in files. Reusable: each `log` makes files of its own."""

    needs_files: ClassVar[bool] = True
    many: ClassVar[str] = ""
    """`_type` of a list of these; empty: a list of them is a list of records."""

    @abstractmethod
    def record(self, place: Place) -> dict[str, Any]:
        """Writes the files and returns what stands in the row. Raises OSError."""

    @classmethod
    def records(cls, values: list[Any], place: Place) -> Any:
        """What stands in the row for a list of these."""
        return [value.record(place) for value in values]


def existing(path: str | os.PathLike[str], what: str) -> Path:
    found = Path(path)
    if not found.is_file():
        raise UsageError(f"{what}: there is no file {os.fspath(path)!r}")
    return found


def _as_path(key: str) -> str:
    """A key may have directories (`val/image`), and only downwards."""
    return "/".join(part for part in key.replace("\\", "/").split("/") if part not in {"", ".", ".."}) or "media"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
