"""The manifest: what a checkpoint holds, and the proof that it is whole.

A checkpoint is a directory `step-<step>.a<attempt>`. It exists if and only if it bears this name and holds a
`manifest.json` that verifies: the name appears by one rename, after everything in it is on disk. The one question "is it
committed?" is answered by `scan` for restore, for retention and for the command line alike.

The manifest carries a digest of itself and of every other file, so that a flipped bit anywhere is found.
No torch here: listing and verifying checkpoints must work on a machine without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from wbdist.checkpoint.best import Best
from wbdist.checkpoint.mapped import windows
from wbdist.core.position import RunPosition
from wbdist.errors import CheckpointCorruptError, CheckpointError

VERSION = 3
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
"""Suffix of directories that are being written or removed; never a checkpoint."""
QUARANTINE = "quarantine"
_NAME = re.compile(r"step-(\d+)\.a(\d+)")
_READERS = min(8, os.cpu_count() or 1)
"""Threads that verify: ranks wrote a file each, and neither one core nor one request keeps a good disk busy."""


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    xxh3: str
    """XXH3-128 of its content, hexadecimal."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a committed checkpoint holds."""

    version: int
    step: int
    attempt: int
    runs: tuple[RunPosition, ...]
    """Where each rank's run stood, by rank. Under strategy `rank0` all are the one shared run."""
    world_size: int
    shared: tuple[str, ...]
    """Names of the objects that all ranks hold alike; saved once, by rank 0, in `shared/`."""
    per_rank: tuple[str, ...]
    """Names of the objects that each rank holds for itself; in `rank-<i>/`."""
    files: dict[str, FileEntry]
    """Path relative to the checkpoint's directory -> what it must be. All files but the manifest."""
    created: float
    """Unix seconds on rank 0's clock."""
    environment: dict[str, str]
    """The surroundings of rank 0 when it was started (`environment.facts`)."""
    kinds: dict[str, str]
    """Name of a tracked object -> name of its class."""
    config_hash: str
    """Of `config`, in normal form (`changes.digest`)."""
    best: Best | None = None
    """The best value of the metric that the job saves by, as of this step."""
    reason: str = ""
    """Why it was saved, for people: 'interval', 'preemption', ..."""
    config: dict[str, Any] = {}
    """What the job was started with, as far as it told."""
    set_later: dict[str, Any] = {}
    """What rank 0's run had in its config besides, or instead, at the save."""
    host: str = ""
    directory: str = ""
    """Where this checkpoint lies; filled on reading, not stored."""

    @property
    def run(self) -> RunPosition:
        """Rank 0's run: the job's one run under strategy `rank0`."""
        return self.runs[0]

    @property
    def torch(self) -> str:
        """Version that wrote it."""
        return self.environment.get("torch", "")

    @property
    def name(self) -> str:
        """The directory's name: `step-<step>.a<attempt>`."""
        return directory_name(self.step, self.attempt)

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())


class _Sealed(msgspec.Struct, frozen=True):
    xxh3: str
    manifest: msgspec.Raw


class _Versioned(msgspec.Struct, frozen=True):
    version: int


class Broken(msgspec.Struct, frozen=True):
    """A directory named like a checkpoint whose manifest cannot be read or does not verify."""

    directory: str
    step: int
    attempt: int
    problem: str


def directory_name(step: int, attempt: int) -> str:
    """The name of the committed checkpoint of `step` made in `attempt`."""
    return f"step-{step}.a{attempt}"


def seal(manifest: Manifest) -> bytes:
    """The content of `manifest.json`."""
    body = msgspec.json.encode(msgspec.structs.replace(manifest, directory=""))
    return msgspec.json.encode(_Sealed(xxhash.xxh3_128_hexdigest(body), msgspec.Raw(body)))


def read(directory: Path) -> Manifest:
    """The manifest in `directory`, its own digest checked (the other files' are not; see `verify`).

    Raises CheckpointCorruptError saying what is wrong with it, CheckpointError when another version of wbdist wrote it.
    """
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error}") from error
    return parse(raw, directory.name, str(directory))


def parse(raw: bytes, name: str, directory: str) -> Manifest:
    """The manifest of the checkpoint `name` from the content of its `manifest.json`; `directory` is where it lies.

    Raises as `read` does.
    """
    path = f"{directory}/{MANIFEST}"
    try:
        sealed = msgspec.json.decode(raw, type=_Sealed)
        # Byte equality with our own encoding: nothing outside the digest's reach can differ either.
        if xxhash.xxh3_128_hexdigest(bytes(sealed.manifest)) != sealed.xxh3 or msgspec.json.encode(sealed) != raw:
            raise CheckpointCorruptError(f"{path} does not match its own digest: it was damaged after it was written")
        version = msgspec.json.decode(sealed.manifest, type=_Versioned).version
        if version != VERSION:
            # Whole, but not ours to judge: quarantining it would take a newer program's work away.
            raise CheckpointError(
                f"{path} has format version {version}; this wbdist reads {VERSION}. Use the wbdist that wrote it."
            )
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointCorruptError(f"{path} is not a manifest: {error}") from error
    if manifest.name != name:
        raise CheckpointCorruptError(f"{path} says it belongs to {manifest.name!r}, but lies in {name!r}")
    if len(manifest.runs) != manifest.world_size:
        raise CheckpointCorruptError(f"{path} tells the positions of {len(manifest.runs)} ranks of {manifest.world_size}")
    return msgspec.structs.replace(manifest, directory=directory)


def scan(directory: Path) -> tuple[list[Manifest], list[Broken]]:
    """Every committed checkpoint in `directory`, newest first, and every one whose manifest is broken, newest first.

    Newest is by (attempt, step): a new attempt's history replaces what an older one did after it, so its checkpoints win
    even against a higher step that a forgotten older attempt still managed to commit. Reads manifests only; nothing is
    verified beyond them. A directory that does not exist holds none. Raises CheckpointError when it cannot be listed.
    """
    good: list[Manifest] = []
    bad: list[Broken] = []
    try:
        entries = [entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise CheckpointError(f"checkpoints in {str(directory)!r} cannot be listed: {error}") from error
    for name in entries:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        try:
            good.append(read(directory / name))
        except CheckpointCorruptError as error:
            bad.append(Broken(str(directory / name), int(match[1]), int(match[2]), str(error)))
    good.sort(key=newest_first)
    bad.sort(key=newest_first)
    return good, bad


def newest_first(found: Manifest | Broken) -> tuple[int, int]:
    """Sorts checkpoints, the newest first."""
    return (-found.attempt, -found.step)


def parse_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's name, None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]))


def committed(directory: str | os.PathLike[str]) -> list[Manifest]:
    """The committed checkpoints in `directory`, newest first. Any process, any time; see `scan`."""
    return scan(Path(directory))[0]


def verify(manifest: Manifest, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Reads every file of a committed checkpoint, of those `wanted` by name, and compares size and digest.

    Any process; blocks for as long as reading takes. Raises CheckpointCorruptError that lists every file that is
    missing, of another size, or of another content.
    """
    files = sorted(item for item in manifest.files.items() if wanted(item[0]))
    with ThreadPoolExecutor(_READERS, "wbdist-verify") as readers:
        found = readers.map(lambda item: _problem(Path(manifest.directory), *item), files)
        problems = [problem for problem in found if problem]
    if problems:
        raise CheckpointCorruptError(f"checkpoint {manifest.directory} is damaged: {'; '.join(problems)}")


def _problem(directory: Path, name: str, expected: FileEntry) -> str:
    """What is wrong with a file; empty for nothing."""
    path = directory / name
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        if digest(path) != expected.xxh3:
            return f"{name} has another content than was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return ""


def digest(path: Path) -> str:
    """XXH3-128 of a file, hexadecimal."""
    hasher = xxhash.xxh3_128()
    for window in windows(path):
        hasher.update(window)
    return hasher.hexdigest()
