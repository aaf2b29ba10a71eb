"""What is removed from a checkpoint directory, and when. Rank 0 only.

Removal renames first, so that a removal cut short leaves a leftover and never half a checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from math import isfinite
from pathlib import Path

import msgspec

from wbdist.checkpoint.best import Goal
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import QUARANTINE, TEMPORARY, Manifest, committed
from wbdist.errors import FencedError, UsageError

log = logging.getLogger("wbdist.checkpoint")
_OWNED = re.compile(r"step-\d+\.a(\d+)(?:\..*)?")


def newest_attempt(directory: Path) -> int:
    """The highest attempt that left any trace in `directory`: a checkpoint, a leftover, or a claim; 0 when none did."""
    found = [int(match[1]) for path in directory.glob("step-*") if (match := _OWNED.fullmatch(path.name))]
    found += [int(path.stem) for path in (directory / "attempts").glob("*.json") if path.stem.isdigit()]
    return max(found, default=0)


def check_fence(directory: Path, attempt: int) -> None:
    """Raises FencedError when a newer attempt works on `directory`: an older one must not write there any more."""
    newest = newest_attempt(directory)
    if newest > attempt:
        raise FencedError(
            f"attempt {newest} has taken over {str(directory)!r}; this process belongs to attempt {attempt} and must stop"
        )


def collect_leftovers(layer: FileLayer, directory: Path, attempt: int) -> None:
    """Removes what attempts up to `attempt` began to write or to remove and did not finish."""
    for path in sorted(directory.glob(f"step-*{TEMPORARY}")):
        match = _OWNED.fullmatch(path.name)
        if match is not None and int(match[1]) <= attempt:
            _remove_tree(layer, path)


class Keep(msgspec.Struct, frozen=True):
    """Which committed checkpoints stay: the union of three rules."""

    last: int = 2
    """The newest ones."""
    every: int | None = None
    """Those of every so many steps, for ever."""
    best: str | None = None
    """`loss`, `min:loss` or `max:accuracy`: the one whose run summary had the lowest or highest value of that metric."""

    def check(self) -> None:
        """Raises UsageError for a rule that cannot be followed."""
        if self.last < 1:
            raise UsageError(f"keep_last={self.last}: at least the newest checkpoint must stay; give 1 or more")
        if self.every is not None and self.every < 1:
            raise UsageError(f"keep_every={self.every}: give a number of steps, 1 or more")
        if self.best is not None:
            Goal.parse(self.best, "keep_best")

    def doomed(self, newest_first: Sequence[Manifest]) -> list[Manifest]:
        """Those of the committed checkpoints that no rule keeps."""
        best = self._best(newest_first)
        return [
            manifest
            for manifest in newest_first[self.last :]
            if manifest is not best and (self.every is None or manifest.step % self.every != 0)
        ]

    def _best(self, newest_first: Sequence[Manifest]) -> Manifest | None:
        if self.best is None:
            return None
        goal = Goal.parse(self.best, "keep_best")
        # A summary tells of the last step that logged the metric; who saved because of it knows better.
        told = [
            (goal.cost(manifest.best.value), manifest)
            for manifest in newest_first
            if manifest.best is not None and manifest.best.goal == str(goal) and manifest.best.step == manifest.step
        ]
        if told:
            return min(told, key=lambda pair: pair[0])[1]
        known = [(manifest, manifest.run.summary.get(goal.metric)) for manifest in newest_first]
        rated = [
            (goal.cost(float(value)), manifest)
            for manifest, value in known
            if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        ]
        # Of equals the newest: `min` takes the first.
        return min(rated, key=lambda pair: pair[0])[1] if rated else None


def prune(layer: FileLayer, directory: Path, keep: Keep, protected: Collection[str | None]) -> list[Manifest]:
    """Removes all committed checkpoints but those that `keep` and `protected` (by name) hold; returns the removed.

    Call it only once the newest is durable. What cannot be removed is logged and tried again after the next save.
    """
    doomed = [manifest for manifest in keep.doomed(committed(directory)) if manifest.name not in protected]
    return [manifest for manifest in doomed if remove(layer, manifest)]


def remove(layer: FileLayer, manifest: Manifest) -> bool:
    """Removes one checkpoint; False, and a line in the log, when the system does not let us."""
    path = Path(manifest.directory)
    doomed = path.with_name(path.name + ".removed" + TEMPORARY)
    try:
        layer.rename(path, doomed)
        layer.sync_directory(path.parent)
    except OSError as error:
        log.warning("checkpoint %s cannot be removed: %s", path, error)
        return False
    return _remove_tree(layer, doomed)


def _remove_tree(layer: FileLayer, path: Path) -> bool:
    try:
        layer.remove_tree(path)
    except OSError as error:
        log.warning("leftover %s cannot be removed: %s", path, error)
        return False
    return True


def quarantine(layer: FileLayer, path: Path) -> Path:
    """Moves a bad checkpoint where nothing looks for one, kept for people; returns where it went."""
    ward = path.parent / QUARANTINE
    layer.make_directory(ward)
    target, n = ward / path.name, 2
    while target.exists():
        target, n = ward / f"{path.name}.{n}", n + 1
    layer.rename(path, target)
    layer.sync_directory(ward)
    layer.sync_directory(path.parent)
    return target
