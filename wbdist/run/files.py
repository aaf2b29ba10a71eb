"""`Run.save`: which files a run keeps. The contents are set aside here, the shipper brings them to the server.

Every version is a FILE record of the journal, and so a line of the stream `files`. What it says is *snapshotted* below the
run's directory before the record is written, so that neither the script, which goes on writing its file, nor a kill in the
middle of that can spoil a version: blocks are shared where the file system can, else the file is copied. Only a live file
that is too large for that (`LIVE_COPY`) is read where it lies.
"""

from __future__ import annotations

import glob as globbing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Final

import msgspec

from wbdist.run.journal_format import Kind
from wbdist.run.snapshots import Key, key_of, place, snapshot

if TYPE_CHECKING:
    from wbdist.run.journal import JournalWriter

POLICIES: Final = ("live", "now", "end")
STAGED: Final = "staged"
"""Directory of the snapshots, beside `files`."""
LIVE_COPY: Final = 64 << 20
"""Bytes. A live file that is larger and whose blocks cannot be shared is not copied at each `save`."""
KEPT: Final = 256 << 20
"""Bytes of older versions of one file that wait for the shipper; beyond it the oldest are given up for newer ones."""


class FileRecord(msgspec.Struct, omit_defaults=True):
    """Payload of a FILE record: one version of one file of the run."""

    path: str
    """Where its contents lie: a snapshot, or the file itself."""
    name: str
    """In the run: relative, with `/`."""
    policy: str
    source: str = ""
    """The file that `save` was given."""
    key: Key | None = None
    """Of the source when the contents were set aside; None: they were not, `path` is read when its time has come."""
    step: int | None = None
    """The row that was open then, else the last one."""


class _Saved(msgspec.Struct):
    source: Path
    policy: str
    key: Key | None = None
    kept: list[tuple[Path, int]] = []
    """Snapshots and their sizes, oldest first."""


class SavedFiles:
    """The files of one run in the process that writes it. Thread-safe; copying never holds up who logs rows meanwhile."""

    def __init__(
        self, journal: JournalWriter, directory: Path, say: Callable[[str], None], ignored: Sequence[str] = ()
    ) -> None:
        """`directory`: the run's, which holds `files`. `ignored`: patterns of names that are no files of the run."""
        self._journal = journal
        self._files = directory / "files"
        self._staged = directory / STAGED
        self._say = say
        self._ignored = ignored
        self._lock = threading.RLock()
        self._saved: dict[str, _Saved] = {}
        self._said: set[str] = set()
        self.count = 0
        """Lines of the stream `files` that this journal has."""

    def save(
        self, pattern: str | bytes | os.PathLike[str], base_path: str | os.PathLike[str] | None, policy: str, glob: bool
    ) -> list[str]:
        """See `Run.save`."""
        text = os.fsdecode(pattern)
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is not one of: {', '.join(POLICIES)}")
        if text.startswith(("gs://", "s3://")):
            self._say(
                f"save({text!r}): an object store's address cannot be saved; give a local file, or log a reference artifact"
            )
            return []
        base = self._base(PurePath(text), base_path)
        path = _absolute(text)
        if not path.is_relative_to(base):
            raise ValueError(f"save({text!r}): base_path {str(base)!r} must be a directory above it")
        if path == base:
            raise ValueError(f"save({text!r}): base_path {str(base)!r} must not be the very path; give a directory above it")
        below = path.relative_to(base)
        if below.parts[0] == "*":
            raise ValueError(
                f"save({text!r}): a pattern may not begin with '*' below its base {str(base)!r}; give a base_path further up"
            )
        targets = []
        for source in _matches(path, glob):
            target = self._files / source.relative_to(base)
            try:
                self._keep(source, target, policy)
            except OSError as error:
                self._say(f"{source} cannot be kept with the run: {error}")
            else:
                targets.append(str(target))
        return targets

    def add(self, name: str) -> None:
        """A file that lies in the files directory already, and is not written again, is one of the run."""
        if not self._is_ignored(name):
            self._put(FileRecord(str(self._files / name), name, "now"))

    def at_finish(self) -> None:
        """What `end` and `live` files hold now becomes their last version. A file that fails is said, and fails no other."""
        for name, saved in self._saved.items():
            if saved.policy == "now":
                continue
            try:
                if key_of(saved.source.stat()) != saved.key:
                    self._version(name, saved, last=True)
            except FileNotFoundError:
                if saved.key is None:
                    self._say(f"{saved.source} is gone, so the run has no {name}")
            except OSError as error:
                self._say(f"{saved.source} cannot be kept with the run: {error}")

    def _base(self, path: PurePath, base_path: str | os.PathLike[str] | None) -> PurePath:
        if base_path is not None:
            return _absolute(base_path)
        if not path.is_absolute():
            return PurePath(Path.cwd())
        whole = _absolute(path)
        if whole.is_relative_to(self._files):
            return self._files
        self._once(
            f"save({str(path)!r}) keeps one directory of an absolute path; for more give base_path, e.g. "
            'save("/mnt/folder/file.h5", base_path="/mnt")'
        )
        return whole.parent.parent

    def _keep(self, source: Path, target: Path, policy: str) -> None:
        name = target.relative_to(self._files).as_posix()
        if not place(source, target) and policy == "live":
            self._once(f"{source} can only be copied to {target}: later changes of it are not noticed")
            policy = "now"
        if self._is_ignored(name):
            return
        with self._lock:
            saved = self._saved.get(name)
            if saved is None or saved.source != source:
                saved = self._saved[name] = _Saved(source, policy, kept=saved.kept if saved else [])
            elif saved.policy == policy != "end" and saved.key == key_of(source.stat()):
                return
            saved.policy = policy
            if policy != "end":
                self._version(name, saved)
            elif saved.key is None:
                self._put(FileRecord(str(source), name, policy, str(source)))  # in case that nobody comes to finish

    def _is_ignored(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._ignored)

    def _version(self, name: str, saved: _Saved, *, last: bool = False) -> None:
        with self._lock:
            staged = self._stage(saved, last=last)
            saved.key = key_of(saved.source.stat()) if staged is None else staged[1]
            key = None if staged is None else staged[1]
            path = saved.source if staged is None else staged[0]
            policy = "now" if last and staged is not None else saved.policy
            self._put(FileRecord(str(path), name, policy, str(saved.source), key))
            if staged is not None:
                self._thin(saved, staged[0], staged[1][2])

    def _stage(self, saved: _Saved, *, last: bool) -> tuple[Path, Key] | None:
        """A snapshot of the source and the key of what it holds; None when the file is to be read where it lies."""
        self._staged.mkdir(exist_ok=True)
        target = self._staged / f"{self._journal.path.name}.{self.count}"
        key = snapshot(saved.source, target, None if saved.policy == "now" else LIVE_COPY)
        if key is None and last:
            # Not against writing in place, but against what scripts do at their end: removing and replacing.
            try:
                os.link(saved.source.resolve(), target)
                key = key_of(target.stat())
            except OSError:
                return None
        return None if key is None else (target, key)

    def _thin(self, saved: _Saved, path: Path, size: int) -> None:
        saved.kept.append((path, size))
        while len(saved.kept) > 1 and sum(size for _, size in saved.kept) - size > KEPT:
            saved.kept.pop(0)[0].unlink(missing_ok=True)

    def _put(self, record: FileRecord) -> None:
        with self._journal.lock:
            rule = self._journal.rule
            record.step = rule.step if rule.open else rule.last_step
            self._journal.append(Kind.FILE, msgspec.to_builtins(record))
            self.count += 1

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def _absolute(path: str | os.PathLike[str]) -> PurePath:
    """Without `..`, symbolic links as they are: they are part of the name that was given."""
    return PurePath(os.path.abspath(path))  # noqa: PTH100


def _matches(path: PurePath, glob: bool) -> Iterator[Path]:
    """The files (no directories) that match now, in order."""
    # Not Path.glob, which would need the pattern split from its root.
    found = sorted(globbing.glob(str(path))) if glob else [str(path)]  # noqa: PTH207
    for match in map(Path, found):
        if match.is_file():
            yield match
