"""The tables, the same on SQLite and PostgreSQL. Alembic (`migrations/`) creates and changes them; nothing here does."""

from __future__ import annotations

import sqlalchemy as sa

from wbdist.server.store.anytext import AnyText

metadata = sa.MetaData()
_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""A key that does not run out; only an INTEGER is SQLite's own rowid, of 64 bits anyway."""

projects = sa.Table(
    "projects",
    metadata,
    sa.Column("entity", AnyText, primary_key=True),
    sa.Column("project", AnyText, primary_key=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("runs", sa.Integer, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("pk", sa.Integer, primary_key=True),
    sa.Column("entity", AnyText, nullable=False),
    sa.Column("project", AnyText, nullable=False),
    sa.Column("run_id", AnyText, nullable=False),
    sa.Column("display_name", AnyText, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("summary", sa.Text, nullable=False),
    sa.Column("run_group", AnyText, nullable=False),
    sa.Column("job_type", AnyText, nullable=False),
    sa.Column("notes", AnyText, nullable=False),
    sa.Column("tags", sa.Text, nullable=False),
    sa.Column("host", AnyText, nullable=False),
    sa.Column("program", AnyText, nullable=False),
    sa.Column("git_commit", AnyText, nullable=False),
    sa.Column("repo", AnyText, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("heartbeat_at", sa.Double, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("line_counts", sa.Text, nullable=False),
    sa.Column("last_step", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("summary_given", sa.Boolean, nullable=False, server_default=sa.false()),  # by a client, in the current attempt
    sa.Column("deleted_at", sa.Double),  # its id stays taken
    sa.Column("stopping", sa.Boolean, nullable=False, server_default=sa.false()),  # somebody asked its process to stop
    sa.Column("sweep", AnyText, nullable=False, server_default=""),
    sa.UniqueConstraint("entity", "project", "run_id"),
    sa.Index("runs_by_group", "entity", "project", "run_group"),
    sa.Index("runs_by_beat", "state", "heartbeat_at"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("nonce", AnyText, nullable=False),  # '' for a placeholder: a base of a later attempt, not heard of yet
    sa.Column("base_run", sa.Integer),  # for forks: the run whose attempt `base` counts in; NULL is this run
    sa.Column("base", sa.Text),  # Watermark as JSON; NULL is a start from nothing
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
    sa.Column("cause", AnyText, nullable=False),
    sa.Column("end_cause", AnyText, nullable=False),
    sa.Column("exit_code", sa.Integer),
    sa.Column("fresh", sa.Text, nullable=False, server_default="[]"),  # streams that show nothing from below
    sa.Column("origin", sa.Text),  # branches.Origin as JSON: what it was built on, as it was asked for
    sa.Column("beneath", sa.Text),  # branches.Beneath as JSON: config and summary at the cut
    sa.Column("frozen", sa.Text),  # branches.Frozen as JSON: what the run's row said when a newer attempt took over
    sa.Index("attempts_by_base_run", "base_run"),
)

cursors = sa.Table(
    "cursors",
    metadata,
    sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("lane", AnyText, primary_key=True),  # '' for the attempt's own nonce; a rival's nonce for what it sent
    sa.Column("stream", sa.Text, primary_key=True),
    sa.Column("writer", AnyText, primary_key=True),
    sa.Column("next", sa.BigInteger, nullable=False),
    sa.Column(
        "loose", sa.Integer, nullable=False, server_default="0"
    ),  # how near the next merge of level 0 is; see chunks.LOOSE
)

chunks = sa.Table(
    "chunks",
    metadata,
    sa.Column("pk", _BIG, primary_key=True),
    sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("lane", AnyText, nullable=False),
    sa.Column("stream", sa.Text, nullable=False),
    sa.Column("writer", AnyText, nullable=False),
    sa.Column("seq_lo", sa.BigInteger, nullable=False),
    sa.Column("seq_hi", sa.BigInteger, nullable=False),  # exclusive
    sa.Column("step_lo", sa.BigInteger, nullable=False),
    sa.Column("step_hi", sa.BigInteger, nullable=False),  # inclusive; -1 when no row has a step
    sa.Column("level", sa.Integer, nullable=False),  # 0: one append; merged upwards; see chunks.py
    sa.Column("keys", sa.Text, nullable=False),  # {key: numeric?}
    sa.Column("blob", sa.LargeBinary),  # all columns; NULL when `columns` holds them
    sa.UniqueConstraint("run_pk", "attempt", "lane", "stream", "writer", "seq_lo"),
)

columns = sa.Table(
    "columns",
    metadata,
    sa.Column("chunk_pk", _BIG, sa.ForeignKey("chunks.pk"), primary_key=True),
    sa.Column("key", AnyText, primary_key=True),
    sa.Column("blob", sa.LargeBinary, nullable=False),
    sa.Column("rollup", sa.LargeBinary),  # see rollups.py; NULL for columns without numbers
)

console_lines = sa.Table(
    "console_lines",
    metadata,
    sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("lane", AnyText, primary_key=True),
    sa.Column("writer", AnyText, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("line", AnyText, nullable=False),
)

file_versions = sa.Table(
    "file_versions",
    metadata,
    sa.Column("pk", _BIG, primary_key=True),
    sa.Column("run_pk", sa.Integer, sa.ForeignKey("runs.pk"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("lane", AnyText, nullable=False),  # as in cursors
    sa.Column("writer", AnyText, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),  # in the stream FILES
    sa.Column("name", AnyText, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),  # where the bytes lie; '' says that the file was deleted
    sa.Column("md5", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("mimetype", AnyText, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),  # the run's last one when it arrived: a cut by step takes it along
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.UniqueConstraint("run_pk", "attempt", "lane", "writer", "seq"),
    sa.Index("file_versions_by_name", "run_pk", "name"),
)
