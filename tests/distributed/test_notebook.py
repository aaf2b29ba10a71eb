"""A real Jupyter kernel runs cells that start ranks and pools from what is defined in them."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = (
    """
import os, wbdist
SCALE = 10
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
""",
    """
def train(base):
    rank = int(os.environ["RANK"])
    with wbdist.init(project="notebook", id=f"rank{rank}", mode="offline") as run:
        for step in range(3):
            run.log({"x": base + SCALE * rank + step})
    return Pair(rank, lambda: base + rank)

pairs = wbdist.launch(train, nprocs=2, args=(5,))
print([(pair.a, pair.b()) for pair in pairs])
""",
    """
with wbdist.Pool(2) as pool:
    print(pool.map(lambda pair: Pair(pair.b, pair.a * SCALE).b, [Pair(n, -n) for n in range(4)]))
""",
    """
first = wbdist.init(project="notebook", mode="offline")
second = wbdist.init(project="notebook", mode="offline")
print(first is second, wbdist.run is first)
first.finish()
""",
    """
def breaks(): raise ValueError(os.environ["RANK"] + " breaks")
try:
    wbdist.launch(breaks, nprocs=2)
except wbdist.Error as error:
    print(type(error).__name__, "breaks" in str(error))
""",
)


@pytest.mark.slow
def test_ranks_and_pools_of_a_notebooks_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that functions, lambdas, classes and globals of a notebook reach ranks and pool workers and come back, that a
    cell run again has the run it had (the documents' default in notebooks), and that a rank's error does not end the kernel."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("WANDB_SILENT", "true")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])  # type: ignore[no-untyped-call]
    NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(out.text for out in cell.outputs if out.get("name") == "stdout").strip() for cell in book.cells]
    assert printed == ["", "[(0, 5), (1, 6)]", "[0, 10, 20, 30]", "True True", "JobFailedError True"]
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("*run-*")} >= {"rank0", "rank1"}
