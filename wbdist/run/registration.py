"""Making a server know a run before its first row, so that its name and page are there at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from wbdist.errors import AuthenticationError, AwayError, CommError, UsageError
from wbdist.protocol import operations
from wbdist.protocol.operations import UpsertedRun
from wbdist.run import continuation, machine
from wbdist.run.connection import Connection, RefusedError

if TYPE_CHECKING:
    from wbdist.run.backend import Server
    from wbdist.run.lifecycle import RunSpec
    from wbdist.run.local_history import LocalRun


def register(server: Server, spec: RunSpec, local: LocalRun | None, timeout: float) -> tuple[UpsertedRun, RunSpec]:
    """Creates the run, or finds it, with its name, group, job type, notes and tags; repeating it changes nothing.

    The spec comes back as the attempt that goes on, when it is to go on with a run. Touches neither state nor attempts: that
    is the shipper's, in the order of the journal. Raises AwayError after at most about `timeout` seconds a request,
    AuthenticationError, CommError when the server refuses, UsageError when the run must be new, or must exist.
    """
    connection = Connection(server.base_url, server.api_key, timeout=timeout)
    try:
        if spec.must_be_new and spec.attempt == 1 and _exists(connection, spec):
            raise UsageError(continuation.must_be_new_refusal(spec, server.base_url))
        if spec.resume or spec.branch is not None:
            spec = continuation.with_server(connection, spec, local)
        known = operations.read_upserted(
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
                    sweep=spec.sweep or None,
                    **_first_word(spec),
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
    return known, msgspec.structs.replace(spec, entity=known.entity, project=known.project, name=known.display_name)


def _first_word(spec: RunSpec) -> dict[str, Any]:
    """W&B's fork lies in the config of the upsert that says where the new run's process is."""
    if spec.branch_point is None:
        return {}
    return {
        "config": {"_wandb": {"value": {"branch_point": spec.branch_point}}},
        "host": spec.settings.host or machine.host(),
        "program": spec.settings.program or machine.program(),
    }


def _exists(connection: Connection, spec: RunSpec) -> bool:
    answer = connection.execute(operations.run_resume_status(spec.entity or None, spec.project, spec.run_id))
    if spec.sweep:  # the agent's server has the run of a trial before its process has begun
        return operations.read_resume_status(answer) is not None
    return bool(operations.read_run_names(answer)[1])


def page(base_url: str, run: UpsertedRun) -> str:
    """The run's page; the same address on W&B's server and on ours."""
    return f"{base_url}/{quote(run.entity)}/{quote(run.project)}/runs/{quote(run.run_id)}"
