"""`wbdist server gc`: contents that nothing refers to go, everything else stays, also while the server works."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from wbdist.cli.server import command
from wbdist.protocol.attempts import BeginAttempt
from wbdist.server import garbage
from wbdist.server.context import AppContext
from wbdist.server.files import Content
from wbdist.server.store.files import FileVersion
from wbdist.server.store.interface import RunFields

OLD = time.time() - 7 * 86400


def receive(ctx: AppContext, data: bytes, *, old: bool = True) -> Content:
    with ctx.files.writer() as writer:
        writer.write(data)
        content = writer.keep()
    if old:
        os.utime(ctx.files.path(content.sha256), (OLD, OLD))
    return content


def new_run(ctx: AppContext, run_id: str, files: dict[str, Content], *, source: str = "") -> int:
    pk = ctx.store.upsert_run("local", "p", run_id, RunFields(), ctx.clock())[0].pk
    ctx.store.begin_attempt(pk, BeginAttempt(1, "n", "w", base_run=source), ctx.clock())
    for name, content in files.items():
        version = FileVersion(
            name=name, sha256=content.sha256, md5=content.md5, size=content.size, mimetype="", updated_at=ctx.clock()
        )
        ctx.store.files.add(pk, version)
    return pk


def gc(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(command, ["gc", "--data-dir", str(tmp_path / "data"), "--json", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_what_nothing_refers_to_goes(ctx: AppContext, tmp_path: Path) -> None:
    """Proves that contents of a deleted run and of cut-off uploads go, that those of other runs and of artifacts
    stay, and young ones too; that a dry run removes nothing, and a second run finds nothing."""
    shared, alone, cut_off = receive(ctx, b"shared"), receive(ctx, b"alone"), receive(ctx, b"cut off")
    young, of_artifact, manifest = receive(ctx, b"young", old=False), receive(ctx, b"artifact"), receive(ctx, b"replaced")
    gone = new_run(ctx, "gone", {"a": shared, "b": alone})
    keeper = new_run(ctx, "keeper", {"a": shared, "c": manifest})
    ctx.store.files.add(keeper, FileVersion(name="c", sha256="", md5="", size=0, mimetype="", updated_at=ctx.clock()))
    ctx.store.artifacts.add_content("local", of_artifact.md5, of_artifact.sha256, of_artifact.size)
    assert gc(tmp_path) == {"freed": 1, "bytes": 7, "kept": 5, "dry_run": False}
    assert not ctx.files.path(cut_off.sha256).exists()
    ctx.store.delete_run(gone, ctx.clock())
    assert gc(tmp_path, "--dry-run") == {"freed": 1, "bytes": 5, "kept": 4, "dry_run": True}
    assert ctx.files.path(alone.sha256).exists()
    assert gc(tmp_path) == {"freed": 1, "bytes": 5, "kept": 4, "dry_run": False}
    assert not ctx.files.path(alone.sha256).exists()
    for kept in (shared, young, of_artifact, manifest):
        assert ctx.files.path(kept.sha256).exists()
    assert gc(tmp_path)["freed"] == 0
    assert gc(tmp_path, "--older-than", "0")["freed"] == 1, "the young one"


def test_a_content_that_is_received_again_meanwhile_stays(ctx: AppContext) -> None:
    """Proves that an upload of what is about to be removed saves it, and that one which comes too late writes it anew."""
    content = receive(ctx, b"again")
    assert ctx.store.files.contents() == set()
    assert receive(ctx, b"again", old=False) == content
    freed = garbage.collect(ctx.store, ctx.files, time.time() - 3600)
    assert (freed.contents, freed.kept) == (0, 1)
    os.utime(ctx.files.path(content.sha256), (OLD, OLD))
    assert garbage.collect(ctx.store, ctx.files, time.time() - 3600).contents == 1
    assert receive(ctx, b"again", old=False) == content
    assert ctx.files.path(content.sha256).read_bytes() == b"again"
