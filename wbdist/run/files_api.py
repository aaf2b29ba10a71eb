"""Files of a run on a server, with W&B's names: listed, downloaded, uploaded, deleted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wbdist.errors import CommError, UsageError
from wbdist.protocol import files
from wbdist.protocol.files import RemoteFile
from wbdist.run.absent import MissingNameError
from wbdist.run.connection import is_loopback
from wbdist.run.downloads import download
from wbdist.run.remote_lists import Pages
from wbdist.run.restoring import RestoredFile, normal_name

if TYPE_CHECKING:
    from wbdist.run.reader import Api

Address = tuple[str, str, str]
"""entity, project, run id"""
UPLOAD_SECONDS = 60.0
"""Without a byte taken, after which an upload counts as lost."""


class File:
    """One file of a run as the server had it when it was listed."""

    def __init__(self, api: Api, address: Address, found: RemoteFile, project_number: str) -> None:
        """Use `RunRecord.files` or `.file`."""
        self._api = api
        self._address = address
        self._found = found
        self._project_number = project_number

    @property
    def id(self) -> str:
        return self._found.id

    @property
    def name(self) -> str:
        return self._found.name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._found.size

    @property
    def md5(self) -> str:
        """Base64; "0" for a file that the run has not."""
        return self._found.md5

    @property
    def mimetype(self) -> str:
        return self._found.mimetype

    @property
    def updated_at(self) -> str:
        """ISO 8601, UTC."""
        return self._found.updated_at

    @property
    def url(self) -> str:
        """Authenticates itself for some hours."""
        return self._found.url

    @property
    def direct_url(self) -> str:
        """As `url`, past W&B's own server to where the bytes lie."""
        return self._found.direct_url

    def download(self, root: str | os.PathLike[str] = ".", replace: bool = False, exist_ok: bool = False) -> RestoredFile:
        """Brings the file to `root`, below its name, whole or not at all; returns it open for reading bytes, usable as a path.

        A file that is there already: ValueError, unless `replace` (downloaded anew) or `exist_ok` (returned as it is). Blocks
        for the download. Raises CommError when it fails, or when the run has no such file.
        """
        target = Path(root).absolute() / normal_name(self.name)
        if target.exists() and not replace:
            if not exist_ok:
                raise ValueError(
                    f"{target} exists: pass replace=True to download it anew, or exist_ok=True to take it as it is"
                )
            return RestoredFile(target)
        if not self._found.exists:
            raise CommError(f"run {'/'.join(self._address)} has no file {self.name}")
        download(self.url or self.direct_url, target, self.md5)
        return RestoredFile(target)

    def delete(self) -> None:
        """Deletes it from the run. Raises CommError."""
        number = int(self._project_number) if self._project_number.isdigit() else None
        self._api.execute(files.delete_files([self.id], number))

    if not TYPE_CHECKING:  # a type checker is to find misspelt names

        def __getattr__(self, name: str) -> NoReturn:
            if name in {"display", "to_html", "path_uri"}:
                raise MissingNameError(f"a run's file has no `{name}`: download it, or open its `url`")
            raise AttributeError(f"a run's file has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<File {self.name} ({self.mimetype}) {self.size} B>"


class Files(Pages[File]):
    """Files of a run by name, fetched a page at a time: iterable, indexable, with `len`."""

    def __init__(
        self, api: Api, address: Address, names: list[str] | None = None, pattern: str | None = None, per_page: int = 50
    ) -> None:
        """Use `RunRecord.files`."""
        if names and pattern:
            raise UsageError("give names or pattern, not both")
        if per_page < 1:
            raise UsageError(f"per_page={per_page} must be at least 1")
        super().__init__()
        self._api = api
        self._address = address
        self._names = [normal_name(name) for name in names or ()]
        self._pattern = pattern
        self._per_page = per_page
        self._total: int | None = None

    def __len__(self) -> int:
        """With names or a pattern it fetches them all, since servers tell the number of all files only."""
        if self._names or self._pattern:
            return sum(1 for _ in self)
        if self._total is None:
            self._fetch()
        return self._total or 0

    def _fetch(self) -> None:
        asked = files.run_files(
            *self._address, names=self._names, pattern=self._pattern, cursor=self._cursor, limit=self._per_page
        )
        page = files.read_run_files(self._api.execute(asked))
        if page is None:
            raise CommError(f"there is no run {'/'.join(self._address)} any more")
        self._found.extend(File(self._api, self._address, found, page.project_number) for found in page.files)
        self._total = page.total
        self._cursor = page.cursor
        self._complete = page.cursor is None

    def __repr__(self) -> str:
        return f"<Files {'/'.join(self._address)}>"


def upload_file(api: Api, address: Address, path: str | os.PathLike[str], root: str | os.PathLike[str]) -> File:
    """Makes a local file one of the run's, named by its path below `root`. Blocks until the server has all of it.

    Raises ValueError for a path that is not below `root`, OSError, CommError.
    """
    import requests  # costs more than an offline run

    name = normal_name(os.path.relpath(path, root))
    slots = files.read_upload_slots(api.execute(files.create_run_files(*address, [name])))
    url = slots.urls.get(name)
    if url is not None:
        with requests.Session() as session, open(path, "rb") as contents:
            session.trust_env = not is_loopback(url)
            # requests sends no Content-Length for an empty file, but a chunked body, which object stores refuse.
            body = contents if os.fstat(contents.fileno()).st_size else b""
            try:
                answer = session.put(url, data=body, headers=slots.headers, timeout=UPLOAD_SECONDS)
            except requests.RequestException as error:
                raise CommError(f"{name} cannot be uploaded: {error}") from error
        if not answer.ok:
            raise CommError(f"{name} cannot be uploaded: HTTP {answer.status_code}: {answer.text[:200]}")
    return Files(api, address, [name])[0]
