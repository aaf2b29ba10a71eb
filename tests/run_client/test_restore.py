"""`restore`: the newest version of a run's file, from this machine or the server, whatever was killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lingering import kill_all, processes_of

import wbdist
from wbdist.errors import CommError
from wbdist.protocol import files, operations
from wbdist.protocol.operations import Operation
from wbdist.run import backend
from wbdist.run.connection import Connection
from wbdist.settings import Mode


def on_another_machine(directory: Path) -> None:
    """As if no run had been here. By a rename: a shipper that is just leaving may still put its mark beside a journal."""
    (directory / "wandb").rename(directory / "of-the-first")


def test_restored_files_are_files_and_paths(embedded: Path, own_directory: Path) -> None:
    """Proves W&B's uses of the result (torch.load, .name, read, with), in a fresh directory, by every form of run_path."""
    torch.save({"weights": torch.arange(5)}, own_directory / "model.pt")
    (own_directory / "sub").mkdir()
    (own_directory / "sub/bytes").write_bytes(bytes(range(256)))
    with wbdist.init(project="p") as run:
        run.save("./model.pt")
        run.save("sub/bytes", policy="now")
        address = run.path
    on_another_machine(own_directory)
    for path in (address, address.partition("/")[2]):
        found = wbdist.restore("./model.pt", run_path=path, root=own_directory / "here")
        assert found is not None
        assert found.name == str(own_directory / "here/model.pt")
        assert torch.load(found)["weights"].tolist() == [0, 1, 2, 3, 4]
        assert torch.load(found.name)["weights"].tolist() == [0, 1, 2, 3, 4]
    with wbdist.init(project="p", id="other") as other:
        with wbdist.restore("sub//bytes", run_path=run.id) as restored:  # type: ignore[union-attr]
            assert restored.read() == bytes(range(256))
            assert Path(restored).is_relative_to(other.dir)
        assert other.restore("nothing") is None
    for name in ("", "../x", "/etc/passwd", "."):
        with pytest.raises(ValueError, match="name"):
            wbdist.restore(name, run_path=address)
    with pytest.raises(ValueError, match="run_path"):
        wbdist.restore("model.pt")
    with wbdist.init(mode="disabled") as run:
        assert run.restore("model.pt") is None


def test_stale_copies_and_replace(embedded: Path, own_directory: Path) -> None:
    """Proves that an older copy gives way, a newer one of the user's stays unless `replace`, and no litter."""
    (own_directory / "f").write_text("first")
    with wbdist.init(project="p") as run:
        run.save("f")
    on_another_machine(own_directory)
    root = own_directory / "root"
    root.mkdir()
    (root / "f").write_text("stale")
    os.utime(root / "f", (1, 1))
    assert wbdist.restore("f", run.path, root=root).read() == b"first"  # type: ignore[union-attr]
    (root / "f").write_text("mine, newer")
    assert wbdist.restore("f", run.path, root=root).read() == b"mine, newer"  # type: ignore[union-attr]
    assert wbdist.restore("f", run.path, replace=True, root=root).read() == b"first"  # type: ignore[union-attr]
    assert [path.name for path in root.iterdir()] == ["f"]


RESUMING = """
    import os, signal, sys
    import wbdist as wandb
    run = wandb.init(project="p", resume=True)
    restored = wandb.restore("./state.bin") if run.resumed else None
    was = restored.read() if restored else b"nothing"
    print(run.resumed, run.step, was.decode()[:4], len(was), flush=True)
    for i in range(run.step, run.step + 10):
        run.log({"i": i})
        with open("state.bin", "wb") as file:
            file.write(b"%04d" % i * 1000)
        wandb.save("./state.bin")
    with open("state.bin", "wb") as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_job_gets_its_last_saved_state(embedded: Path, script: Any, mode: str) -> None:
    """Proves that a script killed in the middle of writing its state restores the state before, three times over."""
    said = []
    for _ in range(3):
        ended = script(RESUMING, WBDIST_MODE=mode)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        said.append(ended.stdout.split())
    assert said == [
        ["False", "0", "noth", "7"],
        ["True", "10", "0009", "4000"],
        ["True", "20", "0019", "4000"],
    ]


def test_a_rewound_run_has_the_file_of_that_step(embedded: Path, own_directory: Path, script: Any) -> None:
    """Proves that files are cut with the rows: offline, a run rewound to step 3 restores what was saved at step 3."""
    ended = script(RESUMING, WBDIST_MODE="offline", WANDB_RUN_ID="r")
    assert ended.returncode == -signal.SIGKILL
    back = """
        import wbdist
        run = wbdist.init(project="p", resume_from="r?_step=3", mode="offline")
        print(run.step, run.restore("state.bin").read()[:4].decode())
    """
    ended = script(textwrap.dedent(back))
    assert ended.stdout.split() == ["4", "0003"], ended.stderr


def test_without_the_server(embedded: Path, own_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a server that is away is no reason to fail when the file is here, and is told when it is not."""
    (own_directory / "f").write_text("here")
    with wbdist.init(project="p", mode="offline", id="off") as run:
        run.save("f")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wbdist.restore("f", "me/p/off", root="elsewhere").read() == b"here"  # type: ignore[union-attr]
    with pytest.raises(CommError):
        wbdist.restore("g", "me/p/off", root="elsewhere")
    assert backend.last_url(embedded) is None


def test_a_server_that_dies_between_two_answers(
    embedded: Path, own_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that a server that says it has another version, and is killed before it can say whether another machine has gone
    on with the run, is no word for this machine's: its version is taken with a line that tells of the other one. A server that
    answers to the end decides: the other machine's is the newer one here."""

    def save(text: str, mode: Mode, directory: Path, resume: str = "") -> None:
        (own_directory / "f").write_text(text)
        with wbdist.init(project="p", id="x", resume=resume, mode=mode, dir=directory) as run:
            run.save("f")

    other = own_directory / "other"
    other.mkdir()
    save("never sent", "offline", own_directory)
    for text in ("second", "third"):
        save(text, "online", other, resume="allow")
    assert wbdist.restore("f", "p/x", root="asked").read() == b"third"  # type: ignore[union-attr]
    execute, asked = Connection.execute, []

    def killed_after_the_files(self: Connection, operation: Operation, **options: Any) -> dict[str, Any]:
        asked.append(operation.name)
        answer = execute(self, operation, **options)
        if operation.name == files.run_files("", "", "").name:
            kill_all(processes_of(embedded))
        return answer

    monkeypatch.setattr(Connection, "execute", killed_after_the_files)
    capsys.readouterr()
    assert wbdist.restore("f", "p/x", root="broken").read() == b"never sent"  # type: ignore[union-attr]
    assert asked[-2:] == [files.run_files("", "", "").name, operations.run_position("", "", "").name]
    [said] = capsys.readouterr().err.splitlines()
    assert re.search(
        r"restore\('f'\).* taking what is on this machine, though the server has another version, of 20\d\d-", said
    )


@pytest.mark.slow
def test_a_checkpoint_kept_with_the_run(embedded: Path, own_directory: Path) -> None:
    """Proves that what `save` kept of checkpoints is whole when the disk is gone: restored by name, verified, gone on from in
    the next attempt; where a file is missing, from the checkpoint before."""
    model = torch.nn.Linear(2, 2)
    with wbdist.init(project="p") as run:
        for attempt in (1, 2):
            with wbdist.checkpoints("ckpt", keep_last=9) as saved:
                saved.track(model=model)
                saved.restore()
                for step in (2 * attempt - 1, 2 * attempt):
                    torch.nn.init.constant_(model.weight, step)
                    kept = saved.save(step, block=True).name
                    for pattern in ("*", "*/*"):
                        run.save(f"ckpt/{kept}/{pattern}", policy="now")
    on_another_machine(own_directory)
    names = [file.name for file in wbdist.Api().run(run.path).files(pattern="ckpt/%")]
    found = []
    for lost in (None, "ckpt/step-4.a2/rank-0/state.json"):
        shutil.rmtree(own_directory / "ckpt")  # another machine
        for name in names:
            if name != lost:
                assert wbdist.restore(name, run.path) is not None
        with wbdist.checkpoints("ckpt") as saved:
            saved.track(model=model)
            restored = saved.restore()
            assert restored is not None
            found.append((restored.manifest.name, model.weight.unique().tolist(), saved.save(9, block=True).name))
    assert found == [("step-4.a2", [4.0], "step-9.a3"), ("step-3.a2", [3.0], "step-9.a3")]
