"""Checkpoints kept by the run's own server: `checkpoint_copy="run"`. Rank 0 only.

Each committed checkpoint becomes a version of the artifact `checkpoint-<run id>`: logged by the run, uploaded by the shipper,
which outlives a killed job. A job whose disk is gone asks the server for the run's attempts, which are the fence, and for the
newest version whose files are those of its manifest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from wbdist.checkpoint import claim as claims
from wbdist.checkpoint import copying
from wbdist.checkpoint.claim import Attempt, Claim, JobIdentity
from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import MANIFEST, TEMPORARY, Manifest, newest_first, parse, scan, verify
from wbdist.checkpoint.retention import Keep
from wbdist.errors import AwayError, CheckpointCorruptError, CheckpointError, CommError
from wbdist.protocol import artifacts as protocol
from wbdist.run.artifacts import Artifact
from wbdist.run.artifacts_api import ArtifactNotFoundError, UsedArtifact
from wbdist.run.handle import Run
from wbdist.run.lifecycle import RunSpec
from wbdist.run.reader import Api, RunNotFoundError

log = logging.getLogger("wbdist.job")

CHECKPOINT = "checkpoint"
"""Key of an artifact's metadata: the checkpoint's name. Not an alias, which an archived stretch of the run takes along."""
LOOKED_AT = 20
"""Versions below `latest` in which a whole checkpoint is looked for."""
GAP = 4
"""Versions above `latest` that are not there in a row, after which there are no more."""


class RunCopies:
    """`Elsewhere`: the files of the run."""

    through_run = True
    url = "the run's server"

    def __init__(self, spec: RunSpec, run_id: str | None, *, per_rank: bool) -> None:
        """Touches nothing. `run_id`: the id asked for; without one, an empty directory is a new job's."""
        self._spec = spec
        self._asked = run_id
        # Slot 0's run has them; `own_runs.per_rank_id` says how it is called.
        self._suffix = "-r0" if per_rank and not spec.settings.sweep_id else ""
        self._run: Run | None = None
        self._run_id = ""
        self._kept: dict[str, Manifest] = {}
        """What the server has, as far as this process knows."""

    def bind(self, run: Run, run_id: str) -> None:
        """The open run that logs the checkpoints; `run_id` is the job's."""
        self._run, self._run_id = run, run_id

    def adopt(self, directory: Path) -> None:
        run_id = claims.run_of(directory) or self._asked
        if run_id is None:
            return
        try:
            attempts = self._api().run(self._path(run_id)).attempts()
        except RunNotFoundError:
            return
        except CommError as error:
            raise CheckpointError(f"cannot ask {self.url} for the attempts of run {run_id}: {error}") from error
        known = [Attempt(one.attempt, "", one.started_at, "", 0, one.cause) for one in attempts if one.attempt > 0]
        identity = JobIdentity(run_id, self._spec.project, self._spec.entity, self._spec.name, time.time())
        claims.adopt(directory, identity, known)

    def take_over(self, layer: FileLayer, held: Claim) -> tuple[str, ...]:
        self._run_id = held.job.run_id
        try:
            there = _with_manifests(self._versions())
        except (CommError, OSError) as error:
            raise CheckpointError(f"cannot ask {self.url} for checkpoints of run {self._run_id}: {error}") from error
        self._kept = {manifest.name: manifest for manifest, _ in there}
        by_name = {manifest.name: artifact for manifest, artifact in there}
        local, _ = scan(held.directory)
        notes = copying.bring_newest(
            layer,
            local,
            list(self._kept.values()),
            fetch=lambda manifest: _fetch(by_name[manifest.name], manifest, layer, held.directory),
            put_away=lambda manifest, _: f"{by_name[manifest.name].qualified_name}, which stays as it is",
            url=self.url,
        )
        for note in notes:
            log.warning("%s", note)
        return tuple(notes)

    def ship(self, manifest: Manifest, source: Path, attempt: int) -> None:
        del attempt  # the server fences the run's own lines
        assert self._run is not None
        if manifest.name in self._kept:
            return
        artifact = Artifact(self._collection(), "model", metadata={CHECKPOINT: manifest.name})
        artifact.add_dir(source, policy="immutable")
        try:
            self._run.log_artifact(artifact)
        except OSError as error:
            raise CheckpointError(f"{manifest.name} cannot be set aside for {self.url}: {error}") from error
        self._kept[manifest.name] = manifest

    def prune(self, keep: Keep, protected: Collection[str | None]) -> None:
        """Counts only what the server has: the newest may be on its way yet."""
        try:
            there = {_name_of(artifact): artifact for artifact in self._versions()}
            known = [self._kept[name] for name in there if name in self._kept]
            for old in keep.doomed(sorted(known, key=newest_first)):
                if old.name not in protected:
                    self._api().execute(protocol.delete(there[old.name].id))
                    del self._kept[old.name]
        except CommError as error:
            log.info("old checkpoints of run %s stay on the server for now: %s", self._run_id, error)

    def _versions(self) -> list[UsedArtifact]:
        """The newest versions. `latest` is only where the search begins: it does not follow what an archived stretch logged."""
        api, found = self._api(), []
        try:
            number = int(api.artifact(f"{self._address()}:latest").version.removeprefix("v"))
        except ArtifactNotFoundError:
            number = 0
        older, gone = number - 1, 0
        while gone < GAP:
            one = _version(api, f"{self._address()}:v{number}")
            gone = gone + 1 if one is None else 0
            found += [] if one is None else [one]
            number += 1
        for number in range(older, max(-1, older - LOOKED_AT), -1):
            one = _version(api, f"{self._address()}:v{number}")
            found += [] if one is None else [one]
        return found

    def _api(self) -> Api:
        return Api(settings=self._spec.settings)

    def _path(self, run_id: str) -> str:
        parts = (self._spec.entity, self._spec.project, run_id + self._suffix)
        return "/".join(part for part in parts if part)

    def _collection(self) -> str:
        return f"checkpoint-{self._run_id}"

    def _address(self) -> str:
        return "/".join(part for part in (self._spec.entity, self._spec.project, self._collection()) if part)


def _version(api: Api, name: str) -> UsedArtifact | None:
    try:
        return api.artifact(name)
    except ArtifactNotFoundError:
        return None


def _name_of(artifact: UsedArtifact) -> str:
    return str(artifact.metadata.get(CHECKPOINT, ""))


def _with_manifests(found: list[UsedArtifact]) -> list[tuple[Manifest, UsedArtifact]]:
    """Those whose manifest can be read and verifies. Raises AwayError or OSError when that cannot be found out."""
    whole = []
    with TemporaryDirectory(prefix="wbdist-") as folder:
        for artifact in found:
            try:
                raw = Path(artifact.get_entry(MANIFEST).download(Path(folder) / artifact.version)).read_bytes()
                whole.append((parse(raw, _name_of(artifact), artifact.qualified_name), artifact))
            except (AwayError, OSError):
                raise  # nothing is known about it
            except (CheckpointCorruptError, CommError, KeyError) as error:
                log.warning("artifact %s holds no checkpoint: %s", artifact.qualified_name, error)
    return whole


def _fetch(artifact: UsedArtifact, manifest: Manifest, layer: FileLayer, directory: Path) -> None:
    temporary = directory / (manifest.name + TEMPORARY)
    if temporary.exists():
        layer.remove_tree(temporary)
    try:
        artifact.download(temporary)
    except AwayError as error:  # an older one would lose what was trained since
        raise CheckpointError(f"checkpoint {artifact.qualified_name} cannot be fetched now: {error}") from error
    except CommError as error:
        raise CheckpointCorruptError(f"checkpoint {artifact.qualified_name} cannot be fetched: {error}") from error
    verify(msgspec.structs.replace(manifest, directory=str(temporary)))
    layer.rename(temporary, directory / manifest.name)
    layer.sync_directory(directory)
