"""Making a server know a run before its first row, so that its name and page are there at once."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from wbdist.errors import AuthenticationError, CommError, UsageError
from wbdist.protocol import operations
from wbdist.protocol.operations import UpsertedRun
from wbdist.run.connection import Connection, RefusedError

if TYPE_CHECKING:
    from wbdist.run.backend import Server
    from wbdist.run.lifecycle import RunSpec


class AwayError(CommError):
    """The server did not answer; it may be back later."""


def register(server: Server, spec: RunSpec, timeout: float) -> UpsertedRun:
    """Creates the run, or finds it, with its name, group, job type, notes and tags; repeating it changes nothing.

    Touches neither state nor attempts: that is the shipper's, in the order of the journal. Raises AwayError after at most
    about `timeout` seconds, AuthenticationError, CommError when the server refuses, UsageError when the run must be new.
    """
    connection = Connection(server.base_url, server.api_key, timeout=timeout)
    try:
        if spec.must_be_new and spec.attempt == 1 and _exists(connection, spec):
            raise UsageError(
                f"run {spec.run_id!r} exists already in project {spec.project!r} of {server.base_url}. Logging to it again "
                "would mix two histories, and resuming by id (resume=) is not built yet: leave `id` out, or choose another. "
                "(A job with a checkpoint_dir continues its run by itself.)"
            )
        return operations.read_upserted(
            connection.execute(
                operations.upsert_run(
                    project=spec.project,
                    run_id=spec.run_id,
                    entity=spec.entity or None,
                    display_name=spec.name,
                    group=spec.group,
                    job_type=spec.job_type,
                    notes=spec.notes,
                    tags=spec.tags,
                )
            )
        )
    except (RefusedError, AuthenticationError):
        raise
    except CommError as error:
        raise AwayError(str(error)) from error
    except ValueError as error:
        raise CommError(f"{server.base_url} is not a W&B or wbdist server: {error}") from error
    finally:
        connection.close()


def _exists(connection: Connection, spec: RunSpec) -> bool:
    status = operations.run_resume_status(spec.entity or None, spec.project, spec.run_id)
    model = connection.execute(status).get("model")
    return bool(model and model.get("bucket"))


def page(base_url: str, run: UpsertedRun) -> str:
    """The run's page; the same address on W&B's server and on ours."""
    return f"{base_url}/{quote(run.entity)}/{quote(run.project)}/runs/{quote(run.run_id)}"
