"""`init_ranks()`: `init` for a script that every rank runs: one run of all ranks, or a run a rank in one group. No more."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.distributed import coordination, opening, own_runs, strategies
from wbdist.distributed.identity import detect
from wbdist.distributed.lateness import LatePolicy
from wbdist.distributed.opening import Opened
from wbdist.distributed.same_arguments import check_same
from wbdist.distributed.trials import as_shared_trial
from wbdist.errors import Error, UsageError
from wbdist.run import lifecycle, process_end
from wbdist.run.handle import Run
from wbdist.run.init import SETTING_OF, make_spec
from wbdist.run.lifecycle import RunSpec
from wbdist.run.main_guard import check_child
from wbdist.settings import resolve

PEER_TIMEOUT = 120.0
"""Seconds a rank waits for the others to come."""
_opened = itertools.count()
"""Counts calls: all ranks make them in step, on one store."""
_TAKEN = frozenset({"entity", "mode", "force", *SETTING_OF})


def init_ranks(
    project: str | None = None,
    *,
    strategy: strategies.Strategy = "auto",
    late: LatePolicy | None = None,
    config: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Run:
    """This rank's handle on the run or runs of all ranks, as the global run. All ranks, in step, with the same arguments.

        run = wbdist.init_ranks(project="digits", config={"lr": 0.1})    # torchrun, srun, mpirun, wbdist launch, or alone
        for step in range(100):
            wbdist.log({"loss": loss}, step=step)                         # one row of all ranks: the mean

    Which ranks there are is found as `wbdist.job` finds it, and `strategy` and `late` are its; under rank0 a value is the mean
    over the ranks, unless `run.define_reduction({"tokens": "sum"})` said otherwise before. `arguments` are those of `init`:
    entity, id, name, notes, tags, group, job_type, dir, mode, force. Rank 0's config is every rank's, and so are the parameters
    of a sweep's trial (docs/sweeps.md). Nothing is saved, no signal is watched, no process group made: that is `wbdist.job`. So
    when a launcher starts the ranks again, a run whose `id` was given begins anew, as its next attempt. An open run of this
    process is finished first.

    Blocks until all ranks are here, at most PEER_TIMEOUT seconds, and then as `strategies.open_runs`. Finishing is `finish`, on
    every rank, or the end of the process. Raises UsageError (on all ranks when some were given another strategy),
    PeerLostError, and on all ranks what opening raised on one.
    """
    check_child("wbdist.init_ranks()")
    if unknown := sorted(set(arguments) - _TAKEN):
        raise UsageError(
            f"init_ranks({unknown[0]}=...) is not one of its arguments: {', '.join(sorted(_TAKEN))}. A run of several ranks "
            "that goes on from where it stood is a wbdist.job(checkpoint_dir=...)"
        )
    given = {SETTING_OF.get(name, name): value for name, value in arguments.items() if value is not None}
    settings = resolve(None, given if project is None else {**given, "project": project}, as_trial=True)
    if settings.resume or settings.resume_from or settings.fork_from:
        raise UsageError("init_ranks() begins a new run; one that goes on is a wbdist.job(checkpoint_dir=...)")
    identity = detect()
    lifecycle.finish_previous()
    process_end.chain_excepthook()
    spec = make_spec(settings, config=config)
    peers = coordination.connect(identity, os.environ.get("WBDIST_INCARNATION"), timeout=PEER_TIMEOUT)
    try:
        place = f"ranks/{next(_opened)}"
        check_same(peers, f"{place}/same", identity, PEER_TIMEOUT, strategy=strategy, mode=settings.mode)
        spec = as_shared_trial(peers, f"{place}/trial", spec, PEER_TIMEOUT)
        spec = _begun(peers, place, spec, strategy, restarted=identity.restart > 0)
        run = strategies.open_runs(strategy, identity, peers, spec, late).run
    except BaseException:
        peers.close()
        raise
    run.on_finish(peers.close)
    run.belongs_to_script()
    lifecycle.set_current(run)
    return run


class _Begun(msgspec.Struct):
    run_id: str = ""
    nonce: str = ""
    attempt: int = 1
    cause: str = ""
    refusal: Opened = msgspec.field(default_factory=Opened)


def _begun(peers: Coordinator, name: str, spec: RunSpec, strategy: str, *, restarted: bool) -> RunSpec:
    """All ranks, in step: the spec of the attempt that rank 0 begins."""
    if peers.rank == 0:
        from wbdist.run import anew

        try:
            asked = own_runs.first_spec(spec) if strategy == "per_rank" else spec
            found = anew.begun(asked, restarted=restarted, resumable=False)
        except Error as error:
            peers.agree(name, msgspec.msgpack.encode(_Begun(refusal=opening.refusal_of(error))), PEER_TIMEOUT)
            raise
        told = _Begun(spec.run_id, secrets.token_hex(8), found.attempt, found.cause)
        peers.agree(name, msgspec.msgpack.encode(told), PEER_TIMEOUT)
    else:
        told = msgspec.msgpack.decode(peers.agree(name, None, PEER_TIMEOUT), type=_Begun)
        opening.raise_refusal(told.refusal)
    return msgspec.structs.replace(
        spec,
        run_id=told.run_id,
        nonce=told.nonce,
        attempt=told.attempt,
        cause=told.cause,
        must_be_new=spec.id_is_given and told.attempt == 1,
    )
