"""A job with copies on an object store: taking over at the start, shipping in the background. Rank 0 only.

The directory is where checkpoints are made and the store is where they outlive the machine: training waits for the disk
alone. Copies go out by a thread that sleeps in the store's client, which works outside Python's lock; of saves that come faster
than they can be copied, the newest goes next. See docs/adr/0005.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from wbdist.checkpoint import claim, retention
from wbdist.checkpoint.claim import Claim
from wbdist.checkpoint.copies import Copies
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import MANIFEST, Manifest, committed, newest_first, scan, verify
from wbdist.checkpoint.retention import Keep
from wbdist.errors import CheckpointCorruptError, FencedError

log = logging.getLogger("wbdist.checkpoint")

OUTBOX = "outbox"
"""Links to the checkpoint being copied: retention may remove it from the directory meanwhile."""
RETRY = 15.0
"""Seconds after which a copy that failed is tried again."""


class Elsewhere(Protocol):
    """Where a job's checkpoints outlive its machine. Rank 0 only; methods may block for requests, and raise CheckpointError."""

    url: str
    """For people."""
    through_run: bool
    """What is shipped leaves by the run's own way, before the run is finished."""

    def adopt(self, directory: Path) -> None:
        """Before the claim: what is known there of the job becomes known in `directory`."""

    def take_over(self, layer: FileLayer, held: Claim) -> tuple[str, ...]:
        """After the claim: the attempt begins there, and the newest checkpoint that verifies is brought into the directory."""

    def ship(self, manifest: Manifest, source: Path, attempt: int) -> None:
        """Copies a committed checkpoint there. Raises FencedError."""

    def prune(self, keep: Keep, protected: Collection[str | None]) -> None:
        """Removes what `keep` and `protected` do not hold."""


class OnStore:
    """`Elsewhere`: an object store."""

    through_run = False

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.url = copies.url

    def adopt(self, directory: Path) -> None:
        adopt(self.copies, directory)

    def take_over(self, layer: FileLayer, held: Claim) -> tuple[str, ...]:
        return take_over(self.copies, layer, held)

    def ship(self, manifest: Manifest, source: Path, attempt: int) -> None:
        self.copies.ship(manifest, source, attempt)

    def prune(self, keep: Keep, protected: Collection[str | None]) -> None:
        for old in keep.doomed(self.copies.scan()[0]):
            if old.name not in protected:
                self.copies.remove(old.name)


def adopt(copies: Copies, directory: Path) -> None:
    """Before the claim: what the store knows of the job becomes known in `directory`, which may be new or have missed a lot.

    Raises CheckpointError when the directory belongs to another run, or the store cannot be asked.
    """
    job = copies.job()
    if job is not None:
        claim.adopt(directory, job, [begun.attempt for begun in copies.attempts()])


def take_over(copies: Copies, layer: FileLayer, held: Claim) -> tuple[str, ...]:
    """After the claim: begins the attempt at the store, and brings the newest checkpoint that verifies into the directory.

    Blocks for as long as the download takes. Afterwards the directory's newest whole checkpoint is the newest that counts.
    Returns what was not plain, for people. Raises FencedError when another machine has begun this attempt, CheckpointError
    when the store cannot be asked: going on alone could fork the job.
    """
    directory, notes = held.directory, []
    shutil.rmtree(directory / OUTBOX, ignore_errors=True)
    for manifest in committed(directory):
        problem = copies.superseded(manifest)
        if problem is not None:
            notes.append(f"{problem}; moved to {retention.quarantine(layer, Path(manifest.directory))}")
    remote, broken = copies.scan()
    local, _ = scan(directory)
    names = sorted({manifest.name for manifest in [*remote, *local]})
    copies.begin(held.job, held.attempt, names)
    notes += [f"{bad.problem}; noted in {copies.quarantine(Path(bad.directory).name, bad.problem)}" for bad in broken]
    copies.collect_leftovers(held.attempt.number)
    notes += bring_newest(
        layer,
        local,
        remote,
        fetch=lambda manifest: copies.fetch(manifest, layer, directory),
        put_away=lambda manifest, problem: copies.quarantine(manifest.name, problem),
        url=copies.url,
    )
    for note in notes:
        log.warning("%s", note)
    return tuple(notes)


def bring_newest(
    layer: FileLayer,
    local: list[Manifest],
    remote: list[Manifest],
    *,
    fetch: Callable[[Manifest], object],
    put_away: Callable[[Manifest, str], str],
    url: str,
) -> list[str]:
    """Makes the newest checkpoint that verifies, here or elsewhere, lie here; what is bad is put away. Notes for people."""
    notes = []
    for manifest in sorted([*local, *remote], key=newest_first):  # stable: of one that is on both, the local comes first
        try:
            if manifest in local:
                verify(manifest)
            else:
                fetch(manifest)
                notes.append(f"{manifest.name} was fetched from {url}")
        except CheckpointCorruptError as error:
            here = manifest in local
            ward = retention.quarantine(layer, Path(manifest.directory)) if here else put_away(manifest, str(error))
            notes.append(f"{error}; see {ward}")
        else:
            break
    return notes


class Shipping:
    """Copies committed checkpoints to the store, the newest first, on a thread of its own. Made on rank 0; `close` it."""

    def __init__(
        self,
        copies: Elsewhere,
        directory: Path,
        *,
        attempt: int,
        keep: Keep,
        told: Callable[[Manifest, float], None] = lambda manifest, seconds: None,
    ) -> None:
        """What `keep` holds stays at the store, and the one that this attempt started from. `told` is called on the thread that
        copies, with each checkpoint that is there now and the seconds that it took."""
        self._copies = copies
        self._told = told
        self._outbox = directory / OUTBOX
        self._attempt = attempt
        self._keep = keep
        self._changed = threading.Condition()
        self._offered: Manifest | None = None
        self._base: str | None = None
        self._busy = False
        self._closed = False
        self._fenced = ""
        self.problem = ""
        """Why the newest try failed; empty when it did not."""
        self.shipped = ""
        """Name of the newest checkpoint that this process brought to the store."""
        self._thread = threading.Thread(target=self._ship_all, name="wbdist-copies", daemon=True)
        self._thread.start()

    def offer(self, manifest: Manifest, *, base: bool = False) -> None:
        """Ships a committed checkpoint when it is its turn; a newer one takes the place of one that waits. Does not block.

        `base`: it is the one that this attempt started from, and stays at the store.
        """
        kept = self._kept(manifest)
        try:
            for name in (*manifest.files, MANIFEST):
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                (kept / name).hardlink_to(Path(manifest.directory) / name)
        except OSError as error:  # no links here: it goes from where it lies, if it stays that long
            log.info("%s cannot be linked: %s", kept, error)
        with self._changed:
            if base:
                self._base = manifest.name
            if self._offered is not None:
                self._let_go(self._offered)
            self._offered = manifest
            self._changed.notify_all()

    def fenced(self) -> str:
        """Who has taken the job over at the store; '' while nobody has. Any thread; does not block."""
        return self._fenced

    def settle(self, timeout: float) -> str:
        """Waits at most `timeout` seconds until what was offered is at the store; '' when it is, else what is not, and why."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._fenced) or (self._offered is None and not self._busy), timeout)
            if self._fenced:
                return self._fenced
            if self._offered is None and not self._busy:
                return ""
        newest = f"the newest checkpoint there is {self.shipped or 'of an earlier attempt'}"
        return f"not everything is at {self._copies.url} after {timeout:g} s; {newest}. {self.problem}".rstrip()

    def close(self) -> None:
        """Nothing new is begun; what is being copied is left to itself. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _ship_all(self) -> None:
        while not self._fenced:
            with self._changed:
                self._changed.wait_for(lambda: self._offered is not None or self._closed)
                if self._closed or self._offered is None:
                    return
                manifest, self._offered, self._busy = self._offered, None, True
            failed = False
            try:
                self._ship(manifest)
                self.problem = ""
            except FencedError as error:
                self._fenced = str(error)
            except Exception as error:  # noqa: BLE001  (whatever it is, the job goes on, and is told at its end)
                if str(error) != self.problem:
                    log.warning("%s; it is tried again every %g s", error, RETRY)
                self.problem, failed = str(error), True
            with self._changed:
                self._busy = False
                if failed and self._offered is None:
                    self._offered = manifest
                else:
                    self._let_go(manifest)
                self._changed.notify_all()
                if failed:
                    self._changed.wait_for(lambda: self._closed or self._offered is not manifest, RETRY)  # noqa: B023  (asked here and now)

    def _kept(self, manifest: Manifest) -> Path:
        return self._outbox / manifest.name

    def _let_go(self, manifest: Manifest) -> None:
        shutil.rmtree(self._kept(manifest), ignore_errors=True)

    def _ship(self, manifest: Manifest) -> None:
        kept = self._kept(manifest)
        started = time.monotonic()
        self._copies.ship(manifest, kept if (kept / MANIFEST).exists() else Path(manifest.directory), self._attempt)
        self.shipped = manifest.name
        seconds = time.monotonic() - started
        log.info("%s is at %s after %.1f s", manifest.name, self._copies.url, seconds)
        self._told(manifest, seconds)
        self._copies.prune(self._keep, {self._base, manifest.name})
