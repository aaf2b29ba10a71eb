"""W&B's own SDK, unmodified, logs, uses and edits artifacts on our server."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")

LOG = """
import os, wandb
run = wandb.init(project="p", id="maker")
data = os.urandom(1 << 20) * 50
open("big.bin", "wb").write(data)
for round in range(2):
    art = wandb.Artifact("data", type="dataset", description="d", metadata={"k": [1, 2]})
    art.add_file("big.bin")
    with art.new_file("sub/note.txt") as f:
        f.write(f"round {round}")
    run.log_artifact(art, aliases=["mine"] if round == 0 else None)
    art.wait()
again = wandb.Artifact("data", type="dataset")
again.add_file("big.bin")
with again.new_file("sub/note.txt") as f:
    f.write("round 1")
run.log_artifact(again).wait()
print("VERSION", again.version)
run.finish()
"""

USE = """
import filecmp, wandb
run = wandb.init(project="p", id="user")
art = run.use_artifact("data:latest")
folder = art.download()
assert filecmp.cmp("big.bin", folder + "/big.bin", shallow=False)
assert open(folder + "/sub/note.txt").read() == "round 1"
old = run.use_artifact("data:mine")
assert open(old.get_entry("sub/note.txt").download()).read() == "round 0"
print("USED", art.version, old.version, art.metadata)
run.finish()
"""

READ = """{
    "versions": [(a.version, sorted(a.aliases), a.size, a.state) for a in api.artifacts("dataset", "local/p/data")],
    "types": [t.name for t in api.artifact_types("local/p") if t.name == "dataset"],
    "collections": [c.name for c in api.artifact_type("dataset", "local/p").collections()],
    "exists": [api.artifact_exists("local/p/" + name) for name in ("data:v0", "data:v9", "no")],
    "logged": [a.name for a in api.run("local/p/maker").logged_artifacts() if a.type == "dataset"],
    "used": sorted(a.name for a in api.run("local/p/user").used_artifacts()),
    "by": api.artifact("local/p/data:v0").logged_by().id,
    "users": [r.id for r in api.artifact("local/p/data:v1").used_by()],
    "files": sorted(f.name for f in api.artifact("local/p/data:v0").files()),
    "description": api.artifact("local/p/data:v0").description,
}"""

EDIT = """
import wandb
api = wandb.Api()
a = api.artifact("local/p/data:v0")
a.aliases.append("best")
a.aliases.remove("mine")
a.metadata["k"] = 5
a.description = "changed"
a.tags = ["good"]
a.save()
b = wandb.Api().artifact("local/p/data:best")
print("EDITED", b.version, sorted(b.aliases), b.metadata, b.description, b.tags)
for wrong in ("local/p/data:mine", "local/p/data:v7", "local/p/none:latest"):
    try:
        wandb.Api().artifact(wrong)
    except Exception as error:
        print("REFUSED", type(error).__name__)
b.delete(delete_aliases=True)
print("LEFT", [x.version for x in wandb.Api().artifacts("dataset", "local/p/data")])
"""


def test_an_artifact_is_logged_used_read_and_edited(server: Any, sdk: Any, tmp_path: Path) -> None:
    """Proves 50 MB through log_artifact and use_artifact unharmed, versions, dedup by digest and by content, aliases, lineage,
    edits and deletion."""
    assert "VERSION v1" in sdk.run(LOG), "the same content is the same version"
    assert "USED v1 v0 {'k': [1, 2]}" in sdk.run(USE)
    got = sdk.read(READ)
    size = 50 * 2**20 + len("round 0")
    assert got["versions"] == [["v1", ["latest"], size, "COMMITTED"], ["v0", ["mine"], size, "COMMITTED"]]
    assert (got["types"], got["collections"], got["exists"]) == (["dataset"], ["data"], [True, False, False])
    assert (got["logged"], got["used"]) == (["data:v0", "data:v1"], ["data:v0", "data:v1"])
    assert (got["by"], got["users"], got["description"]) == ("maker", ["user"], "d")
    assert got["files"] == ["big.bin", "sub/note.txt"]
    big = hashlib.sha256((tmp_path / "sdk" / "big.bin").read_bytes()).hexdigest()
    blobs = [path.name for path in (server.data_dir / "files" / "blobs").rglob("*") if path.is_file()]
    assert blobs.count(big) == 1
    edited = sdk.run(EDIT)
    assert "EDITED v0 ['best'] {'k': 5} changed ['good']" in edited
    assert edited.count("REFUSED") == 3
    assert "LEFT ['v1']" in edited


MODELS = """
import wandb
open("model.pt", "wb").write(b"weights" * 1000)
run = wandb.init(project="p", id="trainer", settings=wandb.Settings(save_code=True, code_dir="."))
run.log({"t": wandb.Table(columns=["a", "b"], data=[[1, "x"], [2, "y"]]), "loss": 1.0})
run.log_model("model.pt", name="net", aliases=["good"])
run.log_code(".", include_fn=lambda path: path.endswith("script.py"))
run.link_model("model.pt", "registered", name="net", aliases=["staging"])
run.finish()
wandb.Api().artifact("local/p/net:good").link("local/p/shelf", aliases=["prod"])
run = wandb.init(project="p", id="server")
path = run.use_model("net:good")
assert open(path, "rb").read() == b"weights" * 1000
run.finish()
api = wandb.Api()
table = api.artifact("local/p/run-trainer-t:latest").get("t")
print("TABLE", table.columns, table.data)
print("SHELF", api.artifact("local/p/shelf:prod").source_name, api.artifact("local/p/shelf:prod").version)
print("CODE", sorted(a.type for a in api.run("local/p/trainer").logged_artifacts()))
"""


@pytest.mark.slow
def test_models_tables_and_code(server: Any, sdk: Any) -> None:
    """Proves log_model, use_model, a link into a collection, a Table in a row read back, and logged code."""
    (sdk._folder / "script.py").write_text(MODELS)
    process = sdk.start("import runpy; runpy.run_path('script.py', run_name='__main__')")
    assert process.wait(90) == 0, sdk.log(process)
    said = sdk.log(process)
    assert "TABLE ['a', 'b'] [[1, 'x'], [2, 'y']]" in said
    assert "SHELF net:v0 v0" in said
    kinds = said.partition("CODE ")[2]
    assert "code" in kinds
    assert "model" in kinds
    assert "run_table" in kinds
