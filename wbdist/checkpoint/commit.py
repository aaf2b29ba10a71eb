"""One save, from when its copy begins: arrive, write, commit. Runs on a background thread of every rank; no collective.

    begin    every rank says what it is about to save            (a rank that does not come is named)
    ready    rank 0 made the fresh directory step-<n>.a<m>.tmp
             every rank writes its part as it is copied, durably, learns where its run stands, and adds the history that
             no server has
    done     every rank tells its files and digests, or its failure
    commit   rank 0 writes the manifest, renames the directory, syncs the parent; tells how it went
    (then)   rank 0 removes what retention lets go; the save is over before it

A failure before `done` is everybody's failure: nothing is renamed. See docs/adr/0002.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from wbdist.checkpoint import changes, retention, tree
from wbdist.checkpoint.best import Best
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.history import Kept, write_history
from wbdist.checkpoint.image import SUFFIX
from wbdist.checkpoint.manifest import MANIFEST, TEMPORARY, VERSION, FileEntry, Manifest, directory_name, seal
from wbdist.checkpoint.retention import Keep
from wbdist.checkpoint.shares import digests
from wbdist.checkpoint.staging import Staged
from wbdist.checkpoint.verdict import Failure, raise_failures
from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition
from wbdist.core.tails import JournalPrefix
from wbdist.errors import CheckpointError, FencedError

log = logging.getLogger("wbdist.checkpoint")

SHARED = "shared"
STATE = "state.json"


def rank_directory(rank: int) -> str:
    """Sub-directory of what rank `rank` holds for itself."""
    return f"rank-{rank}"


class Part(msgspec.Struct, frozen=True):
    """What one rank writes into one sub-directory."""

    structures: dict[str, Any] | None
    """None: another rank writes these."""
    file: int | None
    """Which of the staged files holds the tensors; None when there are none."""
    listing: str
    """Digest of the names, types and shapes of all tensors that the sub-directory will hold."""


class SaveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One save as this rank sees it."""

    serial: int
    """Number of this save in this attempt; the same on all ranks, since all save in step."""
    step: int
    attempt: int
    directory: Path
    shared: tuple[str, ...]
    per_rank: tuple[str, ...]
    parts: Mapping[str, Part]
    """Sub-directory -> what this rank writes there."""
    staged: Staged
    sampled: tuple[str, ...]
    """Names of the tensors of which `staged` has samples."""
    position: RunPosition | Callable[[], RunPosition]
    history: Callable[[], Sequence[JournalPrefix]] | None
    """Called after the position is known: what of the history this rank puts into the checkpoint."""
    kept: Kept
    """What this rank put there the last time."""
    reason: str
    best: Best | None
    config: dict[str, Any]
    """In normal form."""
    set_later: dict[str, Any]
    """What was set in the run's config since the start."""
    environment: dict[str, str]
    kinds: dict[str, str]
    keep: Keep
    protected: str | None
    """Name of the checkpoint that this job was restored from: never removed by it."""
    failure: Failure | None
    """Why this rank could not even stage; its peers must learn of it."""

    @property
    def name(self) -> str:
        return directory_name(self.step, self.attempt)


class _Arrival(msgspec.Struct, frozen=True):
    step: int
    shared: tuple[str, ...]
    per_rank: tuple[str, ...]
    listing: str
    samples: dict[str, str]
    failure: Failure | None


class _Written(msgspec.Struct, frozen=True):
    files: dict[str, FileEntry]
    run: RunPosition | None
    failure: Failure | None


class _Verdict(msgspec.Struct, frozen=True):
    failure: Failure | None
    durable_at: float = 0.0


class Committed(msgspec.Struct, frozen=True):
    """A save that stands."""

    bytes: int
    """Written by this rank."""
    durable_at: float
    """Unix seconds on rank 0's clock."""
    kept: Kept
    """The history among it."""


def run_save(coordinator: Coordinator, layer: FileLayer, request: SaveRequest, deadline: float) -> Committed:
    """Writes and commits on every rank. Blocks until committed, failed, or `deadline` (monotonic seconds).

    Raises PeerLostError naming ranks that did not come, or the failure of any rank on all of them; the checkpoint then
    does not exist.
    """
    rank, key = coordinator.rank, f"ckpt/{request.serial}"
    nothing = f"the checkpoint of step {request.step} was not committed"
    temporary = request.directory / (request.name + TEMPORARY)

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    request.staged.samples_ready()
    listing = request.parts[SHARED].listing if SHARED in request.parts else ""
    samples = digests(request.sampled, request.staged.samples)
    arrival = _Arrival(request.step, request.shared, request.per_rank, listing, samples, request.failure)
    arrivals = [
        msgspec.msgpack.decode(word, type=_Arrival)
        for word in coordinator.gather(f"{key}/begin", msgspec.msgpack.encode(arrival), left())
    ]
    raise_failures([a.failure for a in arrivals if a.failure is not None], nothing)
    _check_alike(arrivals)

    failure = _attempt(rank, request, lambda: _open(layer, request, temporary)) if rank == 0 else None
    raise_failures(_told(coordinator, f"{key}/ready", _Verdict(failure), left()), nothing)

    files: dict[str, FileEntry] = {}
    kept: dict[str, FileEntry] = {}
    run: RunPosition | None = None
    failure = None
    try:
        files = _write_parts(layer, temporary, rank, request)
        run = request.position() if callable(request.position) else request.position
        if request.history is not None:
            kept = write_history(layer, temporary, rank, request.history(), request.kept)
            files |= kept
    except Exception as error:  # noqa: BLE001  (whatever it is, the peers must learn of it; raised again below)
        failure = _failure(rank, request, error)
    reports = [
        msgspec.msgpack.decode(word, type=_Written)
        for word in coordinator.gather(f"{key}/done", msgspec.msgpack.encode(_Written(files, run, failure)), left())
    ]
    failures = [report.failure for report in reports if report.failure is not None]
    if failures and rank == 0:
        _discard(layer, temporary)
    raise_failures(failures, nothing)

    failure = None
    if rank == 0:
        failure = _attempt(rank, request, lambda: _commit(layer, request, temporary, reports))
        if failure is not None and temporary.exists():
            _discard(layer, temporary)
    verdict = _Verdict(failure, time.time())
    told = coordinator.agree(f"{key}/commit", msgspec.msgpack.encode(verdict) if rank == 0 else None, left())
    verdict = msgspec.msgpack.decode(told, type=_Verdict)
    raise_failures([verdict.failure] if verdict.failure is not None else [], nothing)
    return Committed(
        bytes=sum(entry.size for entry in files.values()),
        durable_at=verdict.durable_at,
        kept=Kept(request.directory / request.name, kept),
    )


def clear_away(rank: int, layer: FileLayer, request: SaveRequest) -> None:
    """Removes what the newest checkpoint has made superfluous, on rank 0. After `run_save`; nobody waits for it.

    Giving a gigabyte back takes a file system longer than the rest of a commit. Never raises for what the disk refuses: the
    checkpoint stands, and the next save tries again.
    """
    if rank == 0:
        try:
            retention.prune(layer, request.directory, request.keep, {request.protected, request.name})
        except CheckpointError as error:
            log.warning("old checkpoints are not removed: %s", error)


def _attempt(rank: int, request: SaveRequest, act: Callable[[], object]) -> Failure | None:
    try:
        act()
    except Exception as error:  # noqa: BLE001  (told to all ranks and raised there)
        return _failure(rank, request, error)
    return None


def _failure(rank: int, request: SaveRequest, error: Exception) -> Failure:
    """A newer attempt removes what this one has not finished: whatever is missed then, that is the reason."""
    try:
        retention.check_fence(request.directory, request.attempt)
    except FencedError as reason:
        return Failure.of(rank, reason)
    except OSError:  # the directory cannot be looked at, which may be the very error
        pass
    return Failure.of(rank, error)


def _told(coordinator: Coordinator, name: str, verdict: _Verdict, timeout: float) -> list[Failure]:
    word = coordinator.agree(name, msgspec.msgpack.encode(verdict) if coordinator.rank == 0 else None, timeout)
    failure = msgspec.msgpack.decode(word, type=_Verdict).failure
    return [] if failure is None else [failure]


def _check_alike(arrivals: list[_Arrival]) -> None:
    for rank, arrival in enumerate(arrivals):
        if arrival.step != arrivals[0].step:
            raise CheckpointError(
                f"ranks save different steps: rank 0 step {arrivals[0].step}, rank {rank} step {arrival.step}. "
                "save() must be called by all ranks after the same step"
            )
        if (arrival.shared, arrival.per_rank) != (arrivals[0].shared, arrivals[0].per_rank):
            raise CheckpointError(
                f"ranks track different objects: rank 0 {list(arrivals[0].shared + arrivals[0].per_rank)}, "
                f"rank {rank} {list(arrival.shared + arrival.per_rank)}"
            )
        if arrival.listing != arrivals[0].listing:
            raise CheckpointError(
                f"ranks 0 and {rank} track tensors of other names, types or shapes. What ranks do not hold alike is tracked "
                "with per_rank=True"
            )
        differing = sorted(name for name, digest in arrival.samples.items() if arrivals[0].samples[name] != digest)
        if differing:
            raise CheckpointError(
                f"ranks 0 and {rank} hold different values of {', '.join(differing[:3])}, of which each writes a share. "
                "Wrap the model in DistributedDataParallel (job.ddp) so that they stay alike, or track it with per_rank=True"
            )


def _open(layer: FileLayer, request: SaveRequest, temporary: Path) -> None:
    layer.make_directory(request.directory)
    retention.check_fence(request.directory, request.attempt)
    if (request.directory / request.name).exists():
        raise CheckpointError(f"{request.directory / request.name} exists already; a step is saved once in an attempt")
    if temporary.exists():  # of a save of ours that failed
        layer.remove_tree(temporary)
    layer.make_directory(temporary)


def _write_parts(layer: FileLayer, temporary: Path, rank: int, request: SaveRequest) -> dict[str, FileEntry]:
    wanted: dict[Path, memoryview] = {}
    copied: dict[Path, int] = {}
    for sub, part in request.parts.items():
        directory = temporary / sub
        layer.make_directory(directory)
        if part.file is not None:
            path = directory / f"{rank:05d}{SUFFIX}"
            wanted[path], copied[path] = request.staged.files[part.file].numpy().data, part.file
        if part.structures is not None:
            wanted[directory / STATE] = memoryview(tree.encode(part.structures))

    def ready(path: Path, size: int) -> None:
        if path in copied:
            request.staged.ready(copied[path], size)

    stored = layer.store_all(wanted, ready)
    for sub in request.parts:
        layer.sync_directory(temporary / sub)
    return {str(path.relative_to(temporary)): entry for path, entry in stored.items()}


def _commit(layer: FileLayer, request: SaveRequest, temporary: Path, reports: list[_Written]) -> None:
    _check_seen(temporary, reports)
    manifest = Manifest(
        version=VERSION,
        step=request.step,
        attempt=request.attempt,
        runs=tuple(report.run for report in reports if report.run is not None),
        world_size=len(reports),
        shared=request.shared,
        per_rank=request.per_rank,
        files={name: entry for report in reports for name, entry in report.files.items()},
        created=time.time(),
        environment=request.environment,
        kinds=request.kinds,
        best=request.best,
        reason=request.reason,
        config_hash=changes.digest(request.config),
        config=request.config,
        set_later=request.set_later,
        host=socket.gethostname(),
    )
    with layer.writing(temporary / MANIFEST) as stream:
        stream.write(seal(manifest))
    layer.sync_directory(temporary)
    retention.check_fence(request.directory, request.attempt)
    layer.rename(temporary, request.directory / request.name)
    layer.sync_directory(request.directory)


def _check_seen(temporary: Path, reports: list[_Written]) -> None:
    """Raises CheckpointError when this rank does not see what the others wrote: nobody could go on from such a checkpoint."""
    for rank, report in enumerate(reports):
        for name, entry in report.files.items():
            try:
                size = (temporary / name).stat().st_size
            except OSError as error:
                problem = f"{name}, which rank {rank} wrote, is not there for rank 0 ({error.strerror})"
            else:
                if size == entry.size:
                    continue
                problem = f"{name} has {size} bytes for rank 0, and rank {rank} wrote {entry.size}"
            raise CheckpointError(f"{problem}. {str(temporary.parent)!r} must be one directory for all ranks, across hosts too")


def _discard(layer: FileLayer, temporary: Path) -> None:
    try:
        layer.remove_tree(temporary)
    except OSError as error:
        log.warning("the unfinished checkpoint %s cannot be removed: %s; the next attempt will", temporary, error)
