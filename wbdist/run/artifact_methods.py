"""What a run does with artifacts: logs them, uses them. Everything beyond the names is loaded when it is first used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wbdist.errors import UsageError

if TYPE_CHECKING:
    from wbdist.run.artifacts import Artifact
    from wbdist.run.artifacts_api import UsedArtifact
    from wbdist.run.handle import Run

AnyPath = str | os.PathLike[str]


class ArtifactMethods:
    """Part of `Run`."""

    def _run(self) -> Run:
        return cast("Run", self)

    def log_artifact(
        self,
        artifact_or_path: Artifact | AnyPath,
        name: str | None = None,
        type: str | None = None,
        aliases: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
    ) -> Artifact:
        """Makes an Artifact, or the file or directory at a path, the next version of its name; it also becomes `latest`.

        Its files are set aside before this returns (blocks shared where the file system can, else copied), the upload goes on
        in the background, and offline waits for `wbdist sync`; `artifact.wait()` waits for it, as `finish` does. The very
        same contents again are no new version. `tags` are W&B's, and refused. Raises ValueError, UsageError, OSError;
        nothing is logged then.
        """
        if tags:
            raise UsageError(
                f"log_artifact(tags={list(tags)!r}): artifacts have no tags here; give aliases, or put them into metadata"
            )
        return self._log_artifact(artifact_or_path, name, type, aliases or ())

    def log_model(self, path: AnyPath, name: str | None = None, aliases: Sequence[str] | None = None) -> Artifact:
        """Logs a file or directory as an artifact of type `model`, named `name` or `run-<id>-<basename>`. As `log_artifact`.

        The directory of a committed checkpoint is linked, not copied: nobody writes into it any more.
        """
        return self._log_artifact(path, name, "model", aliases or ())

    def log_code(
        self,
        root: AnyPath | None = ".",
        name: str | None = None,
        include_fn: Callable[..., bool] | None = None,
        exclude_fn: Callable[..., bool] | None = None,
    ) -> Artifact | None:
        """Logs the source files below `root` as an artifact of type `code`; None when there are none. As `log_artifact`.

        `include_fn(path)` or `include_fn(path, root)`: which files, default those that end with `.py`; `exclude_fn`: which of
        these not, default those in virtual environments and run directories.
        """
        from wbdist.run.code import code_artifact

        made = code_artifact(self._run(), Path(root or "."), name, include_fn, exclude_fn)
        return None if made is None else self._log_artifact(made, None, None, ())

    def use_artifact(
        self,
        artifact_or_name: str | Artifact | UsedArtifact,
        type: str | None = None,
        aliases: Any = None,
        use_as: str | None = None,
    ) -> UsedArtifact:
        """The artifact `[[entity/]project/]name[:alias]`, noted as an input of this run. Asks the server, so not offline.

        Raises ArtifactNotFoundError, CommError, UsageError; ValueError when it is of another type.
        """
        del aliases, use_as  # W&B's deprecated arguments
        from wbdist.protocol import artifacts as protocol
        from wbdist.run import artifacts_api
        from wbdist.run.artifacts import Artifact
        from wbdist.run.reader import Api

        run = self._run()
        if run.offline or run.disabled:
            raise UsageError(f"use_artifact({artifact_or_name!r}) asks the server, and this run is {run.settings.mode}")
        api = Api(settings=run.settings)
        if isinstance(artifact_or_name, Artifact):
            artifact_or_name.wait()
            artifact_or_name = artifact_or_name.name
        if isinstance(artifact_or_name, str):
            artifact_or_name = artifacts_api.find(api, artifact_or_name, type, run.entity or None, run.project)
        api.execute(protocol.use((run.entity or api.default_entity, run.project, run.id), artifact_or_name.id))
        return artifact_or_name

    def use_model(self, name: str) -> str:
        """Downloads a model artifact; the path of its file, or of its directory when it has several. As `use_artifact`."""
        found = self.use_artifact(name)
        if "model" not in found.type:
            raise UsageError(f"{found.qualified_name} is of type {found.type!r}; use_model takes types that contain 'model'")
        return found.file() if found.file_count == 1 else found.download()

    def link_artifact(self, artifact: Artifact | UsedArtifact, target_path: str, aliases: list[str] | None = None) -> None:
        """Makes a logged artifact a version of the collection `[[entity/]project/]name` as well. Waits until it is logged."""
        artifact.link(target_path, aliases)

    def link_model(
        self, path: AnyPath, registered_model_name: str, name: str | None = None, aliases: list[str] | None = None
    ) -> Artifact:
        """`log_model`, linked to the collection `registered_model_name`. Waits until it is logged."""
        logged = self.log_model(path, name)
        logged.link(registered_model_name, aliases)
        return logged

    def _log_artifact(self, given: Any, name: str | None, type: str | None, aliases: Iterable[str]) -> Artifact:
        from wbdist.run import artifact_logging

        run = self._run()
        artifact = artifact_logging.artifact_of(given, name, type, run.id)
        run.keep_artifact(artifact, [aliases] if isinstance(aliases, str) else list(aliases))
        return artifact
