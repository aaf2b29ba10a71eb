"""The sample ledger: which samples each step used, kept in the run's own history, and the proof that each was used once.

A step's row carries, beside the fingerprint `_samples` and `epoch`:

    _consumed   global position in the epoch after the step
    _batch      positions that the step took, over all ranks
    _data       what the order depends on; in the first row of each epoch only, so that a resumed history is the same

The history is the ledger because it is exactly once already: what a killed attempt did beyond its checkpoint is not in it. An
audit needs nothing else, neither data set nor checkpoints: the order of an epoch is a function of what `_data` says, so every
fingerprint can be computed anew. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from heapq import merge
from itertools import groupby, pairwise
from typing import Any

import msgspec
import numpy as np

from wbdist.errors import UsageError
from wbdist.hooks.sampler import FINGERPRINT_MODULUS, Ids, ResumableSampler, epoch_order, fingerprint

COLUMNS = ("_step", "_samples", "epoch", "_consumed", "_batch")
"""Of every row of the ledger; `_data` is in the first of an epoch."""
_DATA = re.compile(r"seed=(-?\d+) length=(\d+) shuffle=([01])")
_NAMED = 12
"""Samples named in a message."""


class Order(msgspec.Struct, frozen=True):
    """What the order of an epoch depends on."""

    seed: int
    length: int
    shuffle: bool

    def __str__(self) -> str:
        return f"seed={self.seed} length={self.length} shuffle={int(self.shuffle)}"

    @classmethod
    def of(cls, sampler: ResumableSampler) -> Order:
        return cls(sampler.seed, sampler.length, sampler.shuffle)

    @classmethod
    def parse(cls, text: str) -> Order:
        """What `str` of one says. Raises UsageError for anything else."""
        match = _DATA.fullmatch(text)
        if match is None:
            raise UsageError(f"column _data holds {text!r}, not what a ResumableLoader writes: 'seed=1 length=100 shuffle=1'")
        return cls(int(match[1]), int(match[2]), match[3] == "1")

    def ids(self, epoch: int) -> Ids:
        """The samples of an epoch by position."""
        return epoch_order(self.seed, epoch, self.length) if self.shuffle else np.arange(self.length, dtype=np.int64)


class EpochAudit(msgspec.Struct, frozen=True):
    """What became of the samples of one epoch. Counts are samples, but `steps`."""

    epoch: int
    length: int
    steps: int
    once: int
    doubled: int
    missing: int
    left_out: int
    """Fewer than a global batch at the end: `tail="drop"`."""
    to_come: int
    """Of the last epoch in the ledger: not used yet."""


class Audit(msgspec.Struct, frozen=True):
    """What the ledger proves."""

    epochs: tuple[EpochAudit, ...]
    problems: tuple[str, ...]
    """One sentence each: doubled, missing or other samples than the order has. None: each was used once, in order."""


class _Step(msgspec.Struct, frozen=True):
    step: int
    epoch: int
    start: int
    stop: int


def audit(runs: Iterable[Iterable[Mapping[str, Any]]], orders: Mapping[int, Order]) -> Audit:
    """Checks a job's ledger: the rows with COLUMNS of its one run, or of its ranks' runs, whose fingerprints add up.

    `orders`: step -> what `_data` says from that step on. Rows of one run come by ascending step. Reads each once; memory is
    some 100 bytes a step. Raises UsageError when there is no row or no order.
    """
    problems: list[str] = []
    taken: dict[int, list[_Step]] = {}
    of_epoch: dict[int, Order] = {}
    known: tuple[tuple[int, Order], Ids] | None = None
    changes, order = sorted(orders.items()), None
    for number, rows in groupby(_by_step(runs), key=lambda row: int(row["_step"])):
        while changes and changes[0][0] <= number:
            order = changes.pop(0)[1]
        if order is None:
            raise UsageError(f"the ledger begins at step {number} without _data: rows before it are not in this history")
        step, found = _join(number, list(rows), problems)
        if step is None:
            continue
        if known is None or known[0] != (step.epoch, order):
            known = (step.epoch, order), order.ids(step.epoch)
        positions = range(step.start, step.stop)
        expected = fingerprint(step.epoch, positions, known[1][np.arange(step.start, step.stop) % order.length])
        if found != expected:
            problems.append(
                f"step {number} used other samples than positions {step.start} to {step.stop - 1} of epoch {step.epoch} hold: "
                f"its fingerprint is {found}, theirs {expected}"
            )
        taken.setdefault(step.epoch, []).append(step)
        of_epoch[step.epoch] = order
    if not taken:
        raise UsageError("no row of this history has a sample ledger: it was logged without job.steps(), or by an older wbdist")
    last = max(taken)
    problems += [
        f"no step of epoch {epoch} is in the history, but epoch {last} is" for epoch in range(last) if epoch not in taken
    ]
    epochs = []
    for epoch, steps in sorted(taken.items()):
        following = taken.get(epoch + 1, [])
        batch = max(one.stop - one.start for one in [*steps[-1:], *following[:1]])
        epochs.append(_epoch(steps, of_epoch[epoch], batch, problems, is_last=epoch == last))
    return Audit(tuple(epochs), tuple(problems))


def _by_step(runs: Iterable[Iterable[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    return merge(*runs, key=lambda row: int(row["_step"]))


def _join(number: int, rows: list[Mapping[str, Any]], problems: list[str]) -> tuple[_Step | None, int]:
    """One step of what all runs say of it, and the sum of their fingerprints."""
    said = {(int(row["epoch"]), int(row["_consumed"]), int(row["_batch"])) for row in rows}
    if len(said) > 1:
        problems.append(f"the ranks do not agree which samples step {number} used: (epoch, consumed, batch) are {sorted(said)}")
        return None, 0
    epoch, stop, batch = said.pop()
    return _Step(number, epoch, stop - batch, stop), sum(int(row["_samples"]) for row in rows) % FINGERPRINT_MODULUS


def _epoch(steps: list[_Step], order: Order, batch: int, problems: list[str], *, is_last: bool) -> EpochAudit:
    """Sweeps over the epoch's positions; what is wrong is added to `problems`."""
    epoch, length = steps[0].epoch, order.length
    ids: Ids | None = None

    def named(start: int, stop: int) -> str:
        nonlocal ids
        ids = order.ids(epoch) if ids is None else ids
        some = ", ".join(map(str, ids[start : min(stop, start + _NAMED)].tolist()))
        return f"positions {start} to {stop - 1} (samples {some}{', ...' if stop - start > _NAMED else ''})"

    covered = doubled = missing = 0
    holder = steps[0].step
    for one in sorted(steps, key=lambda one: (one.start, one.stop)):
        start, stop = min(one.start, length), min(one.stop, length)
        if start > covered:
            missing += start - covered
            problems.append(f"epoch {epoch}: no step used {named(covered, start)}")
        if start < covered:
            doubled += min(covered, stop) - start
            problems.append(f"epoch {epoch}: steps {holder} and {one.step} both used {named(start, min(covered, stop))}")
        if stop > covered:
            covered, holder = stop, one.step
    if missing == doubled == 0:
        problems += [
            f"epoch {epoch}: step {after.step} used positions that come before those of step {before.step}"
            for before, after in pairwise(steps)
            if after.start < before.start
        ]
    rest = length - covered
    left_out = rest if rest < batch else 0
    to_come = rest if is_last and not left_out else 0
    if rest and not left_out and not to_come:
        missing += rest
        problems.append(f"epoch {epoch}: no step used {named(covered, length)}")
    once = length - doubled - missing - left_out - to_come
    return EpochAudit(epoch, length, len(steps), once, doubled, missing, left_out, to_come)
