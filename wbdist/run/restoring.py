"""`restore`: a file of a run, back on this machine's disk."""

from __future__ import annotations

import io
import os
import posixpath
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from wbdist.errors import CommError, UsageError
from wbdist.protocol import files, operations
from wbdist.protocol.files import RemoteFile
from wbdist.run import lifecycle, local_files, unreadable
from wbdist.run.connection import RefusedError
from wbdist.run.downloads import digest, download
from wbdist.run.local_files import LocalVersion
from wbdist.run.local_history import LocalRun
from wbdist.run.snapshots import snapshot
from wbdist.settings import Settings, resolve

if TYPE_CHECKING:
    from wbdist.run.handle import Run
    from wbdist.run.reader import Api


class RestoredFile(io.BufferedReader):
    """A file open for reading bytes, which may also be given wherever a path is: `torch.load(restored)`, `open(restored)`.

    `name`: where it lies. A context manager that closes it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(str(path)))

    def __fspath__(self) -> str:
        return str(self.name)


def restore(
    name: str | os.PathLike[str],
    run_path: str | None = None,
    replace: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> RestoredFile | None:
    """The newest version of a file of the run at `run_path` (default: the open run), in `root`; None when the run has none.

    `run_path`: `entity/project/id`, `project/id` or `id`. `root`: default the open run's `dir`, else the working directory.
    Takes what this machine's run directories hold when that is the newest, so it works offline, and downloads otherwise. A file
    that lies in `root` already is kept when it is the same, or is newer and `replace` is not given. Blocks for the download.

    A server that is away, or that goes away before it has told which version is the newest, is said in one line, and the
    newest on this machine is taken. Raises ValueError for a name that leaves the run's files or when no run is named,
    CommError when the server does not answer and no version is here, or breaks off the download of a newer one.
    """
    return restore_for(lifecycle.current_run(), name, run_path, replace, root)


def restore_for(
    run: Run | None,
    name: str | os.PathLike[str],
    run_path: str | None,
    replace: bool,
    root: str | os.PathLike[str] | None,
) -> RestoredFile | None:
    """`restore` as a method of `run`."""
    plain = normal_name(os.fspath(name))
    if run_path is None:
        if run is None:
            raise ValueError(f"restore({plain!r}) needs run_path, since no run is open: give entity/project/id")
        if run.disabled:
            return None
    settings = run.settings if run is not None else resolve(None, {})
    entity, project, run_id = address = _address(run_path, run, settings)
    place = Path(root) if root is not None else Path(run.dir) if run is not None and run.dir else Path.cwd()
    journals = Path(run.dir).parents[1] if run is not None and run.dir else Path(settings.root_dir) / "wandb"
    local = LocalRun(journals, project, entity, run_id)
    unreadable.tell(settings, local.unreadable)
    here = local_files.newest(local, plain)
    there = None if settings.mode in {"offline", "disabled"} else _remote(settings, address, plain, local, here)
    target = place.absolute() / plain
    if there is not None:
        if replace or not _same_or_newer(target, there):
            download(there.url or there.direct_url, target, there.md5)
    elif here is not None:
        _bring(here, target, replace)
    else:
        return None
    return RestoredFile(target)


def normal_name(name: str) -> str:
    """A file's name in its run: relative, `./x` is `x`. Raises ValueError."""
    plain = posixpath.normpath(name)
    if not name or plain.startswith(("/", "..")) or plain == ".":
        raise ValueError(f"{name!r} is no name of a run's file: give it relative to the run's files, without '..'")
    return plain


def _address(run_path: str | None, run: Run | None, settings: Settings) -> tuple[str, str, str]:
    if run_path is None:
        assert run is not None
        return run.entity, run.project, run.id
    parts = [part for part in run_path.split("/") if part]
    if len(parts) == 4 and parts[2] == "runs":
        del parts[2]
    project = parts[-2] if len(parts) > 1 else (run.project if run is not None else settings.project)
    if not 1 <= len(parts) <= 3 or not project:
        raise ValueError(f"run_path={run_path!r} is not understood: write entity/project/id")
    entity = parts[0] if len(parts) == 3 else (run.entity if run is not None else settings.entity or "")
    return entity, project, parts[-1]


def _remote(
    settings: Settings, address: tuple[str, str, str], name: str, local: LocalRun, here: LocalVersion | None
) -> RemoteFile | None:
    """The server's version, when that is the newest. A server that does not answer, or not to the end, is an error only when
    nothing is here; else what is here is taken, and that is said, with what the server did say."""
    from wbdist.run.reader import Api

    there = None
    try:
        api = Api(settings=settings)
        address = (address[0] or api.default_entity, *address[1:])
        page = files.read_run_files(api.execute(files.run_files(*address, names=[name], limit=1)))
        there = next((file for file in (page.files if page else ()) if file.exists), None)
        if there is None or (here is not None and _is_newest(here, there, local, api, address)):
            return None
        return there
    except (CommError, UsageError) as error:
        if here is None:
            raise
        other = "" if there is None else f", though the server has another version, of {there.updated_at}, which may be newer"
        settings.say(f"restore({name!r}): {error}; taking what is on this machine{other}", warning=True)
        return None


def _is_newest(here: LocalVersion, there: RemoteFile, local: LocalRun, api: Api, address: tuple[str, str, str]) -> bool:
    """Whether this machine's is the very same, or not sent yet.

    Not by time: of versions on their way, an older one arrives after a newer one was saved. Raises CommError when the server
    does not tell: that it is away now says nothing about who has gone on with the run.
    """
    if digest(here.path) == there.md5:
        return True
    if here.delivered:
        return False
    try:
        known = operations.read_position(api.execute(operations.run_position(*address)))
    except RefusedError:
        return True  # W&B's server knows no attempts: nobody else is expected to go on with this machine's run
    return known is None or known[0] <= local.attempt


def _seconds(moment: str) -> float:
    parsed = datetime.fromisoformat(moment)
    return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp()


def _bring(here: LocalVersion, target: Path, replace: bool) -> None:
    if target.exists() and not target.is_symlink():
        if target.samefile(here.path) or digest(target) == digest(here.path):
            return
        if not replace and target.stat().st_mtime > here.saved_at:
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    snapshot(here.path, target, None)


def _same_or_newer(target: Path, there: RemoteFile) -> bool:
    if not target.is_file():
        return False
    return digest(target) == there.md5 or target.stat().st_mtime > _seconds(there.updated_at)
