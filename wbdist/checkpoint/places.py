"""Where checkpoints lie, for who looks at them from outside a job: a directory or an object store. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from wbdist.checkpoint import manifest as manifests
from wbdist.checkpoint import retention
from wbdist.checkpoint.claim import holder
from wbdist.checkpoint.copies import Copies, is_url
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import QUARANTINE, TEMPORARY, Broken, Manifest
from wbdist.errors import CheckpointError, UsageError


class Place(Protocol):
    """Checkpoints of one job. Every method raises CheckpointError when the place does not answer."""

    def scan(self) -> tuple[list[Manifest], list[Broken]]:
        """The committed checkpoints and those with a broken manifest, newest first."""

    def missing(self, manifest: Manifest) -> list[str]:
        """What is wrong with the files' presence and sizes. Cheap; their content is not read."""

    def verify(self, manifest: Manifest) -> None:
        """Reads every file. Raises CheckpointCorruptError."""

    def in_use(self) -> dict[str, str]:
        """Checkpoints that a living job needs -> what for. On an object store nobody knows who lives: none."""

    def remove(self, manifest: Manifest) -> bool:
        """Whether it is gone."""

    def at_hand(self, manifest: Manifest) -> AbstractContextManager[Path]:
        """A directory with its files, for the `with` block."""

    def put_away(self) -> list[str]:
        """Names of what is quarantined."""

    def unfinished(self) -> list[str]:
        """Names of what is being written or removed, or was when a process died."""


def place(text: str) -> Place:
    """The place that a command line names. Raises UsageError for a directory that is not there."""
    if is_url(text):
        return Store(Copies(text))
    if not Path(text).is_dir():
        raise UsageError(f"{text!r} is not a directory, nor an object store's address such as s3://bucket/jobs/digits")
    return Directory(Path(text))


class Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def scan(self) -> tuple[list[Manifest], list[Broken]]:
        return manifests.scan(self._path)

    def missing(self, manifest: Manifest) -> list[str]:
        sizes = {name: path.stat().st_size for name in manifest.files if (path := Path(manifest.directory) / name).is_file()}
        return _misfits(manifest, sizes)

    def verify(self, manifest: Manifest) -> None:
        manifests.verify(manifest)

    def in_use(self) -> dict[str, str]:
        if (held := holder(self._path)) is None:
            return {}
        attempt, who = held
        there = manifests.committed(self._path)
        # A job starts from the newest that there is, and attempts before its own make no more.
        base = next((manifest for manifest in there if manifest.attempt < attempt or not attempt), None)
        needed = {} if base is None else {base.name: f"the job {who} started from it"}
        return needed | {manifest.name: f"the job {who} would go on from it after a failure" for manifest in there[:1]}

    def remove(self, manifest: Manifest) -> bool:
        return retention.remove(FileLayer(), manifest)

    @contextmanager
    def at_hand(self, manifest: Manifest) -> Iterator[Path]:
        yield Path(manifest.directory)

    def put_away(self) -> list[str]:
        return sorted(path.name for path in (self._path / QUARANTINE).glob("step-*"))

    def unfinished(self) -> list[str]:
        return sorted(path.name for path in self._path.glob(f"step-*{TEMPORARY}"))


class Store:
    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    def scan(self) -> tuple[list[Manifest], list[Broken]]:
        return self._copies.scan()

    def missing(self, manifest: Manifest) -> list[str]:
        return _misfits(manifest, self._copies.sizes(manifest.name))

    def verify(self, manifest: Manifest) -> None:
        self._copies.verify(manifest)

    def in_use(self) -> dict[str, str]:
        return {}

    def remove(self, manifest: Manifest) -> bool:
        self._copies.remove(manifest.name)
        return True

    @contextmanager
    def at_hand(self, manifest: Manifest) -> Iterator[Path]:
        with TemporaryDirectory(prefix="wbdist-") as folder:
            try:
                yield self._copies.fetch(manifest, FileLayer(), Path(folder))
            except OSError as error:
                raise CheckpointError(f"{manifest.name} cannot be fetched to {folder}: {error}") from error

    def put_away(self) -> list[str]:
        return self._copies.put_away()

    def unfinished(self) -> list[str]:
        return self._copies.unfinished()


def _misfits(manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    problems = []
    for name, entry in sorted(manifest.files.items()):
        if name not in sizes:
            problems.append(f"{name} is missing")
        elif sizes[name] != entry.size:
            problems.append(f"{name} has {sizes[name]} bytes instead of {entry.size}")
    return problems
