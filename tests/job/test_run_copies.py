"""`checkpoint_copy="run"`: what a job does when the server that has its checkpoints fails while it is asked for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ports import free_port

from wbdist import settings
from wbdist.checkpoint.claim import Claim
from wbdist.checkpoint.files import FileLayer
from wbdist.errors import CheckpointCorruptError, CheckpointError
from wbdist.job import run_copies
from wbdist.protocol.artifacts import RemoteArtifact
from wbdist.run.artifacts_api import UsedArtifact
from wbdist.run.init import make_spec


def artifact(manifest_url: str) -> UsedArtifact:
    facts: Any = {"id": "a", "entity": "e", "project": "p", "name": "checkpoint-r", "version": 3, "type": "model", "size": 1}
    facts |= {"state": "COMMITTED", "digest": "d", "description": "", "metadata": {}, "aliases": [], "file_count": 1}
    found = RemoteArtifact(**facts, created_at="2026-01-01T00:00:00Z", manifest_url=manifest_url)
    return UsedArtifact(None, found)  # type: ignore[arg-type]  # no other question is asked


def test_a_server_that_fails_meanwhile_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a job does not begin anew, nor from an older checkpoint, because a newer one could not be read just now; one
    that is not whole on the server is passed over, as before."""
    away = artifact(f"http://127.0.0.1:{free_port()}/manifest")
    claim = Claim.take(tmp_path / "ckpt", run_id="r", project="p", entity="", name=None)
    copies = run_copies.RunCopies(make_spec(settings.resolve({"project": "p"})), "r", per_rank=False)
    monkeypatch.setattr(copies, "_versions", lambda: [away])
    with pytest.raises(CheckpointError, match=r"cannot ask the run's server .* cannot be read"):
        copies.take_over(FileLayer(), claim)
    manifest: Any = SimpleNamespace(name="step-000000000010.a000001")
    with pytest.raises(CheckpointError, match="cannot be fetched now") as raised:
        run_copies._fetch(away, manifest, FileLayer(), tmp_path)
    assert not isinstance(raised.value, CheckpointCorruptError)
    monkeypatch.setattr(copies, "_versions", lambda: [artifact("")])
    assert copies.take_over(FileLayer(), claim) == ()
    with pytest.raises(CheckpointCorruptError, match="not complete"):
        run_copies._fetch(artifact(""), manifest, FileLayer(), tmp_path)
    claim.release()
