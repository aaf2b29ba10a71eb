"""Chunks merge over several levels and have rollups; who gave the summary is known; rowids of PostgreSQL hold 64 bits.

Chunks written before stay readable: columns without a rollup are read value by value.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("columns", sa.Column("rollup", sa.LargeBinary))
    op.add_column("cursors", sa.Column("loose", sa.Integer, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("summary_given", sa.Boolean, nullable=False, server_default=sa.false()))
    if op.get_bind().dialect.name == "postgresql":
        # Merging deletes and inserts, so numbers run out sooner than chunks; SQLite's are 64 bits already.
        op.alter_column("chunks", "pk", type_=sa.BigInteger)
        op.alter_column("columns", "chunk_pk", type_=sa.BigInteger)
        op.execute("ALTER SEQUENCE chunks_pk_seq AS bigint")
        for table, column in (("chunks", "blob"), ("columns", "blob"), ("columns", "rollup")):
            # Compressed already: PostgreSQL need not try again.
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STORAGE EXTERNAL")


def downgrade() -> None:
    op.drop_column("runs", "summary_given")
    op.drop_column("cursors", "loose")
    op.drop_column("columns", "rollup")
