"""Artifacts: numbered versions of collections of files, logged and used by runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from wbdist.errors import UsageError
from wbdist.server.store import artifact_lines
from wbdist.server.store.artifact_lines import Said, Truth, Wanted
from wbdist.server.store.artifact_schema import artifacts, collections, contents, memberships
from wbdist.server.store.engine import Connections
from wbdist.server.store.interface import RunRow
from wbdist.server.store.schema import runs

LATEST = "latest"
PENDING, COMMITTED, DELETED = "PENDING", "COMMITTED", "DELETED"


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    pk: int
    entity: str
    project: str
    name: str
    type: str
    portfolio: bool
    created_at: float


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    pk: int
    collection_pk: int
    """Where it was logged."""
    run_pk: int
    digest: str
    state: str
    description: str
    metadata: str
    tags: str
    """JSON: a list."""
    manifest: str
    """Digest of the manifest's bytes; '' before they arrived."""
    size: int
    file_count: int
    step: int
    created_at: float
    updated_at: float


class Membership(msgspec.Struct, frozen=True):
    """An artifact as one version of a collection."""

    collection_pk: int
    version: int
    artifact_pk: int
    created_at: float


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact to be made."""

    collection: str
    type: str
    digest: str
    client_id: str
    description: str = ""
    metadata: str = ""
    tags: Sequence[str] = ()
    wanted: Wanted = Wanted()
    once: bool = True
    """When the collection has this digest, that version is meant."""


class ArtifactTable:
    """Thread-safe. Every call raises StoreError when the database fails; it then changed nothing."""

    def __init__(self, connections: Connections) -> None:
        self._db = connections

    # Writing --------------------------------------------------------------------------------------------

    def create(self, run: RunRow, draft: Draft, now: float) -> Artifact:
        """The artifact of this client id, made if need be; or the collection's version with this digest, which then gets the
        aliases at once. Raises UsageError for a collection of another type."""
        with self._db.write() as db:
            collection = self._collection(db, run, draft.collection, draft.type, now, portfolio=False)
            mine = (artifacts.c.collection_pk == collection.pk) & (artifacts.c.client_id == draft.client_id)
            found = _artifact(db, mine) if draft.client_id else None
            if found is None and draft.once:
                same = (artifacts.c.collection_pk == collection.pk) & (artifacts.c.digest == draft.digest)
                found = _artifact(db, same & (artifacts.c.state == COMMITTED))
                if found is not None:
                    self._announce(db, found, run.pk, draft.wanted, now)
            if found is not None:
                return found
            values = {
                "collection_pk": collection.pk,
                "run_pk": run.pk,
                "client_id": draft.client_id,
                "digest": draft.digest,
                "state": PENDING,
                "description": draft.description,
                "metadata": draft.metadata,
                "tags": json.dumps(list(draft.tags)),
                "wanted": msgspec.json.encode(draft.wanted).decode(),
                "manifest": "",
                "size": 0,
                "file_count": 0,
                "step": run.last_step,
                "created_at": now,
                "updated_at": now,
            }
            pk = db.execute(sa.insert(artifacts).values(**values).returning(artifacts.c.pk)).scalar_one()
            made = _artifact(db, artifacts.c.pk == pk)
            assert made is not None
            return made

    def set_manifest(self, pk: int, sha256: str, now: float) -> None:
        """Only while it is pending: a committed version never changes."""
        with self._db.write() as db:
            where = (artifacts.c.pk == pk) & (artifacts.c.state == PENDING)
            db.execute(sa.update(artifacts).where(where).values(manifest=sha256, updated_at=now))

    def commit(self, pk: int, *, size: int, file_count: int, now: float) -> Artifact:
        """Makes it the next version, with its aliases. Repeating it changes nothing."""
        with self._db.write() as db:
            row = db.execute(self._db.locked(sa.select(artifacts).where(artifacts.c.pk == pk))).mappings().one()
            if row["state"] == PENDING:
                db.execute(
                    sa.update(artifacts)
                    .where(artifacts.c.pk == pk)
                    .values(state=COMMITTED, size=size, file_count=file_count, updated_at=now)
                )
                self._join(db, row["collection_pk"], pk, now)
                self._announce(db, _to_artifact(row), row["run_pk"], artifact_lines.wanted_of(row["wanted"]), now)
            found = _artifact(db, artifacts.c.pk == pk)
            assert found is not None
            return found

    def _announce(self, db: sa.Connection, artifact: Artifact, run: int, wanted: Wanted, now: float) -> None:
        names = dict.fromkeys((LATEST, *wanted.aliases))
        said = [Said("alias", artifact.pk, artifact.collection_pk, alias) for alias in names]
        said.append(Said("output", artifact.pk, artifact.collection_pk))
        artifact_lines.say(db, self._db.insert, run, said, now=now, stamp=wanted.stamp)

    def use(self, run: int, artifact: Artifact, wanted: Wanted, now: float) -> None:
        """Says that a run used it; once is enough."""
        with self._db.write() as db:
            current = db.execute(sa.select(runs.c.attempt).where(runs.c.pk == run)).scalar_one()
            if artifact.pk not in artifact_lines.of_run(db, run, current, "input"):
                said = [Said("input", artifact.pk, artifact.collection_pk)]
                artifact_lines.say(db, self._db.insert, run, said, now=now, stamp=wanted.stamp)

    def link(self, artifact: Artifact, target: tuple[str, str, str], aliases: Sequence[str], now: float) -> Membership:
        """Makes it a version of the portfolio (entity, project, name), unless it is one already. Raises UsageError."""
        with self._db.write() as db:
            source = db.execute(sa.select(collections.c.type).where(collections.c.pk == artifact.collection_pk)).scalar_one()
            into = self._collection(db, target[:2], target[2], source, now, portfolio=True)
            member = _membership(db, into.pk, artifact.pk) or self._join(db, into.pk, artifact.pk, now)
            said = [Said("alias", artifact.pk, into.pk, alias) for alias in dict.fromkeys((LATEST, *aliases))]
            artifact_lines.say(db, self._db.insert, None, said, now=now)
            return member

    def unlink(self, artifact: int, collection: int) -> None:
        with self._db.write() as db:
            where = (memberships.c.collection_pk == collection) & (memberships.c.artifact_pk == artifact)
            db.execute(sa.update(memberships).where(where).values(gone=True))

    def set_aliases(self, artifact: int, changes: Sequence[tuple[int, str]], now: float, *, add: bool) -> None:
        """(collection, alias) pairs, by a person's word."""
        if changes:
            said = [Said("alias" if add else "unalias", artifact, collection, alias) for collection, alias in changes]
            with self._db.write() as db:
                artifact_lines.say(db, self._db.insert, None, said, now=now)

    def update(self, pk: int, changes: Mapping[str, Any], now: float) -> None:
        """`description`, `metadata`, `tags` (JSON)."""
        with self._db.write() as db:
            db.execute(sa.update(artifacts).where(artifacts.c.pk == pk).values(**changes, updated_at=now))

    def delete(self, pk: int, now: float) -> None:
        """Nothing finds it any more; its number is not given again."""
        with self._db.write() as db:
            db.execute(sa.update(artifacts).where(artifacts.c.pk == pk).values(state=DELETED, updated_at=now))
            db.execute(sa.update(memberships).where(memberships.c.artifact_pk == pk).values(gone=True))

    def add_content(self, entity: str, md5: str, sha256: str, size: int) -> None:
        with self._db.write() as db:
            values = {"entity": entity, "md5": md5, "sha256": sha256, "size": size}
            db.execute(self._db.insert(contents).values(**values).on_conflict_do_nothing())

    def _collection(
        self, db: sa.Connection, place: RunRow | tuple[str, ...], name: str, kind: str, now: float, *, portfolio: bool
    ) -> Collection:
        entity, project = (place.entity, place.project) if isinstance(place, RunRow) else place
        key = {"entity": entity, "project": project, "name": name}
        values = {**key, "type": kind, "portfolio": portfolio, "created_at": now}
        db.execute(self._db.insert(collections).values(**values).on_conflict_do_nothing())
        where = sa.and_(*(collections.c[column] == value for column, value in key.items()))
        row = db.execute(self._db.locked(sa.select(collections).where(where))).mappings().one()
        found = Collection(**row)
        if found.type != kind or found.portfolio != portfolio:
            has = f"{found.type!r}, {'linked into' if found.portfolio else 'logged to'}"
            raise UsageError(f"artifact {entity}/{project}/{name} exists already and is of type {has}; choose another name")
        return found

    def _join(self, db: sa.Connection, collection: int, artifact: int, now: float) -> Membership:
        db.execute(self._db.locked(sa.select(collections.c.pk).where(collections.c.pk == collection)))
        highest = db.execute(sa.select(sa.func.max(memberships.c.version)).where(memberships.c.collection_pk == collection))
        last = highest.scalar()
        member = Membership(collection, 0 if last is None else last + 1, artifact, now)
        db.execute(sa.insert(memberships).values(**msgspec.structs.asdict(member), gone=False))
        return member

    # Reading --------------------------------------------------------------------------------------------

    def get(self, pk: int) -> Artifact | None:
        with self._db.read() as db:
            return _artifact(db, (artifacts.c.pk == pk) & (artifacts.c.state != DELETED))

    def by_client_id(self, client_id: str) -> Artifact | None:
        with self._db.read() as db:
            return _artifact(db, (artifacts.c.client_id == client_id) & (artifacts.c.state != DELETED))

    def collection(self, pk: int) -> Collection | None:
        with self._db.read() as db:
            row = db.execute(sa.select(collections).where(collections.c.pk == pk)).mappings().first()
        return None if row is None else Collection(**row)

    def find(self, entity: str, project: str, name: str) -> Collection | None:
        found = [one for one in self.collections(entity, project) if one.name == name]
        return found[0] if found else None

    def collections(self, entity: str, project: str, kind: str | None = None) -> list[Collection]:
        """Newest first."""
        where = (collections.c.entity == entity) & (collections.c.project == project)
        if kind is not None:
            where &= collections.c.type == kind
        with self._db.read() as db:
            rows = db.execute(sa.select(collections).where(where).order_by(collections.c.pk.desc())).mappings().all()
        return [Collection(**row) for row in rows]

    def members(self, collection: int) -> list[Membership]:
        """Newest version first, without those that are gone."""
        return self._members(memberships.c.collection_pk == collection)

    def memberships(self, artifact: int) -> list[Membership]:
        return self._members(memberships.c.artifact_pk == artifact)

    def _members(self, where: sa.ColumnElement[bool]) -> list[Membership]:
        statement = sa.select(memberships).where(where & ~memberships.c.gone).order_by(memberships.c.version.desc())
        with self._db.read() as db:
            rows = db.execute(statement).mappings().all()
        return [Membership(**{name: row[name] for name in Membership.__struct_fields__}) for row in rows]

    def aliases(self, collection: int) -> dict[str, int]:
        """alias -> the artifact that it means by its newest live assignment."""
        with self._db.read() as db:
            return Truth(db).aliases(collection)

    def of_run(self, run: RunRow, kind: str) -> list[Artifact]:
        with self._db.read() as db:
            pks = artifact_lines.of_run(db, run.pk, run.attempt if run.view is None else run.view, kind)
            found = [_artifact(db, artifacts.c.pk == pk) for pk in pks]
        return [one for one in found if one is not None and one.state == COMMITTED]

    def users(self, artifact: int) -> list[int]:
        with self._db.read() as db:
            return artifact_lines.users(db, artifact)

    def known_contents(self, entity: str, md5s: Sequence[str]) -> dict[str, tuple[str, int]]:
        """md5 -> (sha256, size), of those that the entity has."""
        out: dict[str, tuple[str, int]] = {}
        with self._db.read() as db:
            for start in range(0, len(md5s), 500):
                where = (contents.c.entity == entity) & contents.c.md5.in_(md5s[start : start + 500])
                out |= {row.md5: (row.sha256, row.size) for row in db.execute(sa.select(contents).where(where))}
        return out


def _artifact(db: sa.Connection, where: sa.ColumnElement[bool]) -> Artifact | None:
    row = db.execute(sa.select(artifacts).where(where).order_by(artifacts.c.pk.desc()).limit(1)).mappings().first()
    return None if row is None else _to_artifact(row)


def _to_artifact(row: Mapping[Any, Any]) -> Artifact:
    return Artifact(**{name: row[name] for name in Artifact.__struct_fields__})


def _membership(db: sa.Connection, collection: int, artifact: int) -> Membership | None:
    where = (memberships.c.collection_pk == collection) & (memberships.c.artifact_pk == artifact) & ~memberships.c.gone
    row = db.execute(sa.select(memberships).where(where)).mappings().first()
    return None if row is None else Membership(**{name: row[name] for name in Membership.__struct_fields__})
