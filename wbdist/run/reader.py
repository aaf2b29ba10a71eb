"""`Api`: runs as the server has them, with W&B's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from wbdist.errors import CommError, UsageError
from wbdist.protocol import edits, names, operations, reads
from wbdist.protocol.reads import RemoteRun
from wbdist.run import backend, run_paths
from wbdist.run.absent import MissingNameError
from wbdist.run.connection import Connection
from wbdist.run.lifecycle import new_run_id
from wbdist.run.remote_lists import Project, Projects, Runs
from wbdist.run.remote_run import RunRecord
from wbdist.settings import Settings, resolve

if TYPE_CHECKING:
    from wbdist.run.artifacts_api import UsedArtifact

_NOT_HERE = {
    **dict.fromkeys(("sweep", "agent"), "sweeps are not read here; the trials of one are runs(filters={'sweep': id})"),
    **dict.fromkeys(("reports", "create_custom_chart"), "reports are not built; charts are on the run's page"),
    **dict.fromkeys(
        ("run_queue", "queued_run", "create_run_queue", "upsert_run_queue", "job", "list_jobs"), "there is no launch queue"
    ),
    **dict.fromkeys(
        ("team", "create_team", "user", "users", "create_user", "organization"),
        "users and keys are the server's, not the Api's",
    ),
    **dict.fromkeys(("registry", "registries", "create_registry"), "there is no registry"),
    **dict.fromkeys(
        (
            "automation", "automations", "create_automation", "delete_automation", "update_automation", "integrations",
            "slack_integrations", "webhook_integrations",
        ),
        "there are no automations",
    ),
    **dict.fromkeys(
        (
            "artifacts", "artifact_versions", "artifact_collection", "artifact_collection_exists", "artifact_collections",
            "artifact_type", "artifact_types",
        ),
        "artifacts are found by name, `artifact('name:v3')`, or by run, `run(path).logged_artifacts()`",
    ),
    "create_project": "a project comes into being with its first run",
    "sync_tensorboard": "TensorBoard logs are not read",
}  # fmt: skip
"""Names of W&B's `Api` that are not here -> why, or what to do instead."""


class RunNotFoundError(CommError, ValueError):
    """The server has no such run or project (or this key may not see it)."""


class ProjectNotFoundError(CommError, ValueError):
    """The server has no such project (or this key may not see it)."""


class Api:
    """Reads runs from a server; any process. Requests block at most `timeout` seconds each.

    `overrides`: {"entity", "project", "base_url"} used where a path leaves them out. Without a configured server it
    reads from the embedded one of the data directory, starting it when it is not running.
    """

    def __init__(
        self,
        overrides: Mapping[str, str] | None = None,
        timeout: float | None = None,
        api_key: str | None = None,
        *,
        settings: Settings | Mapping[str, Any] | None = None,
    ) -> None:
        """Raises UsageError, AuthenticationError, InitStartError (the embedded server does not start). Makes no request yet."""
        given = {"api_key": api_key} if api_key else {}
        self.settings = resolve(settings, {**(overrides or {}), **given})
        server = backend.server_for(self.settings)
        self.base_url = server.base_url
        self._connection = Connection(server.base_url, server.api_key, timeout=20.0 if timeout is None else timeout)
        self._entity = self.settings.entity

    @property
    def viewer(self) -> operations.Viewer:
        """Whose API key it is. Raises CommError for one that the server does not know."""
        found = operations.read_viewer(self._connection.execute(operations.viewer()))
        if found is None:
            raise CommError(f"{self.base_url} does not know this API key; run `wbdist login`")
        return found

    @property
    def default_entity(self) -> str:
        """The configured entity, else the one of the API key."""
        if not self._entity:
            self._entity = self.viewer.entity
        return self._entity

    def run(self, path: str) -> RunRecord:
        """The run at `entity/project/id` (also `project/id`, `id`, `entity/project:id`, `entity/project/runs/id`, or its URL).

        `<run>:<attempt>` in place of the id is that run as that attempt had it, whatever became of it since (its immutable id).
        Where that leaves open what is meant (`a/b:1`), a run `b` with such an attempt comes before W&B's `entity/project:id`.

        Raises RunNotFoundError; UsageError for what is no path.
        """
        places = run_paths.places(path, self.settings.project or "")
        for place in places:
            entity, project, run_id = place.entity or self.default_entity, place.project, place.run_id
            found = reads.read_run(self.execute(reads.run(entity, project, run_id)))
            if found is not None:
                return RunRecord(self, entity, project, found)
        missing = " nor ".join(f"{place.entity or self.default_entity}/{place.project}/{place.run_id}" for place in places)
        raise RunNotFoundError(f"could not find run {missing} on {self.base_url}; {run_paths.FORMS}")

    def fetch(self, entity: str, project: str, run_id: str) -> RemoteRun:
        """One run as the server tells it. Raises RunNotFoundError."""
        found = reads.read_run(self.execute(reads.run(entity, project, run_id)))
        if found is None:
            raise RunNotFoundError(f"could not find run {entity}/{project}/{run_id} on {self.base_url}")
        return found

    def runs(  # noqa: PLR0917  (W&B's order)
        self,
        path: str | None = None,
        filters: Mapping[str, Any] | None = None,
        order: str = "+created_at",
        per_page: int = 50,
        include_sweeps: bool = True,
        lazy: bool = True,
    ) -> Runs:
        """The runs of `entity/project` (or `project`), fetched a page at a time as they are looked at.

        `filters`: W&B's subset of MongoDB's language, e.g. {"group": "g1", "config.lr.value": {"$lt": 0.1}}. A project that
        does not exist has no runs. `order`: a field name behind `+` or `-`. `include_sweeps` and `lazy` are W&B's and change
        nothing: a run comes whole.
        """
        del include_sweeps, lazy
        if per_page < 1:
            raise UsageError(f"per_page={per_page} must be at least 1")
        parts = [part for part in (path or "").split("/") if part]
        if len(parts) > 2:
            raise UsageError(f"path {path!r} must be `entity/project` or `project`")
        project = parts[-1] if parts else self.settings.project
        if not project:
            raise UsageError("runs() needs a project: a path `entity/project` or `project`, or WANDB_PROJECT")
        return Runs(
            self,
            parts[0] if len(parts) == 2 else self.default_entity,
            project,
            filters=dict(filters or {}),
            order=order,
            per_page=per_page,
        )

    def artifact(self, name: str, type: str | None = None) -> UsedArtifact:
        """The artifact `[[entity/]project/]name[:alias]`. Raises ArtifactNotFoundError; ValueError for another type."""
        from wbdist.run import artifacts_api

        return artifacts_api.find(self, name, type)

    def artifact_exists(self, name: str, type: str | None = None) -> bool:
        """Whether `artifact` finds one."""
        from wbdist.run.artifacts_api import ArtifactNotFoundError

        try:
            self.artifact(name, type)
        except ArtifactNotFoundError:
            return False
        return True

    def project(self, name: str, entity: str | None = None) -> Project:
        """Raises ProjectNotFoundError."""
        for found in self.projects(entity):
            if found.name == name:
                return found
        raise ProjectNotFoundError(f"could not find project {entity or self.default_entity}/{name} on {self.base_url}")

    def projects(self, entity: str | None = None, per_page: int = 200) -> Projects:
        """The projects of `entity` (default: `default_entity`), fetched a page at a time as they are looked at."""
        if per_page < 1:
            raise UsageError(f"per_page={per_page} must be at least 1")
        return Projects(self, entity or self.default_entity, per_page)

    def create_run(
        self, *, run_id: str | None = None, project: str | None = None, entity: str | None = None, state: str = "running"
    ) -> RunRecord:
        """Makes a run without a process; `init(id=..., resume="must")` can take it over. `state`: running or pending.

        An id that exists is that run, unchanged. Raises UsageError for names that cannot be used.
        """
        if state not in {"running", "pending"}:
            raise UsageError(f"state={state!r} is not one of: running, pending")
        run_id = names.run_id(run_id) if run_id is not None else new_run_id()
        project = names.project(project or self.settings.project or "uncategorized")
        entity = entity or self.default_entity
        self.execute(edits.create_run(entity, project, run_id, state))
        return RunRecord(self, entity, project, self.fetch(entity, project, run_id))

    def from_path(self, path: str) -> RunRecord | Project:
        """The project at `project` or `entity/project`, or the run at a longer path."""
        parts = [part for part in path.strip("/ ").split("/") if part]
        if len(parts) in {1, 2}:
            return self.project(parts[-1], parts[0] if len(parts) == 2 else None)
        return self.run(path)

    def flush(self) -> None:
        """Nothing: every call asks the server. (W&B's Api keeps what it has read until it is flushed.)"""

    def execute(self, operation: operations.Operation) -> dict[str, Any]:
        """One GraphQL operation; for `RunRecord` and `Runs`."""
        return self._connection.execute(operation)

    if not TYPE_CHECKING:  # a type checker is to find misspelt names

        def __getattr__(self, name: str) -> NoReturn:
            if name in _NOT_HERE:
                raise MissingNameError(f"wbdist's Api has no `{name}`: {_NOT_HERE[name]}")
            raise AttributeError(f"wbdist's Api has no attribute {name!r}")
