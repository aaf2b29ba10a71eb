"""Opening the ranks' runs together: rank 0 first, then the others as it found things; one error, or one word, for all.

Nothing here can hold up a training script for longer than its bounds: a server that does not answer is asked by rank 0
alone, and then all ranks go on with their journals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

import wbdist.errors
from wbdist.core.coordination import Coordinator
from wbdist.core.position import RunPosition
from wbdist.distributed.channel import Meeting
from wbdist.errors import DeadlineError, EnvironmentFault, Error, PeerLostError
from wbdist.run.handle import Run
from wbdist.run.lifecycle import RunSpec

OPEN_TIMEOUT = 60.0
"""Seconds for the ranks to have opened their runs. What one of them waits for (`init_timeout` for an embedded server, the
registration, an aggregator) fits in."""


class Opened(msgspec.Struct):
    """What rank 0 tells all ranks about the run or runs."""

    meeting: Meeting | None = None
    """Where the aggregator is, under rank0; None when it is not up (yet)."""
    config: dict[str, Any] = {}
    """Rank 0's, with what only it may know: a file of defaults on its disk."""
    entity: str = ""
    project: str = ""
    name: str | None = None
    url: str | None = None
    away: bool = False
    """The server did not answer rank 0."""
    error: str = ""
    error_class: str = ""


def lead(peers: Coordinator, name: str, spec: RunSpec, open_it: Callable[[RunSpec], Run]) -> Run:
    """All ranks, in step: opens this rank's own run, rank 0's before the others'.

    `open_it` opens it from the spec it is given: the others' with rank 0's entity and project, without asking a server that
    did not answer rank 0, and without a word, since rank 0 has said it. Blocks at most OPEN_TIMEOUT seconds a wait, of which
    there are two. When it fails on any rank, no rank's run stays open and all raise: that rank's error.
    """
    run: Run | None
    if peers.rank == 0:
        try:
            run = open_it(spec)
        except Error as error:
            peers.agree(name, msgspec.msgpack.encode(refusal_of(error)), OPEN_TIMEOUT)
            raise
        away = spec.settings.mode in {"online", "shared"} and run.url is None
        told = Opened(config=spec.config, entity=run.entity, project=run.project, url=run.url, away=away)
        peers.agree(name, msgspec.msgpack.encode(told), OPEN_TIMEOUT)
        problem = Opened()
    else:
        run, problem = _follow(told_by_rank0(peers, name), spec, open_it)
    try:
        outcomes = peers.gather(f"{name}/all", msgspec.msgpack.encode(problem), OPEN_TIMEOUT)
    except BaseException:
        if run is not None:
            run.finish(1, cause="init")
        raise
    for rank, outcome in enumerate(outcomes):
        answer = msgspec.msgpack.decode(outcome, type=Opened)
        if answer.error:
            if run is not None:
                run.finish(1, cause="init")
            raise error_of(answer.error_class)(f"rank {rank} could not open its run: {answer.error}")
    assert run is not None
    return run


def _follow(told: Opened, spec: RunSpec, open_it: Callable[[RunSpec], Run]) -> tuple[Run | None, Opened]:
    followed = msgspec.structs.replace(
        spec,
        entity=told.entity or spec.entity,
        project=told.project or spec.project,
        config={**spec.config, **told.config},
        away=told.away,
        announce=False,
    )
    try:
        return open_it(followed), Opened()
    except Error as error:
        return None, refusal_of(error)


def told_by_rank0(peers: Coordinator, name: str) -> Opened:
    """Other ranks: rank 0's answer; raises its error when it could not open the run."""
    answer = msgspec.msgpack.decode(peers.agree(name, None, OPEN_TIMEOUT), type=Opened)
    raise_refusal(answer)
    return answer


def refusal_of(error: Error) -> Opened:
    return Opened(error=str(error), error_class=type(error).__name__)


def raise_refusal(answer: Opened) -> None:
    """Other ranks: raises rank 0's error, when its answer is one."""
    if answer.error:
        raise error_of(answer.error_class)(f"rank 0 could not open the run: {answer.error}")


def error_of(name: str) -> type[Error]:
    kind = getattr(wbdist.errors, name, Error)
    return kind if isinstance(kind, type) and issubclass(kind, Error) else Error


# Positions ----------------------------------------------------------------------------------------------


class _Answer(msgspec.Struct):
    position: RunPosition | None = None
    error: str = ""
    error_class: str = ""


_ERRORS: dict[str, type[EnvironmentFault]] = {kind.__name__: kind for kind in (PeerLostError, DeadlineError, EnvironmentFault)}


def rank0s_position(peers: Coordinator, name: str, find: Callable[[], RunPosition], timeout: float) -> RunPosition:
    """All ranks, in step: what `find` says on rank 0. Blocks at most `timeout` seconds besides; raises its EnvironmentFault."""
    if peers.rank != 0:
        answer = msgspec.msgpack.decode(peers.agree(name, None, timeout), type=_Answer)
        if answer.position is None:
            raise _ERRORS.get(answer.error_class, EnvironmentFault)(answer.error)
        return answer.position
    try:
        position = find()
    except EnvironmentFault as error:
        refused = _Answer(error=str(error), error_class=type(error).__name__)
        peers.agree(name, msgspec.msgpack.encode(refused), timeout)
        raise
    peers.agree(name, msgspec.msgpack.encode(_Answer(position=position)), timeout)
    return position


def merged_position(peers: Coordinator, name: str, own: RunPosition, timeout: float) -> RunPosition:
    """All ranks, in step: the position of a run that all of them write, of each rank's own. The same on all ranks.

    Of a summary's key the rank's that is furthest counts, of equals the highest rank's. Blocks at most `timeout` seconds.
    Raises PeerLostError.
    """
    gathered = peers.gather(name, msgspec.msgpack.encode(own), timeout)
    positions = [msgspec.msgpack.decode(part, type=RunPosition) for part in gathered]
    furthest_last = sorted(positions, key=lambda position: position.watermark.step)
    counts: dict[str, dict[str, int]] = {}
    summary: dict[str, object] = {}
    for position in positions:
        for stream, of_writer in position.watermark.counts.items():
            counts.setdefault(stream, {}).update(of_writer)
    for position in furthest_last:
        summary.update(position.summary)
    watermark = msgspec.structs.replace(furthest_last[-1].watermark, counts=counts)
    runtime = max(position.runtime for position in positions)
    return msgspec.structs.replace(positions[0], watermark=watermark, summary=summary, runtime=runtime)
