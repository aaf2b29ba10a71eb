"""Seed S2, resume: its snippets as they stand, by our client and by W&B's, read back by the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.seeding import CLIENTS, Client, Seeds, other, snippet

import wbdist as wandb


@pytest.mark.parametrize("client", CLIENTS)
def test_ids_that_resume(seeds: Seeds, client: Client) -> None:
    """Proves the snippet of controlled resuming: an id kept for later by argument, and another by the environment.

    W&B's SDK 0.31 has no `wandb.util.generate_id` any more, and reads the environment once, so each half runs by itself.
    """
    project = f"s2-ids-{client}"
    folder = seeds.place(project)
    first, second = snippet("s2_generate_id").split("# 또는 환경 변수를 통해\n")
    first, second = "import wandb\n" + first, "import os\nimport wandb\n" + second
    if client == "wandb":
        first, second = (text.replace("wandb.util.generate_id", "wandb.sdk.lib.runid.generate_id") for text in (first, second))
    log = 'wandb.log({"x": wandb.run.step})\nprint("ID", wandb.run.id, wandb.run.resumed)\n'
    said = seeds.run(client, first + log, folder, WANDB_PROJECT=project)
    run_id = said.split("ID ")[1].split()[0]
    assert f"ID {run_id} False" in said
    again = f'import wandb\nid = "{run_id}"\nwandb.init(id=id, resume="allow")\n'
    assert f"ID {run_id} True" in seeds.run(client, again + log, folder, WANDB_PROJECT=project)
    said = seeds.run(client, second + log, folder, WANDB_PROJECT=project)
    by_environment = said.split("ID ")[1].split()[0]
    again = {"WANDB_RESUME": "must", "WANDB_RUN_ID": by_environment}
    said = seeds.run(client, "import wandb\nwandb.init()\n" + log, folder, WANDB_PROJECT=project, **again)
    assert f"ID {by_environment} True" in said
    runs = seeds.runs(other(client), project)
    assert [run["id"] for run in runs] == [run_id, by_environment]
    for run in runs:
        assert [row["_step"] for row in run["rows"]] == [0, 1]


LIVES = """
import os, signal, sys
import torch
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()  # imports what takes longest
torch.manual_seed(0)  # the documents' data and weights are random: equal ones make the lives comparable
for life in sys.argv[1:]:  # a process each, forked behind the import of torch, which takes longer than the script
    pid = os.fork()
    if pid == 0:
        break
    print("ENDED", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
how, _, call = life.partition(":")
_save, _calls = torch.save, 0
def save(*arguments):
    global _calls
    _calls += 1
    if _calls == int(call) and how == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if _calls == int(call) and how == "exception":
        raise RuntimeError("the script ends unsuccessfully")
    _save(*arguments)
    if _calls == int(call) and how == "after":
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
script = open(__file__).read().partition("# the documents' script\\n")[2]
if how == "uninterrupted":
    os.environ["WANDB_MODE"] = "disabled"
    script = script.replace("N_EPOCHS = 100", f"N_EPOCHS = {call}")
exec(script)
sys.exit()
# the documents' script
"""
TOLD = '\nprint("WEIGHTS", [p.flatten().tolist() for p in model.parameters()], flush=True)\n'


def test_pytorch_script(seeds: Seeds) -> None:
    """Proves S2's PyTorch script, killed before, after and between its checkpoints and once ended by an exception: each of its
    100 epochs is one row, `torch.load(wandb.restore(...))` works, and the weights are those of an uninterrupted run.

    The script stores `epoch` before it counts on, so each restart repeats the epoch that its checkpoint holds: the comparison
    is with an uninterrupted script of that many epochs more.
    """
    project = "s2-pytorch"
    text = LIVES + snippet("s2_pytorch", **{"pytorch-resume-run": project}) + TOLD
    lives = {"before:13": -9, "after:28": -9, "exception:7": 1, "before:2": -9, "none:0": 0, "uninterrupted:104": 0}
    said = seeds.run("wbdist", text, seeds.place(project), *lives).splitlines()
    assert [line for line in said if line.startswith("ENDED")] == [f"ENDED {code}" for code in lives.values()]
    resumed, uninterrupted = [line for line in said if line.startswith("WEIGHTS")]
    assert resumed == uninterrupted
    (run,) = seeds.runs("wandb", project)
    assert [row["_step"] for row in run["rows"]] == list(range(100))
    assert all("loss" in row for row in run["rows"])
    assert (run["state"], run["summary"]["loss"]) == ("finished", run["rows"][-1]["loss"])


def test_pytorch_script_by_wandbs_client(seeds: Seeds, here: Path) -> None:
    """Proves that W&B's client runs the script to its end against our server, and that our `restore` finds its last checkpoint.

    Its own `restore` gives a file opened as text, which `torch.load` refuses, so it cannot be resumed as the documents say.
    """
    project = "s2-pytorch-sdk"
    folder = seeds.place(project)
    seeds.run("wandb", snippet("s2_pytorch", **{"pytorch-resume-run": project}), folder)
    (run,) = seeds.runs("wbdist", project)
    assert [row["_step"] for row in run["rows"]] == list(range(100))
    restored = wandb.restore("./checkpoint.tar", run_path=f"local/{project}/{run['id']}")
    assert restored is not None
    assert Path(restored.name).is_relative_to(here)
    assert restored.read() == (folder / "checkpoint.tar").read_bytes()
