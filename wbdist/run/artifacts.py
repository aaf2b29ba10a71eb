"""`Artifact`: a named, versioned set of files, made here and logged by a run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import msgspec

from wbdist.core import ids
from wbdist.errors import UsageError
from wbdist.protocol.artifacts import Manifest, ManifestEntry
from wbdist.run.absent import AbsentOfArtifact
from wbdist.run.downloads import digest
from wbdist.run.restoring import normal_name

if TYPE_CHECKING:
    from wbdist.run.artifact_logging import Logged
    from wbdist.run.artifacts_api import UsedArtifact

_NAME = re.compile(r"[A-Za-z0-9_\-.]{1,128}")


class LocalEntry(msgspec.Struct):
    """A file that an artifact will have."""

    path: Path | None
    """None: a reference."""
    ref: str | None = None
    immutable: bool = False


class Artifact(AbsentOfArtifact):
    """Files under one name, to be logged with `run.log_artifact`: the server then gives them the next version number.

    Files are read when the artifact is logged; a run sets them aside then, so that they may change or go afterwards. What is
    logged cannot be changed any more. One thread at a time.
    """

    def __init__(self, name: str, type: str, description: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Raises ValueError for a name or type that cannot be, TypeError for metadata that is no JSON."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"artifact name {name!r} must be 1 to 128 letters, digits, dashes, underscores and dots")
        if not type or "/" in type or ":" in type:
            raise ValueError(f"artifact type {type!r} must be a word without / and :")
        self._name = name
        self.type = type
        self.description = description
        self.metadata: dict[str, Any] = dict(metadata or {})
        json.dumps(self.metadata)
        self.client_id = ids.id_from_entropy(os.urandom(64), 32)
        self._entries: dict[str, LocalEntry] = {}
        self._new: tempfile.TemporaryDirectory[str] | None = None
        self._logged: Logged | None = None

    # Making -------------------------------------------------------------------------------------------

    def add_file(self, local_path: str | os.PathLike[str], name: str | None = None, *, policy: str = "mutable") -> None:
        """One file, named as it is called, or `name`. `policy="immutable"`: nobody will write into this file, so that it needs
        no copy where blocks cannot be shared. Raises ValueError when it is no file."""
        path = Path(local_path).absolute()
        if not path.is_file():
            raise ValueError(f"add_file({str(local_path)!r}): there is no such file; a directory is added with add_dir")
        if policy not in {"mutable", "immutable"}:
            raise ValueError(f"policy {policy!r} is not one of: mutable, immutable")
        self._add(name or path.name, LocalEntry(path, immutable=policy == "immutable"))

    def add_dir(self, local_path: str | os.PathLike[str], name: str | None = None, *, policy: str = "mutable") -> None:
        """All files below a directory, named by their paths below it, in `name` if given. Raises ValueError."""
        root = Path(local_path).absolute()
        if not root.is_dir():
            raise ValueError(f"add_dir({str(local_path)!r}): there is no such directory; a file is added with add_file")
        for path in sorted(root.rglob("*")):
            if path.is_file():
                below = path.relative_to(root).as_posix()
                self.add_file(path, f"{name.rstrip('/')}/{below}" if name else below, policy=policy)

    def add_reference(self, uri: str | os.PathLike[str], name: str | None = None) -> None:
        """Bytes that are kept elsewhere: `http(s)://`, `s3://`, `gs://`, or `file://`, whose contents are told by their MD5 (a
        directory: each file in it). Nothing is uploaded. Raises ValueError."""
        text = os.fspath(uri)
        parts = urlsplit(text)
        if not parts.scheme:
            raise ValueError(f"add_reference({text!r}): a reference needs a scheme, like https:// or file://")
        if parts.scheme != "file":
            self._add(name or parts.path.rpartition("/")[2] or parts.netloc, LocalEntry(None, text))
            return
        path = Path(unquote(parts.path))
        if not path.exists():
            raise ValueError(f"add_reference({text!r}): there is no such file")
        files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
        for found in files:
            below = found.relative_to(path).as_posix() if found != path else ""
            prefix = name if name is not None or below else path.name
            self._add("/".join(filter(None, (prefix, below))), LocalEntry(None, found.as_uri()))

    @contextlib.contextmanager
    def new_file(self, name: str, mode: str = "x", encoding: str | None = None) -> Iterator[IO[Any]]:
        """A new file to be written in the `with` block. `mode`: as `open`'s. Raises ValueError for a name that is taken."""
        if normal_name(name) in self._entries:
            raise ValueError(f"the artifact has a file {name!r} already")
        if self._new is None:
            self._new = tempfile.TemporaryDirectory(prefix="wbdist-artifact-")
        path = Path(self._new.name) / str(len(self._entries))
        text = None if "b" in mode else encoding or "utf-8"
        with path.open(mode, encoding=text) as file:
            yield file
        self._add(name, LocalEntry(path, immutable=True))

    def remove(self, name: str) -> None:
        """Takes a file, or all below a directory's name, out again. Raises FileNotFoundError."""
        self.check_draft()
        plain = normal_name(name)
        gone = [known for known in self._entries if known == plain or known.startswith(f"{plain}/")]
        if not gone:
            raise FileNotFoundError(f"the artifact has no {name!r}")
        for known in gone:
            del self._entries[known]

    def _add(self, name: str, entry: LocalEntry) -> None:
        self.check_draft()
        self._entries[normal_name(name)] = entry

    def check_draft(self) -> None:
        """Raises UsageError when it is logged."""
        if self._logged is not None:
            raise UsageError(f"artifact {self._name} is logged and cannot be changed: make a new Artifact of the same name")

    # Logged -------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> Artifact:
        """Returns when the server has all of it, and `version` and `aliases` are known.

        Blocks at most `timeout` seconds (None: ten minutes); then DeadlineError. Raises UsageError when it was not logged, or
        was logged offline; CommError when the server refuses it.
        """
        self._seen(timeout)
        return self

    @property
    def name(self) -> str:
        """With its version, `name:v3`, once that is known."""
        known = self._logged.found if self._logged is not None else None
        return self._name if known is None else known.name

    @property
    def version(self) -> str:
        """`v3`. Waits as `wait`."""
        return self._seen().version

    @property
    def aliases(self) -> list[str]:
        """Waits as `wait`."""
        return self._seen().aliases

    @property
    def id(self) -> str:
        """The server's. Waits as `wait`."""
        return self._seen().id

    @property
    def state(self) -> str:
        """DRAFT, PENDING (logged), or COMMITTED (known to be on the server)."""
        if self._logged is None:
            return "DRAFT"
        return "PENDING" if self._logged.found is None else "COMMITTED"

    @property
    def digest(self) -> str:
        """Of names and contents; reads all files of an artifact that is not logged."""
        return self._logged.manifest.digest() if self._logged is not None else self.manifest().digest()

    @property
    def size(self) -> int:
        """Bytes, references left out."""
        contents = self._logged.manifest.contents if self._logged is not None else self.manifest().contents
        return sum(entry.size or 0 for entry in contents.values() if entry.ref is None)

    def download(self, root: str | os.PathLike[str] | None = None) -> str:
        """Of a logged one; see `UsedArtifact.download`. Waits as `wait`."""
        return self._seen().download(root)

    def link(self, target_path: str, aliases: list[str] | None = None) -> None:
        """See `UsedArtifact.link`. Waits as `wait`."""
        self._seen().link(target_path, aliases)

    def _seen(self, timeout: float | None = None) -> UsedArtifact:
        if self._logged is None:
            raise UsageError(f"artifact {self._name} is not logged yet: call run.log_artifact(artifact) first")
        return self._logged.wait(timeout)

    # For who logs it ----------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """As the files are now; reads all of them. Raises OSError."""
        return Manifest({name: described(entry, entry.path) for name, entry in self._entries.items()})

    def entries(self) -> Mapping[str, LocalEntry]:
        return self._entries

    def logged(self, logged: Logged) -> None:
        self._logged = logged
        if self._new is not None:
            self._new.cleanup()
            self._new = None

    def __repr__(self) -> str:
        return f"<Artifact {self.name} ({self.type}, {self.state})>"


def described(entry: LocalEntry, path: Path | None) -> ManifestEntry:
    """The manifest's entry of a file whose contents lie at `path`. Raises OSError."""
    if path is not None:
        return ManifestEntry(digest(path), path.stat().st_size)
    assert entry.ref is not None
    if entry.ref.startswith("file:"):
        there = Path(unquote(urlsplit(entry.ref).path))
        return ManifestEntry(digest(there), there.stat().st_size, ref=entry.ref)
    # Told by its address alone: asking whoever keeps it would make logging depend on the network.
    return ManifestEntry(entry.ref, ref=entry.ref)
