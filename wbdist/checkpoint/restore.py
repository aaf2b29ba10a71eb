"""Choosing a checkpoint, together, and loading it. Training thread, all ranks in step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from wbdist.checkpoint import changes, environment, retention, rng, tracked, tree
from wbdist.checkpoint.changes import Allowed
from wbdist.checkpoint.commit import SHARED, STATE, rank_directory
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import Manifest, scan, verify
from wbdist.checkpoint.sharded import adapted
from wbdist.checkpoint.storage import TensorFiles
from wbdist.checkpoint.tracked import RNG, Stateful, TrackedObjects
from wbdist.checkpoint.verdict import Failure, raise_failures
from wbdist.checkpoint.views import doubts
from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition
from wbdist.errors import CheckpointCorruptError, CheckpointError, StateMissingError

log = logging.getLogger("wbdist.checkpoint")


class Choice(msgspec.Struct, frozen=True):
    """What rank 0 decided: the checkpoint to start from, or none, and what it had to say about it."""

    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()
    failure: Failure | None = None


class Restored(msgspec.Struct, frozen=True):
    """The checkpoint that this job continues from; all tracked objects and generators hold its state."""

    manifest: Manifest
    own: RunPosition | None
    """Where this rank's own run stood; None when the checkpoint was made by fewer ranks."""
    notes: tuple[str, ...] = ()
    """What was not plain: checkpoints passed over, another world size, another config. For people."""

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def attempt(self) -> int:
        """The attempt that made the checkpoint."""
        return self.manifest.attempt

    @property
    def run(self) -> RunPosition:
        """Where rank 0's run stood: the job's one run under strategy `rank0`."""
        return self.manifest.run


class Surroundings:
    """What this job is started with, to be compared with what the checkpoint was made with."""

    def __init__(self, config: dict[str, Any], config_changes: Allowed, environment_changes: Allowed) -> None:
        """`config` in normal form (`changes.normal`)."""
        self.config = config
        self.config_changes = config_changes
        self.environment_changes = environment_changes
        self._facts: dict[str, str] | None = None

    def facts(self) -> dict[str, str]:
        """The environment as it was at the first call: of an attempt, when it restores. Scripts set switches later on, too."""
        if self._facts is None:
            self._facts = environment.facts()
        return self._facts


def choose(coordinator: Coordinator, layer: FileLayer, directory: Path, attempt: int, timeout: float) -> Choice:
    """Picks the newest checkpoint that verifies, on rank 0 and wherever another host sees it; every rank returns the same.

    Blocks at most `timeout` seconds, and for as long as reading the files takes. Bad ones are quarantined; what is
    whole on rank 0 alone stays and is passed over. Raises on every rank when rank 0 cannot choose, or when another host sees
    none of those that rank 0 sees; PeerLostError naming who does not answer.
    """
    deadline = time.monotonic() + timeout
    notes: list[str] = []
    doubted: dict[str, str] = {}
    while True:
        name, word = f"ckpt/restore/choice/{len(doubted)}", None
        if coordinator.rank == 0:
            try:
                choice = _pick(layer, directory, attempt, notes, doubted)
            except Exception as error:  # noqa: BLE001  (told to all ranks and raised on each below)
                choice = Choice(failure=Failure.of(0, error))
            word = msgspec.msgpack.encode(choice)
        told = coordinator.agree(name, word, max(0.0, deadline - time.monotonic()))
        choice = msgspec.msgpack.decode(told, type=Choice)
        raise_failures([choice.failure] if choice.failure is not None else [], f"no checkpoint chosen in {str(directory)!r}")
        if choice.manifest is None:
            return choice
        seen = msgspec.structs.replace(choice.manifest, directory=str(directory / choice.manifest.name))
        doubt = doubts(coordinator, name, seen, max(0.0, deadline - time.monotonic()))
        if not doubt:
            return msgspec.structs.replace(choice, manifest=seen)
        doubted[seen.name] = doubt


def _pick(layer: FileLayer, directory: Path, attempt: int, notes: list[str], doubted: Mapping[str, str]) -> Choice:
    """Rank 0's, but for those that other ranks have `doubted`; `notes` grow."""
    retention.check_fence(directory, attempt)
    retention.collect_leftovers(layer, directory, attempt)
    good, broken = scan(directory)
    notes += [_put_away(layer, Path(bad.directory), bad.problem) for bad in broken]
    for manifest in good:
        if manifest.name in doubted:
            continue
        try:
            verify(manifest)
        except CheckpointCorruptError as error:
            notes.append(_put_away(layer, Path(manifest.directory), str(error)))
        else:
            said = [*notes, *(f"{name} is not whole for all ranks: {doubt}" for name, doubt in doubted.items())]
            if said:
                said.append(f"continuing from {manifest.name}, the newest checkpoint that verifies")
            return Choice(manifest, tuple(said))
    if doubted:
        raise CheckpointError(
            f"no checkpoint is whole for all ranks: {'; '.join(doubted.values())}. {str(directory)!r} must be one directory "
            "for all ranks, across hosts too."
        )
    if notes:
        notes.append("no checkpoint verifies: starting from nothing")
    return Choice(None, tuple(notes))


def _put_away(layer: FileLayer, path: Path, problem: str) -> str:
    note = f"{problem}; moved to {retention.quarantine(layer, path)}"
    log.warning("%s", note)
    return note


def load_all(
    coordinator: Coordinator,
    objects: TrackedObjects,
    choice: Choice,
    *,
    seed: int,
    surroundings: Surroundings,
    timeout: float,
) -> Restored:
    """Loads the chosen checkpoint into the tracked objects and the generators of this rank.

    Returns on every rank once all ranks have loaded. Raises on every rank when one could not: ConfigError for what changed and
    may not, StateMissingError for names or states that do not fit (nothing was touched by these if names differ),
    CheckpointError otherwise, PeerLostError for ranks that did not come within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    manifest = choice.manifest
    assert manifest is not None
    notes = list(choice.notes)
    consequence = f"{manifest.name} was not restored"
    failure = _failure(coordinator.rank, lambda: notes.extend(_check(objects, manifest, surroundings)))
    _agree(coordinator, "ckpt/restore/names", failure, deadline, consequence)
    failure = _failure(coordinator.rank, lambda: notes.extend(_load(coordinator, objects, manifest, seed)))
    _agree(coordinator, "ckpt/restore/loaded", failure, deadline, consequence)
    rank = coordinator.rank
    return Restored(manifest, manifest.runs[rank] if rank < len(manifest.runs) else None, tuple(notes))


def _check(objects: TrackedObjects, manifest: Manifest, here: Surroundings) -> list[str]:
    """Everything that can be told before a byte of state is read; what is to be said of it."""
    _check_names(objects, manifest)
    return [
        *changes.check_config(manifest.name, manifest.config_hash, manifest.config, here.config, here.config_changes),
        *changes.check_environment(manifest.name, manifest.environment, here.facts(), here.environment_changes),
    ]


def check_later(
    coordinator: Coordinator,
    name: str,
    manifest: Manifest,
    *,
    here: Surroundings,
    config: Mapping[str, Any],
    timeout: float,
) -> None:
    """All ranks, in step: see `Checkpointer.check_config`."""
    word = None
    if coordinator.rank == 0:
        now = changes.set_later(here.config, config)
        verdict = _failure(0, lambda: changes.check_later(manifest.name, manifest.set_later, now, here.config_changes))
        word = msgspec.msgpack.encode(verdict)
    failure = msgspec.msgpack.decode(coordinator.agree(name, word, timeout), type=Failure | None)
    raise_failures([failure] if failure is not None else [], f"{manifest.name} cannot be gone on from")


def _failure(rank: int, act: Callable[[], object]) -> Failure | None:
    try:
        act()
    except Exception as error:  # noqa: BLE001  (told to all ranks and raised on each)
        return Failure.of(rank, error)
    return None


def _agree(coordinator: Coordinator, name: str, failure: Failure | None, deadline: float, consequence: str) -> None:
    words = coordinator.gather(name, msgspec.msgpack.encode(failure), max(0.0, deadline - time.monotonic()))
    said = [msgspec.msgpack.decode(word, type=Failure | None) for word in words]
    raise_failures([one for one in said if one is not None], consequence)


def _check_names(objects: TrackedObjects, manifest: Manifest) -> None:
    held, wanted = {*manifest.shared, *manifest.per_rank}, {*objects.shared, *objects.per_rank}
    missing, unexpected = sorted(wanted - held), sorted(held - wanted)
    if missing or unexpected:
        raise StateMissingError(
            f"{manifest.directory} does not hold what this job tracks: missing in the checkpoint {missing}, "
            f"in the checkpoint but not tracked {unexpected}. Track the same names, or use a new directory."
        )
    moved = sorted(set(objects.shared) & set(manifest.per_rank) | set(objects.per_rank) & set(manifest.shared))
    if moved:
        raise StateMissingError(f"{moved} in {manifest.directory} changed between per_rank=True and per_rank=False")
    objects.check_kinds(manifest.kinds, manifest.name)


def _load(coordinator: Coordinator, objects: TrackedObjects, manifest: Manifest, seed: int) -> list[str]:
    directory, rank, notes = Path(manifest.directory), coordinator.rank, []
    _load_part(directory / SHARED, adapted(objects.shared), manifest)
    if coordinator.world_size != manifest.world_size:
        notes.append(f"the checkpoint was made by {manifest.world_size} ranks; this job has {coordinator.world_size}")
    if objects.per_rank and rank == 0 and coordinator.world_size < manifest.world_size:
        gone = f"ranks {coordinator.world_size} to {manifest.world_size - 1}"
        notes.append(f"what {gone} held for themselves is not used: {sorted(objects.per_rank)}")
    if rank < manifest.world_size:
        states = _load_part(directory / rank_directory(rank), objects.per_rank, manifest)
        # Last: nothing between here and the training loop draws random numbers.
        notes.extend(rng.restore(states.get(RNG, {})))
        return notes
    rng.derive(seed, manifest.step, rank)
    notes.append(f"rank {rank} is new: its random generators are seeded from (seed {seed}, step {manifest.step}, rank {rank})")
    if objects.per_rank:
        notes.append(f"rank {rank} is new: {sorted(objects.per_rank)} start as this job built them")
    return notes


def _load_part(directory: Path, targets: dict[str, Stateful], manifest: Manifest) -> dict[str, Any]:
    try:
        structures = tree.decode((directory / STATE).read_bytes())
        files = TensorFiles(directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be read: {error}. All ranks must see one checkpoint directory, across hosts too."
        ) from error
    states = {
        name: tree.join(structure, tracked.tensors_for(name, targets.get(name), tree.template(structure), files))
        for name, structure in structures.items()
    }
    for name, target in targets.items():
        tracked.load(name, target, states[name], f"{manifest.name}/{directory.name}")
    return states
