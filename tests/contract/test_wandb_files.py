"""W&B's own SDK, unmodified, saves, restores, uploads and deletes files on our server."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("wandb")

SAVE = """
import pathlib, time, wandb
run = wandb.init(project="p", id="saver")
for name, policy in (("live.bin", "live"), ("now.bin", "now"), ("end.bin", "end")):
    pathlib.Path(name).write_bytes(b"first " + name.encode())
    run.save(name, policy=policy)
deadline = time.monotonic() + 40
def stored(name):
    found = [f for f in wandb.Api().run("local/p/saver").files([name]) if f.md5 != "0"]
    return found[0].size if found else None
while stored("live.bin") is None or stored("now.bin") is None:
    assert time.monotonic() < deadline
    time.sleep(0.3)
assert stored("end.bin") is None, "policy end waits for the end"
for name in ("live.bin", "end.bin"):
    pathlib.Path(name).write_bytes(b"second " + name.encode())
while stored("live.bin") != len(b"second live.bin"):
    assert time.monotonic() < deadline
    time.sleep(0.3)
pathlib.Path("now.bin").unlink()
pathlib.Path("now.bin").write_bytes(b"never seen")
run.finish()
"""

READ = """
import os, pathlib, wandb
found = wandb.restore("live.bin", run_path="local/p/saver", root="restored")
print("RESTORED", pathlib.Path(found.name).read_bytes())
try:
    print("MISSING", wandb.restore("nothing.bin", run_path="local/p/saver", root="restored"))
except ValueError as error:
    print("MISSING", error)
api = wandb.Api()
run = api.run("local/p/saver")
pathlib.Path("up").mkdir()
pathlib.Path("up/more.txt").write_text("more")
run.upload_file("up/more.txt")
run.upload_file("up/more.txt")
file = run.file("up/more.txt")
file.download(root="down", replace=True)
print("DOWN", pathlib.Path("down/up/more.txt").read_text(), file.size)
print("END", pathlib.Path(run.file("end.bin").download(root="down").name).read_bytes())
before = sorted(f.name for f in run.files(per_page=2))
run.file("up/more.txt").delete()
after = sorted(f.name for f in api.run("local/p/saver").files())
print("GONE", set(before) - set(after), len(before) - len(after))
"""


def test_files_saved_restored_uploaded_and_deleted(server: Any, sdk: Any) -> None:
    """Proves the policies live, now and end of run.save, wandb.restore, and the Api's files: download, upload, delete."""
    sdk.run(SAVE, timeout=90)
    said = sdk.run(READ)
    assert "RESTORED b'second live.bin'" in said
    assert "MISSING" in said
    assert "DOWN more 4" in said
    assert "END b'second end.bin'" in said
    assert "GONE {'up/more.txt'} 1" in said
