"""What the ranks' rows become.

| strategy         | runs                                 | a row is                     | chosen by `auto`           |
|------------------|--------------------------------------|------------------------------|----------------------------|
| `rank0`          | one, `<run_id>`                      | one for all ranks, reduced   | with more than one rank    |
| `per_rank`       | `<run_id>-r<rank>`, group `<run_id>` | this rank's own              | never: it has to be wanted |
| `shared`         | one, `<run_id>`                      | this rank's own, by its step | with mode="shared"         |
| `rank_zero_only` | one, `<run_id>`                      | rank 0's; others are checked | never                      |
| (`plain`)        | one, `<run_id>`                      | this process's own           | with a single rank         |

A process that is alone is `plain` under every strategy but `per_rank`, whose run ids name the rank.
"""

from __future__ import annotations

import itertools
from typing import Literal, get_args

import msgspec

from wbdist.core.coordination import Coordinator
from wbdist.distributed import opening, own_runs
from wbdist.distributed.identity import RankIdentity
from wbdist.distributed.lateness import LatePolicy
from wbdist.distributed.own_runs import OnlyRank0, OwnRun, SharedWriter
from wbdist.distributed.rank0 import FeedRun
from wbdist.distributed.rank_run import RankRun
from wbdist.errors import UsageError
from wbdist.run.lifecycle import RunSpec, open_run

__all__ = ["STRATEGIES", "RankRun", "Strategy", "choose", "open_runs"]

Strategy = Literal["auto", "rank0", "per_rank", "shared", "rank_zero_only"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

_opened = itertools.count()
"""Counts `open_runs` calls: all ranks call it in step, so it names the same opening everywhere."""


def choose(strategy: str, identity: RankIdentity, mode: str) -> tuple[str, str]:
    """The strategy that is meant, and why; the same on all ranks. Raises UsageError for an unknown one."""
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy={strategy!r} is not known; choose one of: {', '.join(STRATEGIES)}")
    size, of = identity.world_size, f"{identity.source}: {identity.reason}" if identity.reason else identity.source
    if mode == "disabled":
        return "plain", 'mode="disabled" keeps nothing'
    if strategy == "per_rank":
        return strategy, f"asked for, with {size} ranks"
    if size == 1:
        return "plain", f"this process is alone ({of})"
    if strategy != "auto":
        return strategy, f"asked for, with {size} ranks"
    if mode == "shared":
        return "shared", f'{size} ranks, and mode="shared"'
    return "rank0", f"{size} ranks ({of}): one run, in which a value is the mean over the ranks unless log() says otherwise"


def open_runs(
    strategy: str, identity: RankIdentity, coordinator: Coordinator, spec: RunSpec, late: LatePolicy | None = None
) -> RankRun:
    """All ranks, in step: opens this rank's part of the job's run or runs.

    `spec` is the job's: its `run_id` the job's, its `base` this rank's position in the checkpoint it continues from (or
    None); writer, role and rank are filled in here. Rank 0's config is every rank's (under per_rank what a rank has of its own
    stays). A server that is away is found out by rank 0, said in one line, and no error: all ranks go on with their journals.

    `late`: under rank0, which ranks a step waits for; None: all that live.

    Blocks at most twice OPEN_TIMEOUT seconds, in practice as long as rank 0 waits for its server. Raises UsageError for an
    unknown strategy; whatever opening a run raises on any rank is raised on all, and no run stays open then.
    """
    strategy, reason = choose_and_say(strategy, identity, spec)
    spec = msgspec.structs.replace(spec, rank=identity.rank, writer=f"rank{identity.rank}")
    if strategy == "plain":
        return OwnRun(open_run(spec), spec.earlier, strategy, reason)
    name = f"runs/{next(_opened)}"
    if strategy == "rank0":
        return FeedRun(identity, coordinator, spec, name, reason, late=late)
    place = f"{name}/open"
    if strategy == "per_rank":
        own = opening.lead(
            coordinator, place, spec, lambda told: open_run(own_runs.per_rank_spec(_own_config(told, spec), identity))
        )
        return OwnRun(own, spec.earlier, strategy, reason)
    if strategy == "shared":
        run = opening.lead(coordinator, place, spec, lambda told: open_run(own_runs.shared_spec(told, identity)))
        return SharedWriter(run, spec.earlier, reason, coordinator, name)
    silent = identity.rank != 0
    run = opening.lead(coordinator, place, spec, lambda told: open_run(own_runs.silent_spec(told) if silent else told))
    return OnlyRank0(run, spec.earlier, reason, coordinator, name)


def choose_and_say(strategy: str, identity: RankIdentity, spec: RunSpec) -> tuple[str, str]:
    """As `choose`; rank 0 of several says what `auto` chose."""
    chosen, reason = choose(strategy, identity, spec.settings.mode)
    if strategy == "auto" and identity.rank == 0 and identity.world_size > 1 and chosen != "plain":
        spec.settings.say(f"strategy {chosen}: {reason}")
    return chosen, reason


def _own_config(told: RunSpec, own: RunSpec) -> RunSpec:
    return msgspec.structs.replace(told, config={**told.config, **own.config})
