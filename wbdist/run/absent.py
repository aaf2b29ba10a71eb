"""Names that W&B has and wbdist has not, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from wbdist.errors import UsageError


class MissingNameError(UsageError, AttributeError):
    """W&B has this name and wbdist has not; the message says what to use instead."""


_SWEEPS = (
    "no sweeps are made here; W&B's agent starts scripts that use wbdist (docs/sweeps.md), and trials of your own are runs of "
    "one `group`, read with `Api().runs(filters=...)`"
)
_INTEGRATION = "integrations with it are out of scope of this toolkit for PyTorch; call `run.log` from a callback"
_MEDIA = "this kind of media is not built; keep it as a file, and its numbers as metrics"
_CHARTS = "charts are made on the run's page from what is logged; log the numbers themselves"
_OLD = "W&B itself has deprecated it; use `wbdist.Api()`"

ABSENT: dict[str, str] = {
    **dict.fromkeys(("sweep", "agent", "controller"), _SWEEPS),
    **dict.fromkeys(
        ("keras", "tensorflow", "xgboost", "catboost", "lightgbm", "sklearn", "sacred", "gym", "tensorboard", "integration"),
        _INTEGRATION,
    ),
    **dict.fromkeys(
        (
            "Audio", "Video", "Object3D", "Molecule", "Plotly", "Graph", "box3d", "Classes", "JoinedTable", "EvalTable",
        ),
        _MEDIA,
    ),
    **dict.fromkeys(("plot", "plot_table", "visualize"), _CHARTS),
    **dict.fromkeys(("api", "ensure_configured", "apis"), _OLD),
    "attach": "a run belongs to the process that opened it; let every process `init` with one `group`, or use `wbdist.job`",
    "pin_config_keys": "nothing is pinned on the run's page; all of the config is shown there",
    "ArtifactTTL": "artifacts are kept until they are deleted",
    "sagemaker_auth": "write WANDB_API_KEY into the job's environment",
    "profiler": "use torch.profiler and keep its trace as a file",
    "display": "open the page at `run.url`",
    "to_html": "open the page at `run.url`",
    "write_logs": "what the process prints is kept; print it",
    "status": "read it with `Api().run(run.path).state`",
    "config_static": "use `run.config`",
    "finish_artifact": "an artifact is complete when it is logged; log it once",
    "upsert_artifact": "an artifact is complete when it is logged; log it once",
}  # fmt: skip
"""name of W&B's that wbdist has not -> what to do instead"""


_FIXED = (
    "a version that is logged cannot be changed; make an `Artifact` anew and log it: files that are the same are not sent again"
)
_LOGGED = "an `Artifact` is what is being made; `Api().artifact('name:latest')` reads what was logged"
_INSIDE = "read its `manifest`, `download()` it, or get one file with `get_entry(name).download()`"

OF_ARTIFACTS: dict[str, str] = {
    **dict.fromkeys(("add_dir", "add_file", "add_reference", "new_file", "remove", "new_draft", "delete", "unlink"), _FIXED),
    **dict.fromkeys(
        (
            "collection", "commit_hash", "created_at", "digest_algorithm", "distributed_id", "entity", "file", "file_count",
            "files", "get_entry", "history_step", "is_link", "linked_artifacts", "linked_at", "logged_by", "project",
            "qualified_name", "source_artifact", "source_collection", "source_entity", "source_name", "source_project",
            "source_qualified_name", "source_version", "updated_at", "url", "used_by",
        ),
        _LOGGED,
    ),
    **dict.fromkeys(("get", "get_path", "get_added_local_path_name", "checkout", "json_encode"), _INSIDE),
    **dict.fromkeys(("finalize", "is_draft", "incremental", "save"), "an artifact is complete when it is logged; log it once"),
    "add": "media in artifacts are not built; add a file with `add_file`",
    "tags": "artifacts have aliases and metadata here, and no tags",
    "ttl": ABSENT["ArtifactTTL"],
    "use_as": "slots of a run's inputs are not built",
    "verify": "`download()` checks every file's digest",
}  # fmt: skip
"""name of W&B's artifacts -> what to do instead, where ours has it not"""


class AbsentOfArtifact:
    """Mixin of what is made and of what was logged: W&B's names that it has not are refused with what to do instead."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name in OF_ARTIFACTS:
                raise MissingNameError(f"this artifact has no `{name}`: {OF_ARTIFACTS[name]}")
            raise AttributeError(f"an artifact has no attribute {name!r}")


def absent(name: str) -> MissingNameError | None:
    """The error for a name of W&B's that is not here; None for a name that W&B has not either."""
    if name not in ABSENT:
        return None
    return MissingNameError(f"wbdist has no `{name}`: {ABSENT[name]}")


class AbsentNames:
    """Mixin of `Run`: W&B's names that it has not are refused with what to do instead, as the module's are."""

    if not TYPE_CHECKING:  # a type checker is to find misspelt names

        def __getattr__(self, name: str) -> NoReturn:
            raise absent(name) or AttributeError(f"a run has no attribute {name!r}")
