"""Logging an artifact: its files are set aside, the journal gets a record, the shipper does the rest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from wbdist.errors import CommError, DeadlineError, UsageError
from wbdist.protocol import artifacts as protocol
from wbdist.protocol.artifacts import Manifest
from wbdist.run.artifact_record import STAGED, ArtifactRecord
from wbdist.run.artifacts import Artifact, LocalEntry, described
from wbdist.run.journal_format import Kind
from wbdist.run.snapshots import snapshot

if TYPE_CHECKING:
    from wbdist.run.artifacts_api import UsedArtifact
    from wbdist.run.handle import Run
    from wbdist.run.journal import JournalWriter

MANIFEST = "manifest.json"
"""Of a committed checkpoint (`checkpoint/manifest.py`), which nobody writes into any more."""
WAIT_SECONDS = 600.0
_POLL = 0.2


class Logged:
    """An artifact on its way."""

    def __init__(self, run: Run, artifact: Artifact, manifest: Manifest) -> None:
        self._run = run
        self._artifact = artifact
        self.manifest = manifest
        self.found: UsedArtifact | None = None

    def wait(self, timeout: float | None) -> UsedArtifact:
        """See `Artifact.wait`."""
        if self.found is not None:
            return self.found
        run, artifact = self._run, self._artifact
        if run.offline:
            raise UsageError(
                f"artifact {artifact.name} was logged offline and gets its version when the run is synced (wbdist sync)"
            )
        seconds = WAIT_SECONDS if timeout is None else timeout
        deadline = monotonic() + seconds
        error = run.ship_files(seconds)
        from wbdist.run.artifacts_api import UsedArtifact
        from wbdist.run.reader import Api

        api = Api(settings=run.settings)
        while True:
            number = protocol.read_client_id(api.execute(protocol.by_client_id(artifact.client_id)))
            there = protocol.read_by_id(api.execute(protocol.by_id(number))) if number is not None else None
            if there is None and not error:
                # The collection had these very files already: that version is meant, and has another's client id.
                there = protocol.read_by_name(
                    api.execute(protocol.by_name(run.entity or api.default_entity, run.project, f"{artifact.name}:latest"))
                )
                if there is not None and there.digest != self.manifest.digest():
                    there = None
            if there is not None and there.state == "COMMITTED":
                self.found = UsedArtifact(api, there)
                return self.found
            if error:
                raise CommError(f"artifact {artifact.name} of run {run.id} did not arrive: {error}")
            if monotonic() > deadline:
                raise DeadlineError(f"artifact {artifact.name} of run {run.id} is not on the server after {seconds:g} s")
            sleep(_POLL)


class Staged(NamedTuple):
    directory: Path
    manifest: Manifest


def stage(artifact: Artifact, directory: Path) -> Staged:
    """Sets an artifact's contents aside below the run's `directory`. Raises UsageError when it is logged already, OSError."""
    artifact.check_draft()
    staged = directory / STAGED / artifact.client_id
    shutil.rmtree(staged, ignore_errors=True)  # of a try that failed
    staged.mkdir(parents=True)
    contents = {}
    for number, (name, entry) in enumerate(sorted(artifact.entries().items())):
        path = None if entry.path is None else _set_aside(entry, staged / str(number))
        contents[name] = described(entry, path)
    manifest = Manifest(contents)
    (staged / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return Staged(staged, manifest)


def record(run: Run, journal: JournalWriter, artifact: Artifact, staged: Staged, aliases: Sequence[str]) -> None:
    """Journals it; from here on it is logged. Raises JournalError."""
    rule = journal.rule
    said = ArtifactRecord(
        staged=str(staged.directory),
        name=artifact.name,
        type=artifact.type,
        client_id=artifact.client_id,
        digest=staged.manifest.digest(),
        aliases=list(dict.fromkeys(["latest", *aliases])),
        description=artifact.description,
        metadata=json.dumps(artifact.metadata),
        step=rule.step if rule.open else rule.last_step,
    )
    journal.append(Kind.ARTIFACT, msgspec.to_builtins(said))
    artifact.logged(Logged(run, artifact, staged.manifest))


def _set_aside(entry: LocalEntry, target: Path) -> Path:
    assert entry.path is not None
    if entry.immutable:
        try:
            os.link(entry.path.resolve(), target)
        except OSError:
            pass  # another disk
        else:
            return target
    snapshot(entry.path, target, None)
    return target


def artifact_of(given: Any, name: str | None, type: str | None, run_id: str) -> Artifact:
    """What `log_artifact` was given, as an Artifact. Raises UsageError."""
    if isinstance(given, Artifact):
        if (name or type) and (name or given.name, type or given.type) != (given.name, given.type):
            raise UsageError("name and type are the Artifact's own; leave them out, or give a path instead of an Artifact")
        return given
    path = Path(given)
    made = Artifact(name or f"run-{run_id}-{path.name}", type or "unspecified")
    if path.is_dir():
        made.add_dir(path, policy="immutable" if (path / MANIFEST).exists() else "mutable")
    elif path.is_file():
        made.add_file(path)
    else:
        made.add_reference(os.fspath(given))
    return made
