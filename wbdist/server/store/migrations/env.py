"""Run by Alembic from `wbdist.server.store.open_store`, on the connection it is given."""

from __future__ import annotations

from alembic import context

from wbdist.server.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=connection.dialect.name == "sqlite")
with context.begin_transaction():
    context.run_migrations()
