"""Artifacts as the server has them: found by name, downloaded, linked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import msgspec

from wbdist.errors import CommError, UsageError
from wbdist.protocol import artifacts as protocol
from wbdist.protocol.artifacts import Manifest, ManifestEntry, RemoteArtifact
from wbdist.run.absent import AbsentOfArtifact
from wbdist.run.downloads import digest, download
from wbdist.run.restoring import normal_name

if TYPE_CHECKING:
    from wbdist.run.reader import Api


class ArtifactNotFoundError(CommError, ValueError):
    """The server has no such artifact (or this key may not see it)."""


class UsedArtifact(AbsentOfArtifact):
    """One version of an artifact, as the server had it when it was asked. Files are fetched when asked for."""

    def __init__(self, api: Api, found: RemoteArtifact) -> None:
        """Use `Api().artifact` or `run.use_artifact`."""
        self._api = api
        self._found = found
        self._manifest: Manifest | None = None
        self._addresses: dict[str, str] | None = None

    @property
    def id(self) -> str:
        return self._found.id

    @property
    def name(self) -> str:
        """`name:v3`"""
        return f"{self._found.name}:{self.version}"

    @property
    def qualified_name(self) -> str:
        return f"{self._found.entity}/{self._found.project}/{self.name}"

    @property
    def version(self) -> str:
        return f"v{self._found.version}"

    @property
    def entity(self) -> str:
        return self._found.entity

    @property
    def project(self) -> str:
        return self._found.project

    @property
    def type(self) -> str:
        return self._found.type

    @property
    def state(self) -> str:
        return self._found.state

    @property
    def digest(self) -> str:
        return self._found.digest

    @property
    def description(self) -> str:
        return self._found.description

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self._found.metadata)

    @property
    def aliases(self) -> list[str]:
        return list(self._found.aliases)

    @property
    def size(self) -> int:
        return self._found.size

    @property
    def file_count(self) -> int:
        return self._found.file_count

    @property
    def created_at(self) -> str:
        """ISO 8601, UTC."""
        return self._found.created_at

    @property
    def manifest(self) -> Manifest:
        """Which files it has. Raises CommError."""
        if self._manifest is None:
            if not self._found.manifest_url:
                raise CommError(f"artifact {self.qualified_name} has no manifest: it is not complete")
            with TemporaryDirectory(prefix="wbdist-") as folder:
                path = Path(folder) / "manifest.json"
                download(self._found.manifest_url, path, "")
                self._manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        return self._manifest

    def download(self, root: str | os.PathLike[str] | None = None) -> str:
        """All files, in `root` (default `<name>:<version>` in `./artifacts`, or in WANDB_ARTIFACT_DIR), whose path is returned.

        Files that are there already with the right contents are kept; each other is fetched whole or not at all. Blocks for the
        downloads. Raises CommError, OSError.
        """
        place = self._place(root)
        for name in self.manifest.contents:
            self._fetch(name, place.absolute())
        return str(place)

    def file(self, root: str | os.PathLike[str] | None = None) -> str:
        """The path of the only file, downloaded as by `download`. Raises UsageError when there are several."""
        names = list(self.manifest.contents)
        if len(names) != 1:
            raise UsageError(f"artifact {self.name} has {len(names)} files: use download(), or get_entry(name).download()")
        place = self._place(root)
        return str(self._fetch(names[0], place.absolute()))

    def _place(self, root: str | os.PathLike[str] | None) -> Path:
        return Path(self._api.settings.artifact_dir).expanduser() / self.name if root is None else Path(root)

    def files(self) -> list[str]:
        """The files' names."""
        return sorted(self.manifest.contents)

    def get_entry(self, name: str) -> ArtifactFile:
        """One file. Raises KeyError."""
        plain = normal_name(name)
        if plain not in self.manifest.contents:
            raise KeyError(f"artifact {self.name} has no file {name!r}; it has {', '.join(self.files()[:20])}")
        return ArtifactFile(self, plain)

    def wait(self, timeout: float | None = None) -> UsedArtifact:
        """It is complete already."""
        del timeout
        return self

    def link(self, target_path: str, aliases: list[str] | None = None) -> None:
        """Makes it a version of the collection `[[entity/]project/]name` as well. Raises CommError."""
        parts = target_path.split("/")
        if not 1 <= len(parts) <= 3 or not all(parts):
            raise UsageError(
                f"target_path {target_path!r} is not understood: write entity/project/name, or a part of it from the right"
            )
        target = (self.entity, self.project, parts[-1])
        if len(parts) > 1:
            target = (parts[0] if len(parts) == 3 else self.entity, parts[-2], parts[-1])
        self._api.execute(protocol.link(self.id, target, aliases or []))

    def _fetch(self, name: str, place: Path) -> Path:
        entry = self.manifest.contents[name]
        target = place / normal_name(name)
        if target.is_file() and digest(target) == entry.digest:
            return target
        if entry.ref is not None:
            _fetch_reference(entry, target)
            return target
        url = self._address(name)
        download(url, target, entry.digest)
        return target

    def _address(self, name: str) -> str:
        if self._addresses is None:
            found: dict[str, str] = {}
            cursor: str | None = None
            while True:
                asked = protocol.addresses(self.entity, self.project, self.name, cursor)
                page, cursor = protocol.read_addresses(self._api.execute(asked))
                found |= page
                if cursor is None:
                    break
            self._addresses = found
        if not self._addresses.get(name):
            raise CommError(f"the server has no contents for {name} of artifact {self.qualified_name}")
        return self._addresses[name]

    def __repr__(self) -> str:
        return f"<Artifact {self.qualified_name} ({self.type})>"


class ArtifactFile:
    """One file of an artifact."""

    def __init__(self, artifact: UsedArtifact, name: str) -> None:
        self._artifact = artifact
        self.name = self.path = name

    @property
    def size(self) -> int | None:
        return self._artifact.manifest.contents[self.name].size

    @property
    def digest(self) -> str:
        return self._artifact.manifest.contents[self.name].digest

    @property
    def ref(self) -> str | None:
        return self._artifact.manifest.contents[self.name].ref

    def download(self, root: str | os.PathLike[str] | None = None) -> str:
        """Its path; as `UsedArtifact.download`."""
        place = self._artifact._place(root)  # noqa: SLF001
        return str(self._artifact._fetch(self.name, place.absolute()))  # noqa: SLF001


def _fetch_reference(entry: ManifestEntry, target: Path) -> None:
    assert entry.ref is not None
    parts = urlsplit(entry.ref)
    if parts.scheme == "file":
        source = Path(unquote(parts.path))
        if digest(source) != entry.digest:
            raise CommError(f"{source} has changed since it became a reference")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    elif parts.scheme in {"http", "https"}:
        download(entry.ref, target, "")
    else:
        raise UsageError(f"{entry.ref} is a reference that wbdist cannot fetch: only http(s):// and file://")


def find(api: Api, name: str, type: str | None, entity: str | None = None, project: str | None = None) -> UsedArtifact:
    """`[[entity/]project/]name[:alias or :version]`, `latest` when it says none. Raises ArtifactNotFoundError, UsageError."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(
            f"artifact name {name!r} is not understood: write entity/project/name:alias, or a part of it from the right"
        )
    owner = parts[0] if len(parts) == 3 else entity or api.default_entity
    where = parts[-2] if len(parts) > 1 else project or api.settings.project
    if not where:
        raise UsageError(f"artifact name {name!r} has no project, and none is set: write entity/project/name:alias")
    base, _, alias = parts[-1].partition(":")
    found = protocol.read_by_name(api.execute(protocol.by_name(owner, where, f"{base}:{alias or 'latest'}")))
    if found is None:
        raise ArtifactNotFoundError(f"there is no artifact {owner}/{where}/{base}:{alias or 'latest'} on {api.base_url}")
    if type is not None and found.type != type:
        raise ValueError(f"artifact {name} is of type {found.type!r}, not {type!r}")
    return UsedArtifact(api, found)
