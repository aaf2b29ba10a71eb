"""`checkpoints()`: the checkpointer without a run: for scripts that track themselves, or elsewhere."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from wbdist.checkpoint.checkpointer import Checkpointer
from wbdist.checkpoint.claim import Claim
from wbdist.distributed import coordination
from wbdist.distributed.identity import detect
from wbdist.job import one_open
from wbdist.job.plan import Plan, agree_on_plan

PEER_TIMEOUT = 120.0
"""Seconds a rank waits for its peers at the start."""


@contextmanager
def checkpoints(
    directory: str | os.PathLike[str],
    *,
    save_every: str | int | None = None,
    keep_last: int = 2,
    keep_every: int | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    config_changes: str | Iterable[str] | None = None,
    environment_changes: str | Iterable[str] | None = None,
) -> Generator[Checkpointer, None, None]:
    """A Checkpointer on `directory`, which this job holds until the block ends. All ranks, in step, on the training thread.

        with wbdist.checkpoints("ckpt", save_every="10 minutes") as saved:
            saved.track(model=model, optimizer=optimizer)
            restored = saved.restore()
            for step in range(restored.step if restored else 0, 1000):
                train(step)
                saved.maybe_save(step + 1)

    Ranks are found as `wbdist.job` finds them; each start is the directory's next attempt. Blocks at most PEER_TIMEOUT seconds
    on peers. At the end the save in the background is waited for; after an error, for a moment only. Arguments as of
    Checkpointer. Raises JobAlreadyRunningError, CheckpointError, PeerLostError, UsageError.
    """
    identity = detect()
    path = Path(directory).absolute()
    with ExitStack() as stack:
        peers = coordination.connect(identity, one_open.incarnation(), timeout=PEER_TIMEOUT)
        stack.callback(peers.close)

        def decide() -> Plan:
            claim = Claim.take(path, run_id=None, project="", entity="", name=None, cause=os.environ.get("WBDIST_CAUSE", ""))
            stack.callback(claim.release)
            return Plan(claim.job.run_id, claim.attempt.number, claim.attempt.nonce, claim.attempt.cause)

        plan = agree_on_plan(peers, decide, PEER_TIMEOUT)
        made = Checkpointer(
            path,
            peers,
            attempt=plan.attempt,
            keep_last=keep_last,
            keep_every=keep_every,
            save_every=save_every,
            seed=seed,
            config=config,
            config_changes=config_changes or os.environ.get("WBDIST_CONFIG_CHANGES") or "error",
            environment_changes=environment_changes or os.environ.get("WBDIST_ENVIRONMENT_CHANGES") or "error",
        )
        yield stack.enter_context(made)
