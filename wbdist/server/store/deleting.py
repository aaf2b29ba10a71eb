"""Deleting a run: it is gone for everybody at once; its lines go when no fork shows them any more, its id never comes back.

Artifacts outlive the run that logged them: what it said of them stays, with the attempts that tell whether that counts.
"""

from __future__ import annotations

import sqlalchemy as sa

from wbdist.core.position import ARTIFACTS
from wbdist.server.store.schema import attempts, chunks, columns, console_lines, cursors, file_versions, runs


def delete(db: sa.Connection, pk: int, now: float) -> None:
    """Hides the run, whose row is locked, and clears what nobody needs: its own lines, and those of deleted runs that only it
    was a fork of."""
    db.execute(sa.update(runs).where(runs.c.pk == pk).values(deleted_at=now, version=runs.c.version + 1))
    waiting, seen = [pk], {pk}
    while waiting:
        key = waiting.pop()
        if _needed(db, key):
            continue
        _clear(db, key)
        forks = (attempts.c.run_pk == key) & attempts.c.base_run.is_not(None)
        sources = set(db.execute(sa.select(attempts.c.base_run).where(forks)).scalars()) - seen
        seen |= sources
        waiting += sources


def _needed(db: sa.Connection, pk: int) -> bool:
    """Whether the run, or a fork of it over any number of levels, is there to be read."""
    waiting, seen = [pk], {pk}
    while waiting:
        key = waiting.pop()
        if db.execute(sa.select(runs.c.deleted_at).where(runs.c.pk == key)).scalar() is None:
            return True
        forks = set(db.execute(sa.select(attempts.c.run_pk).where(attempts.c.base_run == key)).scalars()) - seen
        seen |= forks
        waiting += forks
    return False


def _clear(db: sa.Connection, pk: int) -> None:
    own = sa.select(chunks.c.pk).where(chunks.c.run_pk == pk)
    db.execute(sa.delete(columns).where(columns.c.chunk_pk.in_(own)))
    for table in (chunks, console_lines, file_versions):
        db.execute(sa.delete(table).where(table.c.run_pk == pk))
    db.execute(sa.delete(cursors).where((cursors.c.run_pk == pk) & (cursors.c.stream != ARTIFACTS)))
