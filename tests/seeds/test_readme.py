"""The README's drop-in example is what it says."""

from __future__ import annotations

import re
from pathlib import Path

from support.seeding import Seeds

README = Path(__file__).parents[2] / "README.md"


def test_the_drop_in_example(seeds: Seeds) -> None:
    """Proves that the example runs as it stands, twice: the second time it finds all its rows and adds none."""
    section = README.read_text().split("## As a drop-in for wandb")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    text = example[1].replace("import wbdist as wandb\n", "import wandb\n")
    text = 'loss = lambda step: 1 / (step + 1)\nopen("model.pt", "wb").write(b"weights")\n' + text
    folder = seeds.place("readme")
    for _ in range(2):
        said = seeds.run("wbdist", text + '\nprint("BEST", best.id, best.summary["loss"])\n', folder)
        assert "BEST night-7 0.001" in said
    run = "api.run('local/digits/night-7')"
    assert seeds.read("wandb", f"[row['_step'] for row in {run}.scan_history()]") == list(range(1000))
    assert seeds.read("wandb", f"[{run}.state, {run}.file('model.pt').size]") == ["finished", 7]
