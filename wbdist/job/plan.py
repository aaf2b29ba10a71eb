"""What all ranks of a job must agree on before the first step."""

from __future__ import annotations

import logging
import os
import random
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from wbdist.checkpoint.claim import Claim
from wbdist.checkpoint.copying import Elsewhere
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import Manifest
from wbdist.core.coordination import Coordinator
from wbdist.core.mixing import mix64
from wbdist.core.position import RunPosition
from wbdist.errors import Error
from wbdist.job.telling import cause_of_restart
from wbdist.run.lifecycle import RunSpec

log = logging.getLogger("wbdist.job")


class Plan(msgspec.Struct, frozen=True):
    """What rank 0 decides at the start and every rank follows."""

    run_id: str
    attempt: int
    nonce: str
    cause: str


def without_directory(spec: RunSpec, asked: RunSpec, *, restarted: bool) -> Plan:
    """Rank 0: the plan of a job that saves nothing: a new run, or the next attempt of the one whose id was given, from step 0.

    `asked`: the spec by whose id the job's runs are known. Blocks and raises as `anew.begun`.
    """
    from wbdist.run import anew

    found = anew.begun(asked, restarted=restarted, resumable=False, say=False)  # the job says what goes on
    cause = os.environ.get("WBDIST_CAUSE", "")
    return Plan(spec.run_id, found.attempt, secrets.token_hex(8), cause or found.cause)


def decide(spec: RunSpec, run_id: str | None, directory: Path, copies: Elsewhere | None, stack: ExitStack) -> Plan:
    """Rank 0: the plan of this attempt of the job in `directory`, which is claimed, and released by `stack`.

    With `copies` the attempt begins there too, and the newest checkpoint is brought here. `run_id` is the id asked for, None
    for the directory's. Blocks at most `settings.claim_timeout` seconds, and for the download. Raises JobAlreadyRunningError,
    FencedError, CheckpointError.
    """
    cause = os.environ.get("WBDIST_CAUSE", "")
    if copies is not None:
        copies.adopt(directory)
    cause = cause or cause_of_restart(directory)
    claim = Claim.take(
        directory,
        run_id=run_id,
        project=spec.project,
        entity=spec.entity,
        name=spec.name,
        cause=cause,
        timeout=spec.settings.claim_timeout,
    )
    stack.callback(claim.release)
    if copies is not None:
        copies.take_over(FileLayer(), claim)
    return Plan(claim.job.run_id, claim.attempt.number, claim.attempt.nonce, claim.attempt.cause)


def agree_on_plan(peers: Coordinator, decide_here: Callable[[], Plan], timeout: float) -> Plan:
    """All ranks, in step: rank 0 calls `decide_here`; its plan, or its error, becomes everybody's.

    Blocks at most `timeout` seconds besides what deciding takes. Raises rank 0's error, on the others as an Error with its
    message and exit code; PeerLostError when rank 0 does not answer.
    """
    answer: dict[str, Any] = {}
    if peers.rank == 0:
        try:
            answer = {"plan": msgspec.to_builtins(decide_here())}
        except Error as error:
            refusal = {"error": str(error), "exit_code": error.exit_code}
            peers.agree("job/plan", msgspec.json.encode(refusal), timeout)
            raise
    told = peers.agree("job/plan", msgspec.json.encode(answer) if peers.rank == 0 else None, timeout)
    answer = msgspec.json.decode(told)
    if "error" in answer:
        refused = Error(f"rank 0 could not start the job: {answer['error']}")
        refused.exit_code = int(answer["exit_code"])
        raise refused
    return msgspec.convert(answer["plan"], Plan)


def position_of(chosen: Manifest | None, wanted: str, slot: int, parked: Mapping[str, RunPosition]) -> RunPosition | None:
    """Where this rank's run `wanted` continues, None when it starts from nothing: no checkpoint, a slot that there never was,
    or a checkpoint made under another strategy, whose history lies in other runs.

    `parked`: where runs stood that are not in this checkpoint, since it was made by fewer ranks.
    """
    if chosen is None:
        return None
    for position in chosen.runs:
        if position.run_id == wanted:
            return position
    if slot == 0 and wanted not in parked:
        log.warning(
            "checkpoint %s was made under another strategy: its history is in run %s, this job's goes on in %s",
            chosen.name,
            chosen.runs[0].run_id,
            wanted,
        )
    return parked.get(wanted)


def seed_everything(seed: int, rank: int) -> None:
    """Seeds Python's, NumPy's (when loaded) and torch's generators from (seed, rank): different on each rank, so that dropout
    is; DDP makes the ranks' initial weights alike by broadcasting rank 0's.
    """
    value = mix64(seed, rank)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)
    import torch

    torch.manual_seed(value >> 1)
