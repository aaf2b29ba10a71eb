"""Which of a job's runs a rank continues under strategy `per_rank`, when ranks come, go and are numbered anew.

An elastic launcher numbers ranks from 0 each time, so after a host is gone the others' ranks are new ones, and a rank's run
would go on with another machine's numbers. A *slot* stays: who was at a place (host and local rank) has its slot again, and
who is new takes the lowest that is free, also one whose place is gone.

    slots.json    beside the checkpoints, written by rank 0 at the start of an attempt: the place of each slot there ever was,
                  and where the runs of slots stood that the attempt goes on without

A run whose slot comes back goes on where it stood in the last checkpoint it was part of; the steps in between are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from wbdist.checkpoint.manifest import Manifest
from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition
from wbdist.errors import CheckpointError

FILE = "slots.json"


class Slots(msgspec.Struct):
    """What `slots.json` holds."""

    places: dict[int, str] = {}
    parked: dict[str, RunPosition] = {}
    """run id -> where it stood, of runs that the newest attempt's first checkpoint does not have."""


class Slot(msgspec.Struct, frozen=True):
    number: int
    parked: dict[str, RunPosition]
    """As in `Slots`."""


def assign(known: Mapping[int, str], places: Sequence[str], *, trial: bool = False) -> list[int]:
    """The slot of each place, by rank; `known` are the places of the slots there were. All slots are different.

    With `trial` somebody has slot 0, whose run is all that a sweep sees of the job: the place of the lowest slot, if need be.
    """
    slots: list[int | None] = []
    free = dict(known)
    for place in places:
        slot = min((number for number, was in free.items() if was == place), default=None)
        slots.append(slot)
        if slot is not None:
            del free[slot]
    taken = {slot for slot in slots if slot is not None}
    lowest = iter(number for number in range(len(places) + len(known)) if number not in taken)
    found = [next(lowest) if slot is None else slot for slot in slots]
    if trial and 0 not in found:
        found[found.index(min(found))] = 0
    return found


def take(
    peers: Coordinator, directory: Path, place: str, chosen: Manifest | None, timeout: float, *, trial: bool = False
) -> Slot:
    """All ranks, in step, after the checkpoint was chosen: this rank's slot; `trial` as for `assign`.

    Blocks at most `timeout` seconds a wait.
    Raises CheckpointError, on all ranks, when `slots.json` cannot be read or written; PeerLostError.
    """
    places = [each.decode() for each in peers.gather("slots/places", place.encode(), timeout)]
    if peers.rank != 0:
        told = msgspec.json.decode(peers.agree("slots/told", None, timeout), type=dict[str, msgspec.Raw])
        if "error" in told:
            raise CheckpointError(msgspec.json.decode(told["error"], type=str))
        before = msgspec.json.decode(told["slots"], type=Slots)
        return Slot(assign(before.places, places, trial=trial)[peers.rank], before.parked)
    file = directory / FILE
    try:
        before = msgspec.json.decode(file.read_bytes(), type=Slots) if file.exists() else Slots()
        slots = assign(before.places, places, trial=trial)
        here = {} if chosen is None else {position.run_id: position for position in chosen.runs}
        parked = {**before.parked, **here}
        _write(file, Slots(before.places | dict(zip(slots, places, strict=True)), parked))
    except (OSError, msgspec.DecodeError) as problem:
        error = CheckpointError(f"{file} keeps which rank has which run, and could not be read or written: {problem}")
        peers.agree("slots/told", msgspec.json.encode({"error": str(error)}), timeout)
        raise error from problem
    peers.agree("slots/told", msgspec.json.encode({"slots": before}), timeout)
    return Slot(slots[0], before.parked)


def _write(file: Path, slots: Slots) -> None:
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as out:
        out.write(msgspec.json.encode(slots))
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
