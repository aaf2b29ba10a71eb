"""The tables of artifacts; see schema.py for the others."""

from __future__ import annotations

import sqlalchemy as sa

from wbdist.server.store.anytext import AnyText
from wbdist.server.store.schema import metadata

_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")

collections = sa.Table(
    "artifact_collections",
    metadata,
    sa.Column("pk", _BIG, primary_key=True),
    sa.Column("entity", AnyText, nullable=False),
    sa.Column("project", AnyText, nullable=False),
    sa.Column("name", AnyText, nullable=False),
    sa.Column("type", AnyText, nullable=False),
    sa.Column("portfolio", sa.Boolean, nullable=False),  # versions are linked into it, not logged to it
    sa.Column("created_at", sa.Double, nullable=False),
    sa.UniqueConstraint("entity", "project", "name"),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("pk", _BIG, primary_key=True),
    sa.Column("collection_pk", _BIG, sa.ForeignKey("artifact_collections.pk"), nullable=False),
    sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk"), nullable=False),
    sa.Column("client_id", AnyText, nullable=False),
    sa.Column("digest", AnyText, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("description", AnyText, nullable=False),
    sa.Column("metadata", AnyText, nullable=False),
    sa.Column("tags", AnyText, nullable=False),
    sa.Column("wanted", AnyText, nullable=False),  # JSON: aliases and stamp, for when it is committed
    sa.Column("manifest", sa.Text, nullable=False),  # where its manifest lies
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("file_count", sa.Integer, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Index("artifacts_by_digest", "collection_pk", "digest"),
    sa.Index("artifacts_by_client_id", "client_id"),
)

memberships = sa.Table(
    "artifact_memberships",
    metadata,
    sa.Column("collection_pk", _BIG, sa.ForeignKey("artifact_collections.pk"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("artifact_pk", _BIG, sa.ForeignKey("artifacts.pk"), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("gone", sa.Boolean, nullable=False),  # unlinked, or deleted: its number is not given again
    sa.Index("artifact_memberships_by_artifact", "artifact_pk"),
)

contents = sa.Table(
    "artifact_contents",
    metadata,
    sa.Column("entity", AnyText, primary_key=True),  # so that nobody reads another's file by knowing its digest
    sa.Column("md5", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
)

lines = sa.Table(
    "artifact_lines",
    metadata,
    sa.Column("pk", _BIG, primary_key=True),
    sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk")),  # NULL: said by no run, and thus by no attempt
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("lane", AnyText, nullable=False),
    sa.Column("writer", AnyText, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),  # in the stream ARTIFACTS
    sa.Column("kind", sa.Text, nullable=False),  # output, input, alias, unalias
    sa.Column("artifact_pk", _BIG, sa.ForeignKey("artifacts.pk"), nullable=False),
    sa.Column("collection_pk", _BIG, sa.ForeignKey("artifact_collections.pk"), nullable=False),
    sa.Column("alias", AnyText, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index("artifact_lines_by_run", "run_pk", "attempt"),
    sa.Index("artifact_lines_by_alias", "collection_pk", "kind", "alias"),
    sa.Index("artifact_lines_by_artifact", "artifact_pk", "kind"),
)
