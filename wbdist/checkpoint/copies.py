"""A job's checkpoints on an object store: committed ones, copied in the same layout and trusted by the same proof.

    job.json                      the run they belong to
    attempts/000003.json          created if absent: whoever creates it has the number. Says which checkpoints stood then
    step-100.a3/<file> ...        first
    step-100.a3/manifest.json     last, created if absent: the marker
    quarantine/step-100.a3.json   why nobody shall load that one

An object store has no rename and no lock, only "create if absent". That is enough against a writer that was superseded and
does not know: a checkpoint of attempt n counts only if attempt n + 1, when it began, found it standing. So what a zombie
commits later is there, and never taken; no clock and no lease is in it. Downloaded below one directory, the copies are
a checkpoint directory. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from wbdist.checkpoint.claim import Attempt, JobIdentity
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import (
    MANIFEST,
    QUARANTINE,
    TEMPORARY,
    Broken,
    FileEntry,
    Manifest,
    newest_first,
    parse,
    parse_name,
    seal,
)
from wbdist.errors import CheckpointCorruptError, CheckpointError, FencedError, UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PATIENCE = timedelta(seconds=60)
"""For one request, with its repetitions."""
_JOB = "job.json"
_ATTEMPT = re.compile(r"attempts/(\d+)\.json")
_CHUNK = 4 << 20


class Begun(msgspec.Struct, frozen=True):
    """An attempt, as the store knows it."""

    attempt: Attempt
    stands: tuple[str, ...]
    """The checkpoints that it could have started from, on the store or on its own disk."""


def is_url(text: str) -> bool:
    """Whether `text` names a place on an object store rather than a directory."""
    return "://" in text


class Copies:
    """One job's checkpoints below one URL (`s3://bucket/jobs/digits`, `gs://`, `az://`, `file:///`). Threads may share it.

    Credentials and endpoint come from the environment, as for the provider's own tools: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL.
    Every method blocks for its requests, each at most PATIENCE, and raises CheckpointError when the store does not do them.
    """

    def __init__(self, url: str) -> None:
        """Touches nothing. Raises UsageError for a URL that no store is known for, or without the extra `s3`."""
        self.url = url.rstrip("/")
        self._store = _open(self.url)

    # Attempts -------------------------------------------------------------------------------------------

    def job(self) -> JobIdentity | None:
        """The run that these checkpoints belong to; None when nothing is here yet."""
        with self._asking("read the job's identity"):
            try:
                return msgspec.json.decode(self._get(_JOB), type=JobIdentity)
            except FileNotFoundError:
                return None

    def attempts(self) -> list[Begun]:
        """Every attempt that began here, oldest first."""
        with self._asking("read the attempts"):
            return [self._begun(number) for number in self._numbers()]

    def begin(self, job: JobIdentity, attempt: Attempt, stands: Sequence[str]) -> None:
        """Takes `attempt`'s number. From here on nothing that an older attempt commits is taken by anybody, unless in `stands`.

        Raises FencedError when another process has it, or a newer one.
        """
        with self._asking("begin an attempt"):
            self._create(_JOB, msgspec.json.encode(job), fenced=f"{self.url} belongs to another run than {job.run_id!r}")
            fenced = f"attempt {attempt.number} at {self.url} was begun by another process; this one must stop"
            record = msgspec.json.encode(Begun(attempt, tuple(stands)))
            self.check_fence(attempt.number)
            self._create(f"attempts/{attempt.number:06d}.json", record, fenced=fenced)

    def check_fence(self, attempt: int) -> None:
        """Raises FencedError when an attempt newer than `attempt` began here."""
        with self._asking("look for newer attempts"):
            newest = max(self._numbers(), default=0)
        if newest > attempt:
            raise FencedError(
                f"attempt {newest} has taken over {self.url}; this process belongs to attempt {attempt} and must stop"
            )

    def superseded(self, found: Manifest) -> str | None:
        """Why a checkpoint, here or on a disk, does not count any more: the next attempt began without it. None: it counts."""
        with self._asking("read the attempts"):
            after = min((number for number in self._numbers() if number > found.attempt), default=None)
            if after is None or found.name in self._begun(after).stands:
                return None
        return f"{found.name} was committed after attempt {after} had begun without it"

    # Checkpoints ----------------------------------------------------------------------------------------

    def scan(self) -> tuple[list[Manifest], list[Broken]]:
        """The committed checkpoints that count, newest first, and those whose marker is broken. Reads markers only.

        A marker that is listed, but not there to be read, is none: a listing proves nothing.
        """
        good: list[Manifest] = []
        bad: list[Broken] = []
        with self._asking("list the checkpoints"):
            away = {Path(path).stem for path in self._list(f"{QUARANTINE}/")}
            for name in sorted(set(self._names()) - away):
                try:
                    manifest = parse(self._get(f"{name}/{MANIFEST}"), name, f"{self.url}/{name}")
                except FileNotFoundError:
                    continue
                except CheckpointCorruptError as error:
                    step, attempt = parse_name(name) or (0, 0)
                    bad.append(Broken(f"{self.url}/{name}", step, attempt, str(error)))
                else:
                    if self.superseded(manifest) is None:
                        good.append(manifest)
        return sorted(good, key=newest_first), sorted(bad, key=newest_first)

    def ship(self, manifest: Manifest, directory: Path, attempt: int) -> None:
        """Copies the committed checkpoint that lies in `directory`: its files, then the marker. Repeatable; blocks for long.

        `attempt` is the caller's: the one that made the checkpoint, or one that goes on from it. Files that are there already,
        in their size, are left. Raises FencedError when a newer attempt than the caller's has begun.
        """
        with self._asking(f"copy {manifest.name}"):
            self.check_fence(attempt)
            there = self._list(f"{manifest.name}/")
            for name, entry in sorted(manifest.files.items()):
                if there.get(f"{manifest.name}/{name}") != entry.size:
                    self._put_file(f"{manifest.name}/{name}", directory / name)
            self.check_fence(attempt)
            fenced = f"{self.url}/{manifest.name} was committed by another process; this one must stop"
            self._create(f"{manifest.name}/{MANIFEST}", seal(manifest), fenced=fenced)
        self.check_fence(attempt)

    def fetch(self, manifest: Manifest, layer: FileLayer, directory: Path) -> Path:
        """Brings a checkpoint into the checkpoint directory `directory`, every file compared with the manifest on its way.

        It appears by one rename, durable. Raises CheckpointCorruptError naming every bad file, OSError as the disk does.
        """
        temporary = directory / (manifest.name + TEMPORARY)
        if temporary.exists():
            layer.remove_tree(temporary)
        layer.make_directory(temporary)
        problems: list[str] = []
        subs = {temporary}
        with self._asking(f"fetch {manifest.name}"):
            for name, expected in sorted(manifest.files.items()):
                target = temporary / name
                layer.make_directory(target.parent)
                subs.add(target.parent)
                with layer.writing(target) as stream:
                    for chunk in self._read(f"{manifest.name}/{name}", problems):
                        stream.write(chunk)
                _compare(name, stream.entry(), expected, problems)
        if problems:
            layer.remove_tree(temporary)
            raise _damaged(manifest, problems)
        with layer.writing(temporary / MANIFEST) as stream:
            stream.write(seal(manifest))
        for sub in subs:
            layer.sync_directory(sub)
        final = directory / manifest.name
        layer.rename(temporary, final)
        layer.sync_directory(directory)
        return final

    def verify(self, manifest: Manifest) -> None:
        """Reads every file of a checkpoint and compares size and digest. Raises CheckpointCorruptError naming every bad one."""
        problems: list[str] = []
        with self._asking(f"verify {manifest.name}"):
            for name, expected in sorted(manifest.files.items()):
                hasher, size = xxhash.xxh3_128(), 0
                for chunk in self._read(f"{manifest.name}/{name}", problems):
                    hasher.update(chunk)
                    size += len(chunk)
                _compare(name, FileEntry(size, hasher.hexdigest()), expected, problems)
        if problems:
            raise _damaged(manifest, problems)

    def quarantine(self, name: str, problem: str) -> str:
        """Marks a bad checkpoint so that nobody looks at it again; returns where that is written. Its files stay."""
        path = f"{QUARANTINE}/{name}.json"
        with self._asking(f"quarantine {name}"):
            self._put(path, msgspec.json.encode({"name": name, "problem": problem}))
        return f"{self.url}/{path}"

    def remove(self, name: str) -> None:
        """Removes a checkpoint, the marker first: cut short, it leaves a leftover and never half a checkpoint. Repeatable."""
        with self._asking(f"remove {name}"):
            marker = f"{name}/{MANIFEST}"
            self._delete([marker])
            self._delete([path for path in self._list(f"{name}/") if path != marker])

    def sizes(self, name: str) -> dict[str, int]:
        """The files of a checkpoint that are here, by their path below it."""
        with self._asking(f"list {name}"):
            return {path.partition("/")[2]: size for path, size in self._list(f"{name}/").items()}

    def put_away(self) -> list[str]:
        """Names of the quarantined checkpoints."""
        with self._asking("list the quarantine"):
            return sorted(Path(path).stem for path in self._list(f"{QUARANTINE}/"))

    def unfinished(self) -> list[str]:
        """Names of what has no marker: being copied or removed, or left so."""
        with self._asking("list what is unfinished"):
            return sorted(name for name in self._names() if f"{name}/{MANIFEST}" not in self._list(f"{name}/"))

    def collect_leftovers(self, attempt: int) -> list[str]:
        """Removes what attempts before `attempt` did not finish to copy or to remove; returns the names."""
        removed = []
        with self._asking("remove leftovers"):
            for name in self._names():
                there = self._list(f"{name}/")
                if _attempt_of(name) < attempt and f"{name}/{MANIFEST}" not in there:
                    self._delete(list(there))
                    removed.append(name)
        return removed

    # Requests -------------------------------------------------------------------------------------------

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError, msgspec.MsgspecError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"cannot {what} ({self.url}): {first}") from error

    def _numbers(self) -> list[int]:
        return sorted(int(match[1]) for path in self._list("attempts/") if (match := _ATTEMPT.fullmatch(path)))

    def _begun(self, number: int) -> Begun:
        return msgspec.json.decode(self._get(f"attempts/{number:06d}.json"), type=Begun)

    def _names(self) -> list[str]:
        import obstore

        prefixes = obstore.list_with_delimiter(self._store)["common_prefixes"]
        return [name for name in (prefix.rstrip("/") for prefix in prefixes) if parse_name(name) is not None]

    def _list(self, prefix: str) -> dict[str, int]:
        import obstore

        return {found["path"]: found["size"] for page in obstore.list(self._store, prefix) for found in page}

    def _get(self, path: str) -> bytes:
        import obstore

        return bytes(obstore.get(self._store, path).bytes())

    def _read(self, path: str, problems: list[str]) -> Iterator[bytes]:
        import obstore

        try:
            for chunk in obstore.get(self._store, path).stream(min_chunk_size=_CHUNK):
                yield bytes(chunk)
        except FileNotFoundError:
            problems.append(f"{path.partition('/')[2]} is missing")

    def _put(self, path: str, data: bytes) -> None:
        import obstore

        obstore.put(self._store, path, data, use_multipart=False)

    def _put_file(self, path: str, source: Path) -> None:
        import obstore

        obstore.put(self._store, path, source)

    def _create(self, path: str, data: bytes, *, fenced: str) -> None:
        """Creates an object, or finds it there with this very content: an answer may have been lost. Raises FencedError."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            obstore.put(self._store, path, data, mode="create", use_multipart=False)
        except AlreadyExistsError as error:
            if self._get(path) != data:
                raise FencedError(fenced) from error

    def _delete(self, paths: list[str]) -> None:
        import obstore

        if paths:
            obstore.delete(self._store, paths)


def _open(url: str) -> ObjectStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(f"{url}: checkpoints on an object store need the extra: pip install 'wbdist[s3]'") from error
    try:
        if url.startswith("file:"):
            return from_url(url, mkdir=True)
        return from_url(url, retry_config={"max_retries": 8, "retry_timeout": PATIENCE})
    except (BaseError, OSError, ValueError) as error:
        raise UsageError(
            f"{url!r} is not the address of an object store: {error}. Give s3://bucket/prefix, gs://... or az://..."
        ) from error


def _attempt_of(name: str) -> int:
    return (parse_name(name) or (0, 0))[1]


def _compare(name: str, found: FileEntry, expected: FileEntry, problems: list[str]) -> None:
    if any(problem.startswith(f"{name} is missing") for problem in problems):
        return
    if found.size != expected.size:
        problems.append(f"{name} has {found.size} bytes instead of {expected.size}")
    elif found.xxh3 != expected.xxh3:
        problems.append(f"{name} has another content than was written")


def _damaged(manifest: Manifest, problems: list[str]) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"checkpoint {manifest.directory} is damaged: {'; '.join(problems)}")
