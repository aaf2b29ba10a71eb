"""A run that is begun anew: under its id the next attempt, built upon nothing. What the earlier ones logged is archived."""

from __future__ import annotations

import msgspec

from wbdist.errors import CommError, UsageError
from wbdist.protocol import operations
from wbdist.run import backend, continuation
from wbdist.run.connection import Connection
from wbdist.run.lifecycle import REGISTER_SECONDS, RunSpec, journal_root
from wbdist.run.local_history import LocalRun

_begun: set[str] = set()
"""Ids of runs that this process began: a second one of the same id is the script's mistake, and no restart."""


def begun(spec: RunSpec, *, restarted: bool, resumable: bool = True, say: bool = True) -> RunSpec:
    """A process on its own, or rank 0 for all, before anything is opened: `spec` as the attempt that begins its run.

    1 of a run that nobody knows. Of one that there is the next, when somebody started this again: the launcher (`restarted`),
    or a sweep's server, which hands out its trial again. Anybody else would put a second history in the place of the first,
    and is told what to do instead: `resume`, too, where that is taken (`resumable`).

    Asks the server, after at most `init_timeout` seconds for an embedded one REGISTER_SECONDS a request, and this machine's
    journals; those alone when it is away. Raises UsageError for a run that there is, AuthenticationError.
    """
    if not spec.id_is_given or spec.resume or spec.branch is not None or spec.settings.mode in {"disabled", "shared"}:
        return spec
    newest, where = _newest(spec)
    if newest and (spec.run_id in _begun or not (restarted or spec.sweep)):
        raise UsageError(continuation.must_be_new_refusal(spec, where, resumable=resumable))
    _begun.add(spec.run_id)
    if not newest:
        return spec
    if say:
        spec.settings.say(
            f"run {spec.run_id} was begun before: this is its attempt {newest + 1}, from step 0; what was logged is archived "
            "(a wbdist.job with a checkpoint_dir goes on where it stood)",
            warning=True,
        )
    return msgspec.structs.replace(spec, attempt=newest + 1, must_be_new=False, cause="restart")


def _newest(spec: RunSpec) -> tuple[int, str]:
    """(newest attempt that is known of the run, where), (0, "") of none."""
    root = journal_root(spec.settings)
    local = LocalRun(root, spec.project, spec.entity, spec.run_id)
    here = (local.attempt, str(root)) if local else (0, "")
    server = backend.try_server(spec.settings)[0] if spec.settings.mode == "online" else None
    if server is None:
        return here
    connection = Connection(server.base_url, server.api_key, timeout=REGISTER_SECONDS)
    try:
        if continuation.knows_attempts(connection):
            known = continuation.ask(connection, spec.entity, spec.project, spec.run_id)
            there = 0 if known is None else max(known.attempt, 1)
        else:
            status = operations.run_resume_status(spec.entity or None, spec.project, spec.run_id)
            there = int(operations.read_resume_status(connection.execute(status)) is not None)
    except CommError:  # away, which opening the run will say
        return here
    finally:
        connection.close()
    return max(here, (there, server.base_url))
