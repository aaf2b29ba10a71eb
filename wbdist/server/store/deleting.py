"""Deleting a run: it is gone for everybody at once; its lines go when no fork shows them any more, its id never comes back."""

from __future__ import annotations

import sqlalchemy as sa

from wbdist.server.store.schema import attempts, chunks, columns, console_lines, cursors, runs


def delete(db: sa.Connection, pk: int, now: float) -> None:
    """Hides the run, whose row is locked, and clears what nobody needs: its own lines, and those of deleted runs that only it
    was a fork of."""
    db.execute(sa.update(runs).where(runs.c.pk == pk).values(deleted_at=now, version=runs.c.version + 1))
    waiting = [pk]
    while waiting:
        key = waiting.pop()
        gone = db.execute(sa.select(runs.c.deleted_at).where(runs.c.pk == key)).scalar() is not None
        if not gone or _forked(db, key):
            continue
        forks = (attempts.c.run_pk == key) & attempts.c.base_run.is_not(None)
        waiting += db.execute(sa.select(attempts.c.base_run).distinct().where(forks)).scalars().all()
        _clear(db, key)


def _forked(db: sa.Connection, pk: int) -> bool:
    """Whether another run is built on it. A run that was cleared has no attempts any more."""
    others = (attempts.c.base_run == pk) & (attempts.c.run_pk != pk)
    return db.execute(sa.select(attempts.c.run_pk).where(others).limit(1)).first() is not None


def _clear(db: sa.Connection, pk: int) -> None:
    own = sa.select(chunks.c.pk).where(chunks.c.run_pk == pk)
    db.execute(sa.delete(columns).where(columns.c.chunk_pk.in_(own)))
    for table in (chunks, console_lines, cursors, attempts):
        db.execute(sa.delete(table).where(table.c.run_pk == pk))
