"""Which sweep a run is a trial of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("runs", sa.Column("sweep", sa.Text, nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("runs", "sweep")
