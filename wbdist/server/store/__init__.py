"""Where runs, attempts and history are kept: SQLite by default, PostgreSQL for several server processes."""

from __future__ import annotations

from pathlib import Path

from wbdist.server.store.engine import Connections, StoreError
from wbdist.server.store.sql import SqlStore

__all__ = ["SqlStore", "StoreError", "open_store"]

_MIGRATION_LOCK = 7_622_034_917
"""PostgreSQL advisory lock: of several servers that start at once, one migrates and the others wait."""


def open_store(url: str, *, durable: bool = False) -> SqlStore:
    """Opens (and creates, and migrates) the database at `url`: sqlite:///path or postgresql://...

    `durable`: every answer also survives a power cut. Raises StoreError when it cannot be opened or is newer than this version.
    """
    import sqlalchemy as sa
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    connections = Connections(url, durable=durable)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    try:
        with connections.write() as connection:
            if not connections.sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except (CommandError, StoreError) as error:
        connections.close()
        shown = sa.make_url(url).render_as_string(hide_password=True)
        raise StoreError(f"the database {shown} cannot be used: {error}") from error
    return SqlStore(connections)
