"""The files that W&B keeps with every run."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import wbdist
from wbdist.run.journal import JournalReader, Kind


@pytest.mark.usefixtures("offline")
def test_config_summary_metadata_and_packages() -> None:
    """Proves that the four files lie in `files` after the end, and that YAML reads every value as it was given."""
    yaml = pytest.importorskip("yaml")
    config = {"lr": 1e-05, "big": 1e22, "nan": math.nan, "inf": -math.inf, "n": 3, "s": 'a: "b"\n', "d": {"k": [1, None, True]}}
    with wbdist.init(project="p", config=config) as run:
        run.log({"loss": 0.5})
    files = Path(run.dir)
    read = yaml.safe_load((files / "config.yaml").read_text())
    assert read.pop("wandb_version") == 1
    assert math.isnan(read.pop("nan")["value"])
    assert read == {key: {"value": value} for key, value in config.items() if key != "nan"}
    assert json.loads((files / "wandb-summary.json").read_text())["loss"] == 0.5
    facts = json.loads((files / "wandb-metadata.json").read_text())
    assert {"os", "python", "startedAt", "args", "program", "host", "executable"} <= set(facts)
    packages = (files / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("msgspec==") for line in packages)


@pytest.mark.usefixtures("offline")
def test_what_is_not_committed_is_kept(own_directory: Path) -> None:
    """Proves that `save_code` keeps a patch of the checkout's changes, from below it too, which applies to the commit; and that
    there is none without changes, without `save_code` and where git is not allowed."""
    quiet = {"quiet": True, "x_disable_stats": True}

    def git(*arguments: str) -> None:
        settings = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *settings, *arguments], cwd=own_directory, check=True, capture_output=True)

    def patch(**arguments: Any) -> Path:
        run = wbdist.init(project="p", dir=own_directory / "below", **arguments)
        run.finish()
        return Path(run.dir) / "diff.patch"

    git("init")
    (own_directory / "code.txt").write_text("old\n")
    (own_directory / "below").mkdir()
    git("add", "code.txt")
    git("commit", "-m", "first")
    assert not patch(save_code=True, settings=quiet).exists()
    (own_directory / "code.txt").write_text("new\n")
    assert not patch(settings=quiet).exists()
    assert not patch(save_code=True, settings={**quiet, "disable_git": True}).exists()
    os.chdir(own_directory / "below")
    kept = patch(save_code=True, settings=quiet)
    git("checkout", "code.txt")
    git("apply", str(kept))
    assert (own_directory / "code.txt").read_text() == "new\n"


def test_they_are_uploaded_and_save_code_keeps_the_script(embedded: Path, script: Any) -> None:
    """Proves that the server has them after finish, and with `save_code` the main script."""
    ended = script("""
        import wbdist
        wbdist.init(project="p", id="r", save_code=True).finish()
    """)
    assert ended.returncode == 0, ended.stderr
    found = {file.name: file for file in wbdist.Api().run("p/r").files()}
    assert {"config.yaml", "wandb-metadata.json", "wandb-summary.json", "requirements.txt", "code/script.py"} <= set(found)
    assert b"save_code=True" in found["code/script.py"].download("got").read()


@pytest.mark.usefixtures("offline")
def test_which_files_are_kept(own_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that code is kept by setting and environment, too, unless it is forbidden; and that ignored names are no files of
    the run, from wherever they come."""
    script = own_directory / "train.py"
    script.write_text("pass\n")
    monkeypatch.setattr("__main__.__file__", str(script), raising=False)
    (own_directory / "a.tmp").write_text("1")
    (own_directory / "a.bin").write_text("1")

    def kept(**settings: Any) -> set[str]:
        run = wbdist.init(project="p", settings={"quiet": True, "x_disable_stats": True, **settings})
        assert len(run.save("a.*")) == 2
        run.finish()
        assert run.journal_path is not None
        with JournalReader.open(run.journal_path) as reader:
            return {record.data["name"] for record in reader.read() if record.kind is Kind.FILE}

    own = {"config.yaml", "wandb-metadata.json", "wandb-summary.json", "requirements.txt"}
    assert kept() == {*own, "a.tmp", "a.bin"}
    assert kept(save_code=True, ignore_globs=["*.tmp", "requirements.txt"]) == {*own, "code/train.py", "a.bin"} - {
        "requirements.txt"
    }
    monkeypatch.setenv("WANDB_SAVE_CODE", "true")
    monkeypatch.setenv("WANDB_IGNORE_GLOBS", "code/*")
    assert kept(disable_git=True) == {*own, "a.tmp", "a.bin"}
    monkeypatch.delenv("WANDB_IGNORE_GLOBS")
    assert "code/train.py" in kept()
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    assert "code/train.py" not in kept()
    assert "without effect" not in capsys.readouterr().err
