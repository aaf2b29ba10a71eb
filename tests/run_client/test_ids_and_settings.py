"""Run ids, names, and how settings are resolved."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from wbdist import Settings, UsageError
from wbdist.core.ids import ALPHABET
from wbdist.protocol import names
from wbdist.run.lifecycle import new_run_id
from wbdist.settings import resolve, setup


def test_generated_ids_ignore_the_users_seed() -> None:
    """Proves that ids are 8 characters of [a-z0-9] and that `random.seed` does not repeat them."""
    random.seed(0)
    first = new_run_id()
    random.seed(0)
    assert new_run_id() != first
    assert len(first) == 8
    assert set(first) <= set(ALPHABET)


@pytest.mark.parametrize(
    ("raw", "cleaned"), [("a b/c", "a-b-c"), ("run:1?x", "run-1-x"), ("été_1.2-b", "-t-_1.2-b"), ("x" * 64, "x" * 64)]
)
def test_odd_characters_become_dashes(raw: str, cleaned: str) -> None:
    """Proves the documented rule: the same raw string always names the same run."""
    assert names.run_id(raw) == cleaned


@pytest.mark.parametrize("raw", ["", "  ", " a", "a ", "x" * 65, ".", ".."])
def test_impossible_ids_are_refused(raw: str) -> None:
    """Proves that empty, padded, over-long and directory-like ids raise instead of naming some other run."""
    with pytest.raises(UsageError):
        names.run_id(raw)


def test_projects_and_tags_are_checked() -> None:
    """Proves that bad project names and tags are refused, and that a bare string is one tag, not its letters."""
    assert names.tags("night") == ("night",)
    assert names.tags(["a", "b", "a"]) == ("a", "b")
    for bad in ([""], ["x" * 65], [1]):
        with pytest.raises(UsageError):
            names.tags(bad)  # type: ignore[arg-type]
    for project in ("a/b", "x" * 129, "", "a%b"):
        with pytest.raises(UsageError):
            names.project(project)


def test_sources_win_in_order(tmp_path: Path) -> None:
    """Proves the order files < setup() < WANDB_* < WBDIST_* < settings= < arguments; and that the result is frozen."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(
        "[default]\nproject = file\nrun_group = file\nentity = file\nsomebody_elses = 1\n"
    )
    setup({"run_group": "setup", "entity": "setup", "run_job_type": "setup"})
    env = {"WANDB_CONFIG_DIR": str(tmp_path / "none"), "WBDIST_CONFIG_DIR": str(tmp_path / "none"), "HOME": str(tmp_path)}
    env |= {
        "WANDB_ENTITY": "wandb",
        "WANDB_NAME": "wandb",
        "WBDIST_NAME": "wbdist",
        "WANDB_TAGS": "a, b",
        "WANDB_JOB_TYPE": "env",
    }
    found = resolve(Settings(run_notes="object", run_name="object"), {"run_notes": "argument"}, env)
    assert (found.project, found.run_group, found.entity) == ("file", "setup", "wandb")
    assert (found.run_job_type, found.run_name, found.run_notes, found.run_tags) == ("env", "object", "argument", ("a", "b"))
    assert resolve(None, None, env).run_name == "wbdist"
    with pytest.raises(AttributeError):
        found.project = "other"  # type: ignore[misc]


def test_each_variable_of_wandbs(tmp_path: Path) -> None:
    """Proves what each of W&B's environment variables becomes."""
    meant = {
        "ENTITY": ("e", "entity", "e"),
        "PROJECT": ("p", "project", "p"),
        "RUN_ID": ("i", "run_id", "i"),
        "NAME": ("n", "run_name", "n"),
        "NOTES": ("why", "run_notes", "why"),
        "TAGS": ("a, b", "run_tags", ("a", "b")),
        "RUN_GROUP": ("g", "run_group", "g"),
        "JOB_TYPE": ("j", "run_job_type", "j"),
        "MODE": ("dryrun", "mode", "offline"),
        "RESUME": ("true", "resume", "auto"),
        "REINIT": ("true", "reinit", "finish_previous"),
        "FORK_FROM": ("i?_step=1", "fork_from", "i?_step=1"),
        "RESUME_FROM": ("i?_step=2", "resume_from", "i?_step=2"),
        "SAVE_CODE": ("1", "save_code", True),
        "DISABLE_CODE": ("true", "disable_code", True),
        "DISABLE_GIT": ("1", "disable_git", True),
        "PROGRAM": ("x.py", "program", "x.py"),
        "HOST": ("h", "host", "h"),
        "DIR": (str(tmp_path), "root_dir", str(tmp_path)),
        "ARTIFACT_DIR": ("d", "artifact_dir", "d"),
        "CONFIG_PATHS": ("a.yaml,b.yaml", "config_paths", ("a.yaml", "b.yaml")),
        "IGNORE_GLOBS": ("*.a,*.b", "ignore_globs", ("*.a", "*.b")),
        "CONSOLE": ("wrap_raw", "console", "wrap"),
        "SILENT": ("true", "silent", True),
        "QUIET": ("1", "quiet", True),
        "INIT_TIMEOUT": ("3", "init_timeout", 3.0),
        "FINISH_TIMEOUT": ("4", "finish_timeout", 4.0),
        "API_KEY": ("k", "api_key", "k"),
        "BASE_URL": ("http://x/", "base_url", "http://x"),
        "_DISABLE_STATS": ("true", "x_disable_stats", True),
        "X_LABEL": ("l", "x_label", "l"),
    }
    found = resolve(None, None, {f"WANDB_{name}": text for name, (text, _, _) in meant.items()})
    assert {name: getattr(found, setting) for name, (_, setting, _) in meant.items()} == {
        name: value for name, (_, _, value) in meant.items()
    }


def test_wandbs_data_dir_is_not_ours() -> None:
    """Proves that WANDB_DATA_DIR (W&B's artifact staging) does not move our server's data, and WBDIST_DATA_DIR does."""
    assert resolve(None, None, {"WANDB_DATA_DIR": "/elsewhere"}).data_dir.endswith(".local/share/wbdist")
    assert resolve(None, None, {"WBDIST_DATA_DIR": "/here"}).data_dir == "/here"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mode": "onlin"}, "online, offline, disabled"),
        ({"reinit": "new"}, "create_new, finish_previous, return_previous"),
        ({"colour": 1}, "base_url"),
        ({"silent": "perhaps"}, "silent='perhaps'"),
        ({"finish_timeout": -1}, "0 or more"),
        ({"finish_timeout": "soon"}, "finish_timeout='soon'"),
    ],
)
def test_bad_settings_say_what_is_allowed(given: dict[str, object], named: str) -> None:
    """Proves that an unknown setting or a bad value is a UsageError that lists what is allowed, from every source."""
    with pytest.raises(UsageError, match=named):
        resolve(given)
    if "colour" not in given:
        name, value = next(iter(given.items()))
        with pytest.raises(UsageError, match=f"WANDB_{name.upper()}"):
            resolve(None, None, {f"WANDB_{name.upper()}": str(value)})


@pytest.mark.parametrize(("word", "meaning"), [("run", "online"), ("dryrun", "offline")])
def test_wandbs_old_words_still_work(word: str, meaning: str) -> None:
    """Proves that W&B's synonyms of the modes mean the same here."""
    assert resolve(None, None, {"WANDB_MODE": word}).mode == meaning
