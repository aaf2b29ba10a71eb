"""Artifacts: logged, used, offline, and through kills, against the real server."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wbdist
from wbdist.protocol.artifacts import Manifest, ManifestEntry

ROOT = Path(__file__).resolve().parents[2]


def test_log_use_download(embedded: Path, own_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves versions, aliases, metadata, names, the one-file form, entries, and that what is logged cannot be changed."""
    (own_directory / "data/sub").mkdir(parents=True)
    (own_directory / "data/a.bin").write_bytes(bytes(range(256)) * 5000)
    (own_directory / "data/sub/empty").touch()
    with wbdist.init(project="p") as run:
        first = wbdist.Artifact("data-set", "dataset", description="d", metadata={"rows": 3})
        first.add_dir("data")
        first.add_file("data/a.bin", "copy.bin")
        with first.new_file("note.txt") as file:
            file.write("written here")
        assert run.log_artifact(first, aliases=["mine"]) is first
        (own_directory / "data/a.bin").write_bytes(b"changed at once")
        assert (first.wait(60).version, first.name, first.state) == ("v0", "data-set:v0", "COMMITTED")
        assert sorted(first.aliases) == ["latest", "mine"]
        for change in (lambda: first.add_file("data/a.bin"), lambda: run.log_artifact(first)):
            with pytest.raises(wbdist.UsageError, match="logged"):
                change()
        second = run.log_artifact("data/a.bin", name="data-set", type="dataset")
        assert second.wait(60).version == "v1"
        again = run.log_artifact("data/a.bin", name="data-set", type="dataset")
        assert again.wait(60).version == "v1", "the same contents are no new version"
    with wbdist.init(project="p") as user:
        used = user.use_artifact("data-set:mine", type="dataset")
        assert (used.version, used.metadata, used.description, used.file_count) == ("v0", {"rows": 3}, "d", 4)
        place = Path(used.download())
        assert place == Path("artifacts/data-set:v0")
        assert (place / "a.bin").read_bytes() == (place / "copy.bin").read_bytes() == bytes(range(256)) * 5000
        assert (place / "sub/empty").read_bytes() == b""
        assert (place / "note.txt").read_text() == "written here"
        (place / "a.bin").write_bytes(b"damaged")
        assert Path(used.get_entry("a.bin").download()).stat().st_size == 256 * 5000
        monkeypatch.setenv("WANDB_ARTIFACT_DIR", str(own_directory / "kept"))
        elsewhere = wbdist.Api().artifact("p/data-set:mine").get_entry("note.txt").download()
        assert Path(elsewhere) == own_directory / "kept/data-set:v0/note.txt"
        assert Path(user.use_artifact("data-set").file("one")).read_bytes() == b"changed at once"
        with pytest.raises(wbdist.UsageError, match="4 files"):
            used.file()
        with pytest.raises(ValueError, match="dataset"):
            user.use_artifact("data-set", type="model")
        with pytest.raises(wbdist.CommError, match="nothing"):
            user.use_artifact("nothing:latest")
    api = wbdist.Api()
    logged = api.run(run.path).logged_artifacts(per_page=1)
    assert (len(logged), [one.name for one in logged]) == (2, ["data-set:v0", "data-set:v1"])
    assert logged[0].digest == first.digest
    assert sorted(one.name for one in api.run(user.path).used_artifacts()) == ["data-set:v0", "data-set:v1"]
    assert not list(api.run(user.path).logged_artifacts())
    assert api.artifact("p/data-set:v0").digest == first.digest
    assert api.artifact_exists("p/data-set")
    assert not api.artifact_exists("p/data-set:v7")


def test_models_links_references_and_code(embedded: Path, own_directory: Path) -> None:
    """Proves log_model/use_model of a file and of a checkpoint's directory, links, references, log_code and bad arguments."""
    (own_directory / "model.pt").write_bytes(b"weights")
    (own_directory / "step-5").mkdir()
    for name in ("manifest.json", "rank0.bin"):
        (own_directory / "step-5" / name).write_text(name)
    (own_directory / "code").mkdir()
    (own_directory / "code/train.py").write_text("print('train')")
    (own_directory / "code/notes.md").write_text("no code")
    with wbdist.init(project="p") as run:
        model = run.log_model("model.pt", name="net", aliases=["best"])
        model.wait(60)
        assert Path(run.use_model("net:best")).read_bytes() == b"weights"
        run.log_model(own_directory / "step-5", name="checkpoint").wait(60)
        for path in (own_directory / "step-5").iterdir():
            path.unlink()  # what retention does
        assert sorted(path.name for path in Path(run.use_model("checkpoint")).iterdir()) == ["manifest.json", "rank0.bin"]
        run.link_artifact(model, "released-nets", aliases=["prod"])
        assert run.use_artifact("released-nets:prod").get_entry("model.pt").size == 7
        pointing = wbdist.Artifact("far", "dataset")
        pointing.add_reference((own_directory / "model.pt").as_uri())
        pointing.add_reference("s3://bucket/key.bin")
        run.log_artifact(pointing).wait(60)
        far = run.use_artifact("far")
        assert Path(far.get_entry("model.pt").download("got")).read_bytes() == b"weights"
        assert far.get_entry("key.bin").ref == "s3://bucket/key.bin"
        code = run.log_code("code")
        assert code is not None
        assert list(code.wait(60).entries()) == ["train.py"]
        assert run.log_code("code", include_fn=lambda path: path.endswith(".txt")) is None
        for name in ("", "a/b", "x" * 129):
            with pytest.raises(ValueError, match="name"):
                wbdist.Artifact(name, "dataset")
        with pytest.raises(ValueError, match="no such file"):
            wbdist.Artifact("a", "t").add_file("missing")
        with pytest.raises(ValueError, match=r"\.\."):
            wbdist.Artifact("a", "t").add_file("model.pt", "../out")


KILLED = """
    import os, signal, sys
    import wbdist
    run = wbdist.init(project="p", id="maker")
    open("model.bin", "wb").write(b"m" * 3_000_000)
    run.log_model("model.bin", name="net")
    run.log({"x": 1})
    open("model.bin", "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_killed_job_leaves_its_artifact(embedded: Path, own_directory: Path, script: Any, mode: str) -> None:
    """Proves that what was logged before SIGKILL arrives with `wbdist sync`, once, however often it is repeated."""
    assert script(KILLED, WBDIST_MODE=mode).returncode == -signal.SIGKILL
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        command = [sys.executable, "-m", "wbdist", "sync", "wandb"]
        synced = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert synced.returncode == 0, synced.stdout + synced.stderr
    found = wbdist.Api().artifact("p/net")
    assert (found.version, found.type, found.aliases) == ("v0", "model", ["latest"])
    assert hashlib.sha256(Path(found.file()).read_bytes()).digest() == hashlib.sha256(b"m" * 3_000_000).digest()


def test_the_digest_is_wandbs() -> None:
    """Proves the manifest's digest against one that W&B's SDK gave."""
    wandb = pytest.importorskip("wandb")
    theirs = wandb.Artifact("a", "t")
    with theirs.new_file("b.txt") as file:
        file.write("b")
    with theirs.new_file("a/x.txt") as file:
        file.write("x")
    contents = {name: ManifestEntry(entry.digest) for name, entry in theirs.manifest.entries.items()}
    assert Manifest(contents).digest() == theirs.digest
    ours = wbdist.Artifact("a", "t")
    with ours.new_file("a/x.txt") as file:
        file.write("x")
    with ours.new_file("b.txt") as file:
        file.write("b")
    assert ours.digest == theirs.digest
