"""The trial of a sweep that a job of many ranks is: found by one rank, the same on all."""

from __future__ import annotations

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.errors import UsageError
from wbdist.run import trial
from wbdist.run.lifecycle import RunSpec
from wbdist.run.trial import Trial


class _Told(msgspec.Struct):
    trial: Trial | None = None
    error: str = ""


def as_shared_trial(peers: Coordinator, name: str, spec: RunSpec, timeout: float) -> RunSpec:
    """All ranks, in step: `spec` as the trial that rank 0's agent started, with its parameters; as it is when there is none.

    The file with the parameters lies where the agent runs, which need not be rank 0's host after an elastic restart: when rank
    0 cannot read it, the lowest rank that can tells the others. Blocks at most `timeout` seconds a wait, of which there are two
    then. Raises UsageError on all ranks when none can read it, PeerLostError.
    """
    if peers.rank == 0:
        told = _read(spec)
        peers.agree(name, msgspec.msgpack.encode(told), timeout)
    else:
        told = msgspec.msgpack.decode(peers.agree(name, None, timeout), type=_Told)
    if told.error:
        own = told if peers.rank == 0 else _read(spec)
        gathered = peers.gather(f"{name}/all", msgspec.msgpack.encode(own), timeout)
        others = [msgspec.msgpack.decode(part, type=_Told) for part in gathered]
        found = next((other for other in others if other.trial is not None), None)
        if found is None:
            raise UsageError(f"on no rank; rank 0: {told.error}" if peers.world_size > 1 else told.error)
        told = found
    return trial.as_trial(spec, told.trial)


def _read(spec: RunSpec) -> _Told:
    try:
        return _Told(trial.read(spec.settings))
    except UsageError as error:
        return _Told(error=str(error))
