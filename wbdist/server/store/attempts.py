"""Attempts: opening one on its base, closing it, telling how each went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.position import HISTORY, Watermark
from wbdist.core.states import RunEvent, RunState, next_state
from wbdist.errors import UsageError
from wbdist.protocol.attempts import SHARED, BeginAttempt, BegunAttempt
from wbdist.server.store import branches, definitions
from wbdist.server.store.branches import Beneath, Frozen, Origin, Source
from wbdist.server.store.chunks import ColumnCache
from wbdist.server.store.derived import recount
from wbdist.server.store.forks import recount_forks
from wbdist.server.store.interface import AttemptRow, BranchError
from wbdist.server.store.lost import lost_seconds
from wbdist.server.store.merging import merged_config
from wbdist.server.store.schema import attempts, cursors, runs
from wbdist.server.store.timeline import timed
from wbdist.server.store.views import view_of

_SUPERSEDED = "superseded"
_SILENCE = RunEvent.SILENCE.value
_LOST = RunEvent.LOST.value
_GUESSES = ("", _SUPERSEDED, _SILENCE)
"""Ends that a later word about the attempt may correct."""


_ATTEMPT = sa.select(attempts).where((attempts.c.run_pk == sa.bindparam("pk")) & (attempts.c.attempt == sa.bindparam("number")))


def attempt_of(db: sa.Connection, pk: int, attempt: int) -> sa.RowMapping | None:
    return db.execute(_ATTEMPT, {"pk": pk, "number": attempt}).mappings().first()


def begin(
    db: sa.Connection,
    run: sa.RowMapping,
    source: Source,
    request: BeginAttempt,
    now: float,
    *,
    before: sa.RowMapping | None = None,
) -> BegunAttempt:
    """See `Store.begin_attempt`; `run` and `source` are locked by the caller. `before`: the run's row before the client's words
    about the new attempt."""
    pk, current = int(run["pk"]), int(run["attempt"])
    lived = current > 0 or (run["stopping"] and bool(view_of(db, pk, 0).next_of(0)))
    known = attempt_of(db, pk, request.attempt)
    if known is not None and known["nonce"] not in {"", request.nonce}:
        return BegunAttempt(accepted=False, attempt=current)
    if known is None or known["nonce"] == "":
        newest = request.attempt > current
        origin = _open(db, pk, source, request, now, placeheld=known is not None, superseded=not newest)
        config = json.loads(run["config"])
        if newest:
            _freeze(db, before or run)
            current = request.attempt
            open_ones = (attempts.c.run_pk == pk) & (attempts.c.attempt < current) & attempts.c.ended_at.is_(None)
            began = when(request.started, now)
            db.execute(sa.update(attempts).where(open_ones).values(ended_at=began, end_cause=_SUPERSEDED))
        # A late word of an older attempt may put more below the base of the newer one, but not undo what that said itself.
        if newest and origin is not None and origin.kind == "fork":
            config = merged_config(_config_of(db, origin), config)
        change = recount(db, view_of(db, pk, current), config=config if newest or not run["summary_given"] else None)
        if newest:
            if origin is not None and origin.kind != "resume":
                user = {key: value for key, value in config.items() if key != "_wandb"}
                beneath = Beneath(user, json.loads(change["summary"]))
                change["config"] = json.dumps(config)
                _note(db, pk, current, "beneath", beneath)
            state = next_state(RunState(run["state"]), RunEvent.START)
            change |= {"attempt": current, "state": state.value, "heartbeat_at": now}
            if lived:  # else its first process is the very one that was meant, which has registered the run and now begins
                change["stopping"] = False
        db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change, version=runs.c.version + 1))
        if known is not None or not newest:
            recount_forks(db, pk, lambda base: base.attempt >= request.attempt)
    view = view_of(db, pk, current)
    return BegunAttempt(
        accepted=view.own(request.attempt) is not None,
        attempt=current,
        next=view.next_of(request.attempt),
        lines=view.all_below(request.attempt),
    )


def check(request: BeginAttempt) -> None:
    """Raises UsageError for what no run could begin."""
    if request.attempt < 1 or not request.nonce:
        raise UsageError(f"an attempt needs a number from 1 and a nonce, not {request.attempt} and {request.nonce!r}")
    if request.base is not None:
        if request.at_step is not None:
            raise UsageError("an attempt is built on a watermark (base) or up to a step (at_step), not on both")
        if request.base.attempt < 0 or not (request.base_run or request.base.attempt < request.attempt):
            raise UsageError(
                f"attempt {request.attempt} cannot be based on attempt {request.base.attempt}; only on an older one"
            )


def _freeze(db: sa.Connection, run: sa.RowMapping) -> None:
    """Keeps what the run's row says of its current attempt, for whoever reads that by its immutable id."""
    number = int(run["attempt"])
    if number == 0:  # the plain SDK's first: it has a row of its own from now on
        if not view_of(db, run["pk"], 0).next_of(0):
            return
        values = {"nonce": "", "base": None, "started_at": run["created_at"], "cause": "", "end_cause": _SUPERSEDED}
        db.execute(sa.insert(attempts).values(run_pk=run["pk"], attempt=0, ended_at=run["heartbeat_at"], **values))
    frozen = Frozen(json.loads(run["config"]), json.loads(run["summary"]), run["state"])
    _note(db, run["pk"], number, "frozen", frozen)


def _note(db: sa.Connection, pk: int, attempt: int, column: str, value: Beneath | Frozen) -> None:
    where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt)
    # The standard library's JSON: NaN and integers of any size come back.
    db.execute(sa.update(attempts).where(where).values({column: json.dumps(msgspec.structs.asdict(value))}))


def beneath_of(row: Mapping[Any, Any] | None) -> Beneath | None:
    """What an attempt's row keeps under the client's config and summary."""
    return None if row is None or row["beneath"] is None else Beneath(**json.loads(row["beneath"]))


def frozen_of(row: Mapping[Any, Any] | None) -> Frozen | None:
    """What an attempt's row says of the time when it was superseded."""
    return None if row is None or row["frozen"] is None else Frozen(**json.loads(row["frozen"]))


def _config_of(db: sa.Connection, origin: Origin) -> dict[str, Any]:
    """A fork's inheritance; not the client's own word that the run has started, nor where it ran."""
    config: dict[str, Any] = json.loads(db.execute(sa.select(runs.c.config).where(runs.c.pk == origin.run)).scalar_one())
    frozen = frozen_of(attempt_of(db, origin.run, origin.attempt))
    return {key: value for key, value in (config if frozen is None else frozen.config).items() if key != "_wandb"}


def _open(
    db: sa.Connection, pk: int, source: Source, request: BeginAttempt, now: float, *, placeheld: bool, superseded: bool
) -> Origin | None:
    base, origin = branches.resolve(db, pk, source, request)
    values: dict[str, Any] = {
        "nonce": request.nonce,
        "base_run": None if base is None or base.run == pk else base.run,
        "base": None if base is None else msgspec.json.encode(base.watermark).decode(),
        "fresh": json.dumps(sorted(request.fresh)),
        "origin": None if origin is None else msgspec.json.encode(origin).decode(),
        "started_at": (started := when(request.started, now)),
        "ended_at": started if superseded else None,
        "cause": request.cause,
        "end_cause": _SUPERSEDED if superseded else "",
    }
    if placeheld:
        where = (attempts.c.run_pk == pk) & (attempts.c.attempt == request.attempt)
        db.execute(sa.update(attempts).where(where).values(**values))
    else:
        db.execute(sa.insert(attempts).values(run_pk=pk, attempt=request.attempt, **values))
    if base is not None and base.watermark.attempt > 0 and attempt_of(db, base.run, base.watermark.attempt) is None:
        # The server was away in that attempt; its lines may still come, from its journal.
        blank = {"nonce": "", "base": None, "started_at": now, "ended_at": now, "cause": "", "end_cause": _SUPERSEDED}
        db.execute(sa.insert(attempts).values(run_pk=base.run, attempt=base.watermark.attempt, **blank))
    try:
        view_of(db, pk, request.attempt)
    except ValueError as error:
        raise BranchError(str(error)) from None
    return origin


def when(told: float, now: float) -> float:
    """A client's word for when something was; clocks that go ahead, and clients that say nothing, get our time."""
    return told if 0.0 < told < now else now


def laid_over(db: sa.Connection, run: sa.RowMapping, summary: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """A client's summary over what a rewind or fork has from before. `whole`: the client reduced its metrics over all of it;
    W&B's own knows of them only what it logged itself."""
    beneath = beneath_of(attempt_of(db, run["pk"], run["attempt"]))
    if beneath is None:
        return summary
    merged = {**beneath.summary, **summary}
    if whole:
        return merged
    return definitions.apply(db, view_of(db, run["pk"], run["attempt"]), json.loads(run["config"]), merged)


def has_several_writers(db: sa.Connection, pk: int, attempt: int) -> bool:
    """Whether more than one writer of the attempt has sent rows: what each says of the summary is a part of it then."""
    where = (cursors.c.run_pk == pk) & (cursors.c.attempt == attempt) & (cursors.c.lane == "") & (cursors.c.stream == HISTORY)
    return len(db.execute(sa.select(cursors.c.writer).where(where).limit(2)).all()) > 1


def is_shared(db: sa.Connection, pk: int, attempt: int) -> bool:
    """Whether its writers share the run, so that none of them knows its summary."""
    found = attempt_of(db, pk, attempt)
    return found is not None and str(found["nonce"]).startswith(SHARED)


def end(
    db: sa.Connection, pk: int, attempt: int, now: float, *, cause: str, exit_code: int | None, only_open: bool = False
) -> None:
    """Records how an attempt ended; `only_open`: unless something is known already.

    Of several writers of one attempt (an aggregator that was lost, and the next) the one that ends it by its own word decides,
    whichever is heard first.
    """
    where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt)
    weaker = _GUESSES if cause == _LOST else (*_GUESSES, _LOST)
    where &= attempts.c.ended_at.is_(None) if only_open else attempts.c.end_cause.in_(weaker)
    db.execute(sa.update(attempts).where(where).values(ended_at=now, end_cause=cause, exit_code=exit_code))


def reopen(db: sa.Connection, pk: int, attempt: int) -> None:
    """It was only believed dead, or another writer of it was lost: it speaks again."""
    where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt) & attempts.c.end_cause.in_((_SILENCE, _LOST))
    db.execute(sa.update(attempts).where(where).values(ended_at=None, end_cause="", exit_code=None))


def describe(db: sa.Connection, pk: int, current: int, cache: ColumnCache) -> list[AttemptRow]:
    """All attempts, oldest first."""
    view = view_of(db, pk, current)
    out = []
    forks = set()
    for row in db.execute(sa.select(attempts).where(attempts.c.run_pk == pk).order_by(attempts.c.attempt)).mappings():
        base = None if row["base"] is None else msgspec.json.decode(row["base"], type=Watermark)
        if row["base_run"] is not None:
            forks.add(row["attempt"])
        out.append(
            AttemptRow(
                attempt=row["attempt"],
                nonce=row["nonce"],
                base_attempt=None if base is None else base.attempt,
                base_step=-1 if base is None else base.step,
                started_at=row["started_at"],
                ended_at=row["ended_at"],
                cause=row["cause"],
                end_cause=row["end_cause"],
                exit_code=row["exit_code"],
                rows=view.written(HISTORY, row["attempt"]),
                rows_live=view.live(HISTORY, row["attempt"]),
                lost_seconds=lost_seconds(db, view, row["attempt"]),
            )
        )
    return timed(db, view, out, frozenset(forks), cache)
