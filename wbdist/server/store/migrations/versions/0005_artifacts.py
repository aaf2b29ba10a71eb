"""Artifacts: collections, versions, what lies in them, and the lines by which runs log, use and name them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "artifact_collections",
        sa.Column("pk", big, primary_key=True),
        sa.Column("entity", sa.Text, nullable=False),
        sa.Column("project", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("portfolio", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.UniqueConstraint("entity", "project", "name"),
    )
    op.create_table(
        "artifacts",
        sa.Column("pk", big, primary_key=True),
        sa.Column("collection_pk", big, sa.ForeignKey("artifact_collections.pk"), nullable=False),
        sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk"), nullable=False),
        sa.Column("client_id", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("tags", sa.Text, nullable=False),
        sa.Column("wanted", sa.Text, nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("file_count", sa.Integer, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
    )
    op.create_index("artifacts_by_digest", "artifacts", ["collection_pk", "digest"])
    op.create_index("artifacts_by_client_id", "artifacts", ["client_id"])
    op.create_table(
        "artifact_memberships",
        sa.Column("collection_pk", big, sa.ForeignKey("artifact_collections.pk"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("artifact_pk", big, sa.ForeignKey("artifacts.pk"), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("gone", sa.Boolean, nullable=False),
    )
    op.create_index("artifact_memberships_by_artifact", "artifact_memberships", ["artifact_pk"])
    op.create_table(
        "artifact_contents",
        sa.Column("entity", sa.Text, primary_key=True),
        sa.Column("md5", sa.Text, primary_key=True),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "artifact_lines",
        sa.Column("pk", big, primary_key=True),
        sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk")),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("lane", sa.Text, nullable=False),
        sa.Column("writer", sa.Text, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("artifact_pk", big, sa.ForeignKey("artifacts.pk"), nullable=False),
        sa.Column("collection_pk", big, sa.ForeignKey("artifact_collections.pk"), nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_index("artifact_lines_by_run", "artifact_lines", ["run_pk", "attempt"])
    op.create_index("artifact_lines_by_alias", "artifact_lines", ["collection_pk", "kind", "alias"])
    op.create_index("artifact_lines_by_artifact", "artifact_lines", ["artifact_pk", "kind"])


def downgrade() -> None:
    for table in ("artifact_lines", "artifact_contents", "artifact_memberships", "artifacts", "artifact_collections"):
        op.drop_table(table)
