"""Attempts: opening one on its base, closing it, telling how each went."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.core.position import HISTORY, Watermark
from wbdist.core.states import RunEvent, RunState, next_state
from wbdist.errors import UsageError
from wbdist.protocol.attempts import BeginAttempt, BegunAttempt
from wbdist.server.store import branches
from wbdist.server.store.branches import Source
from wbdist.server.store.derived import recount
from wbdist.server.store.interface import AttemptRow, BranchError
from wbdist.server.store.schema import attempts, runs
from wbdist.server.store.views import view_of

_SUPERSEDED = "superseded"
_SILENCE = RunEvent.SILENCE.value
_GUESSES = ("", _SUPERSEDED, _SILENCE)
"""Ends that a later word about the attempt may correct."""


_ATTEMPT = sa.select(attempts).where((attempts.c.run_pk == sa.bindparam("pk")) & (attempts.c.attempt == sa.bindparam("number")))


def attempt_of(db: sa.Connection, pk: int, attempt: int) -> sa.RowMapping | None:
    return db.execute(_ATTEMPT, {"pk": pk, "number": attempt}).mappings().first()


def begin(db: sa.Connection, run: sa.RowMapping, source: Source, request: BeginAttempt, now: float) -> BegunAttempt:
    """See `Store.begin_attempt`; `run` and `source` are locked by the caller."""
    pk, current = int(run["pk"]), int(run["attempt"])
    known = attempt_of(db, pk, request.attempt)
    if known is not None and known["nonce"] not in {"", request.nonce}:
        return BegunAttempt(accepted=False, attempt=current)
    if known is None or known["nonce"] == "":
        newest = request.attempt > current
        _open(db, pk, source, request, now, placeheld=known is not None, superseded=not newest)
        if newest:
            current = request.attempt
            open_ones = (attempts.c.run_pk == pk) & (attempts.c.attempt < current) & attempts.c.ended_at.is_(None)
            db.execute(sa.update(attempts).where(open_ones).values(ended_at=now, end_cause=_SUPERSEDED))
        # A late word of an older attempt may put more below the base of the newer one, but not undo what that said itself.
        change = recount(db, view_of(db, pk, current), summary=newest or not run["summary_given"])
        if newest:
            state = next_state(RunState(run["state"]), RunEvent.START)
            change |= {"attempt": current, "state": state.value, "heartbeat_at": now, "stopping": False}
        db.execute(sa.update(runs).where(runs.c.pk == pk).values(**change, version=runs.c.version + 1))
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


def _open(
    db: sa.Connection, pk: int, source: Source, request: BeginAttempt, now: float, *, placeheld: bool, superseded: bool
) -> None:
    base, origin = branches.resolve(db, pk, source, request)
    values: dict[str, Any] = {
        "nonce": request.nonce,
        "base_run": None if base is None or base.run == pk else base.run,
        "base": None if base is None else msgspec.json.encode(base.watermark).decode(),
        "fresh": json.dumps(sorted(request.fresh)),
        "origin": None if origin is None else msgspec.json.encode(origin).decode(),
        "started_at": now,
        "ended_at": now if superseded else None,
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


def end(
    db: sa.Connection, pk: int, attempt: int, now: float, *, cause: str, exit_code: int | None, only_open: bool = False
) -> None:
    """Records how an attempt ended; `only_open`: unless something is known already."""
    where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt)
    where &= attempts.c.ended_at.is_(None) if only_open else attempts.c.end_cause.in_(_GUESSES)
    db.execute(sa.update(attempts).where(where).values(ended_at=now, end_cause=cause, exit_code=exit_code))


def reopen(db: sa.Connection, pk: int, attempt: int) -> None:
    """It was only believed dead: it speaks again."""
    where = (attempts.c.run_pk == pk) & (attempts.c.attempt == attempt) & (attempts.c.end_cause == _SILENCE)
    db.execute(sa.update(attempts).where(where).values(ended_at=None, end_cause="", exit_code=None))


def describe(db: sa.Connection, pk: int, current: int) -> list[AttemptRow]:
    """All attempts, oldest first."""
    view = view_of(db, pk, current)
    out = []
    for row in db.execute(sa.select(attempts).where(attempts.c.run_pk == pk).order_by(attempts.c.attempt)).mappings():
        base = None if row["base"] is None else msgspec.json.decode(row["base"], type=Watermark)
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
            )
        )
    return out
