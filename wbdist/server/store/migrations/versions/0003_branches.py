"""Attempts say which streams start empty, where they branched off, and what stood before; runs may be deleted and stopped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("attempts", sa.Column("fresh", sa.Text, nullable=False, server_default="[]"))
    op.add_column("attempts", sa.Column("origin", sa.Text))
    op.add_column("attempts", sa.Column("beneath", sa.Text))
    op.add_column("attempts", sa.Column("frozen", sa.Text))
    op.add_column("runs", sa.Column("deleted_at", sa.Double))
    op.add_column("runs", sa.Column("stopping", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("attempts_by_base_run", "attempts", ["base_run"])


def downgrade() -> None:
    op.drop_index("attempts_by_base_run", "attempts")
    op.drop_column("runs", "stopping")
    op.drop_column("runs", "deleted_at")
    for name in ("frozen", "beneath", "origin", "fresh"):
        op.drop_column("attempts", name)
