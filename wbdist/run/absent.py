"""Names that W&B has and wbdist has not, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from wbdist.errors import UsageError


class MissingNameError(UsageError, AttributeError):
    """W&B has this name and wbdist has not; the message says what to use instead."""


_SWEEPS = "sweeps are not built; start the trials as runs of one `group` and read them with `Api().runs(filters=...)`"
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


def absent(name: str) -> MissingNameError | None:
    """The error for a name of W&B's that is not here; None for a name that W&B has not either."""
    if name not in ABSENT:
        return None
    return MissingNameError(f"wbdist has no `{name}`: {ABSENT[name]}")


class AbsentNames:
    """Mixin of `Run`: W&B's names that it has not are refused with what to do instead, as the module's are."""

    sweep_id: None = None
    """No run is a sweep's."""
    sweep_url: None = None

    if not TYPE_CHECKING:  # a type checker is to find misspelt names

        def __getattr__(self, name: str) -> NoReturn:
            raise absent(name) or AttributeError(f"a run has no attribute {name!r}")
