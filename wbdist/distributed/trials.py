"""The trial of a sweep that a job of many ranks is: found by one rank, the same on all."""

from __future__ import annotations

from typing import Any

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.errors import UsageError
from wbdist.run import trial
from wbdist.run.lifecycle import RunSpec
from wbdist.run.trial import Trial


class _Told(msgspec.Struct):
    """What a rank was started with."""

    sweep_id: str = ""
    parameters: dict[str, Any] | None = None
    error: str = ""


def as_shared_trial(peers: Coordinator, name: str, spec: RunSpec, timeout: float) -> RunSpec:
    """All ranks, in step: `spec` as the trial that rank 0 was started for, with its parameters; as it is when it was for none.

    The file with the parameters lies where the agent runs, which need not be rank 0's host after an elastic restart: the lowest
    rank that can read it speaks for all. Blocks at most `timeout` seconds. Raises UsageError on all ranks when none can read
    it, and when another rank was started for a trial that rank 0 does not know of; PeerLostError.
    """
    gathered = peers.gather(name, msgspec.msgpack.encode(_read(spec)), timeout)
    told = [msgspec.msgpack.decode(part, type=_Told) for part in gathered]
    first = told[0]
    knowing = [rank for rank, one in enumerate(told) if one != _Told()]
    if not knowing:
        return spec
    if knowing[0] != 0:
        raise UsageError(
            f"rank {knowing[0]} was started for a sweep's trial (WANDB_SWEEP_ID, WANDB_SWEEP_PARAM_PATH) and rank 0 was not; "
            "give the agent's environment to all ranks, or to none"
        )
    parameters = next((one.parameters for one in told if one.parameters is not None), None)
    if parameters is None and first.error:
        raise UsageError(f"on no rank; rank 0: {first.error}" if peers.world_size > 1 else first.error)
    return trial.as_trial(spec, Trial(first.sweep_id, parameters or {}))


def _read(spec: RunSpec) -> _Told:
    settings = spec.settings
    try:
        found = trial.read(settings)
    except UsageError as error:
        return _Told(settings.sweep_id or "", error=str(error))
    if found is None:
        return _Told()
    return _Told(found.sweep_id, found.parameters if settings.sweep_param_path else None)
