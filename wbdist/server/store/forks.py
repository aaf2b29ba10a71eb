"""Forks whose source goes on arriving: a fork may be begun before the lines it is built on have come."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import sqlalchemy as sa

from wbdist.core.position import Watermark
from wbdist.server.store.derived import recount
from wbdist.server.store.schema import attempts, runs
from wbdist.server.store.views import view_of

_FORKS = sa.select(attempts.c.run_pk, attempts.c.base).where(
    (attempts.c.base_run == sa.bindparam("key")) & (attempts.c.run_pk != sa.bindparam("key"))
)


def recount_forks(db: sa.Connection, pk: int, concerns: Callable[[Watermark], bool]) -> None:
    """Brings the rows of runs up to date that show something of run `pk` which has just come, whatever the number of forks in
    between; `concerns` says it of a direct fork's base. Of what a fork shows nothing but that ever changes in its source."""
    found = {run for run, base in db.execute(_FORKS, {"key": pk}) if concerns(msgspec.json.decode(base, type=Watermark))}
    waiting = list(found)
    while waiting:
        further = {run for run, _ in db.execute(_FORKS, {"key": waiting.pop()})} - found - {pk}
        found |= further
        waiting += further
    for key in sorted(found):
        run = db.execute(sa.select(runs.c.attempt, runs.c.config, runs.c.summary_given).where(runs.c.pk == key)).one()
        view = view_of(db, key, run.attempt)
        change = recount(db, view, config=None if run.summary_given else json.loads(run.config))
        change.pop("summary_given", None)
        db.execute(sa.update(runs).where(runs.c.pk == key).values(**change, version=runs.c.version + 1))
