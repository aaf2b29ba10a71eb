"""Config out of files, and W&B's settings: what is taken, what is said to do nothing, what is refused."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

import wbdist
from wbdist.run import lifecycle

pytestmark = pytest.mark.usefixtures("offline")


def test_config_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the order: config-defaults.yaml, then WANDB_CONFIG_PATHS, then `config`; in W&B's form and as plain YAML."""
    (tmp_path / "config-defaults.yaml").write_text("wandb_version: 1\na:\n  desc: why\n  value: 1\nb: {value: 1}\nc: 1\nd: 1\n")
    (tmp_path / "more.yaml").write_text("b: 2\nc: 2\nnested: {value: {x: 1}}\n")
    (tmp_path / "last.yaml").write_text("c: 3\n")
    monkeypatch.setenv("WANDB_CONFIG_PATHS", "more.yaml, last.yaml")
    with wbdist.init(project="p", config=Namespace(d=4, e=5)) as run:
        assert run.config.as_dict() == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "nested": {"x": 1}}
    monkeypatch.delenv("WANDB_CONFIG_PATHS")
    (tmp_path / "config-defaults.yaml").unlink()
    for path in ("more.yaml", tmp_path / "more.yaml"):
        with wbdist.init(project="p", config=path) as run:
            assert run.config.as_dict() == {"b": 2, "c": 2, "nested": {"x": 1}}
    for text, said in (("[1, 2]", "must hold a mapping"), ("a: [", "cannot be read")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(wbdist.UsageError, match=f"bad.yaml.*{said}"):
            wbdist.init(project="p", config="bad.yaml")
    with pytest.raises(wbdist.UsageError, match=r"gone.yaml.*No such file"):
        wbdist.init(project="p", config="gone.yaml")
    assert lifecycle.active_runs() == []


@pytest.mark.parametrize("how", ["argument", "settings", "environment"])
def test_allow_val_change(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that it works wherever it is given, and that without it a change is refused."""
    if how == "environment":
        monkeypatch.setenv("WANDB_ALLOW_VAL_CHANGE", "true")
    given = {
        "argument": {"allow_val_change": True},
        "settings": {"settings": wbdist.Settings(allow_val_change=True)},
        "environment": {},
    }[how]
    with wbdist.init(project="p", config={"lr": 1}, **given) as run:
        run.config.lr = 2
        assert run.config.lr == 2
    with wbdist.init(project="p", config={"lr": 1}, allow_val_change=False) as run, pytest.raises(wbdist.ConfigError):
        run.config.lr = 2


def test_settings_of_wandb(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that W&B's other settings are taken and said once to do nothing, in an older form too; others are refused."""
    for _ in range(2):
        with wbdist.init(project="p", settings=wbdist.Settings(x_service_wait=30, symlink=False)):
            pass
    assert capsys.readouterr().err.count("without effect here: symlink, x_service_wait") == 1
    with wbdist.init(project="p", settings={"_disable_stats": True, "_service_transport": "tcp"}) as run:
        assert run.settings.x_disable_stats
    assert "without effect here: x_service_transport" in capsys.readouterr().err
    for given in ({"nonsense": 1}, {"_nonsense": 1}):
        with pytest.raises(wbdist.UsageError, match="unknown setting"):
            wbdist.init(project="p", settings=given)
    with pytest.raises(TypeError, match="nonsense"):
        wbdist.Settings(nonsense=1)  # type: ignore[call-arg]
