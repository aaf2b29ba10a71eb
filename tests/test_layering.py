"""The import graph is a DAG with fixed layers, and the light parts stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_imports_go_down_only() -> None:
    """Proves the layer contracts of pyproject.toml ([tool.importlinter]) hold."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module",
    ["wbdist", "wbdist.run.lifecycle", "wbdist.run.shipper", "wbdist.launch.supervisor", "wbdist.distributed.aggregator"],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    """Proves that parts living in every training process, or beside it, import neither torch nor the server."""
    heavy = ["torch", "numpy", "sqlalchemy", "starlette", "uvicorn", "graphql", "wbdist.server", "sklearn"]
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_multiprocess_has_few_importers() -> None:
    """Proves that `multiprocess` (whose queues do not mix with the standard library's) enters through the module that starts
    processes, and the pool, whose workers are its own."""
    importers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "wbdist").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import multiprocess", "from multiprocess"))
        and not line.strip().startswith(("import multiprocessing", "from multiprocessing"))
    ]
    ours = ("processes", "pool", "pool_jobs", "pool_keeper")
    assert set(importers) <= {f"wbdist/distributed/{name}.py" for name in ours}
