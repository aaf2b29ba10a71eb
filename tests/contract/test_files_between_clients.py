"""Files that one client saves and the other reads: W&B's SDK and ours, at one server."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import wbdist


@pytest.fixture
def ours(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process speaks to the SDK's server, from a directory of its own."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", server.key)
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    return tmp_path / "ours"


def test_what_we_save_the_sdk_reads(sdk: Any, ours: Path) -> None:
    """Proves that W&B's Api lists our files with size and digest, downloads and restores them byte by byte, and what was
    printed as output.log."""
    data = bytes(range(256)) * 1000
    (ours / "sub").mkdir()
    (ours / "sub/weights.bin").write_bytes(data)
    with wbdist.init(project="p", id="ours") as run:
        run.log({"x": 1})
        run.save("sub/weights.bin")
        print("printed by ours")
    assert wbdist.Api().run("local/p/ours").file("output.log").download(root="read").read() == b"printed by ours\n"
    script = """
import hashlib, wandb
api = wandb.Api()
file = api.run("local/p/ours").file("sub/weights.bin")
print("FILE", file.size, file.mimetype)
path = file.download(root="got").name
print("SHA", hashlib.sha256(open(path, "rb").read()).hexdigest())
print("LOG", open(api.run("local/p/ours").file("output.log").download(root="got").name).read())
print("RESTORED", wandb.restore("sub/weights.bin", run_path="local/p/ours", root="again").name)
"""
    said = sdk.run(script)
    assert "FILE 256000 application/octet-stream" in said
    assert f"SHA {hashlib.sha256(data).hexdigest()}" in said
    assert "LOG printed by ours\n" in said
    assert "again/sub/weights.bin" in said


def test_what_the_sdk_saves_we_read(sdk: Any, ours: Path) -> None:
    """Proves that our Api and `restore` read an SDK run's files, and that what we upload to it the SDK sees."""
    script = """
import wandb
open("model.bin", "wb").write(bytes(range(256)))
run = wandb.init(project="p", id="theirs")
run.log({"x": 1})
run.save("model.bin")
run.finish()
"""
    sdk.run(script)
    found = wbdist.Api().run("local/p/theirs")
    assert {"model.bin", "config.yaml", "wandb-metadata.json", "wandb-summary.json"} <= {file.name for file in found.files()}
    assert found.file("model.bin").download().read() == bytes(range(256))
    restored = wbdist.restore("./model.bin", run_path="local/p/theirs", root=ours / "there")
    assert restored is not None
    assert restored.read() == bytes(range(256))
    (ours / "added.txt").write_text("by us")
    found.upload_file("added.txt")
    assert sdk.read("api.run('local/p/theirs').file('added.txt').download(replace=True).read()") == "by us"


def test_artifacts_both_ways(sdk: Any, ours: Path) -> None:
    """Proves that each client uses what the other has logged, byte by byte, with versions and aliases."""
    (ours / "net.bin").write_bytes(bytes(range(256)))
    with wbdist.init(project="p", id="ours") as run:
        run.log_model("net.bin", name="net", aliases=["best"]).wait(60)
    script = """
import wandb
run = wandb.init(project="p", id="theirs")
art = run.use_artifact("net:best")
print("READ", open(art.file(), "rb").read() == bytes(range(256)), art.version, art.type, sorted(art.aliases))
made = wandb.Artifact("data", "dataset", metadata={"k": 1})
with made.new_file("sub/x.txt") as f:
    f.write("theirs")
run.log_artifact(made, aliases=["new"]).wait()
run.finish()
"""
    assert "READ True v0 model ['best', 'latest']" in sdk.run(script)
    found = wbdist.Api().artifact("local/p/data:new")
    assert (found.version, found.metadata) == ("v0", {"k": 1})
    assert (Path(found.download()) / "sub/x.txt").read_text() == "theirs"
