"""What a run is, as its handle tells it; and the journal that everything about it goes into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from wbdist.errors import ShutdownError, UsageError
from wbdist.protocol import names
from wbdist.run.journal import Kind

if TYPE_CHECKING:
    from wbdist.run.disabled import NoJournal
    from wbdist.run.journal import JournalWriter
    from wbdist.run.lifecycle import RunSpec
    from wbdist.run.shipping import Shipping
    from wbdist.settings import Settings


class RunFacts:
    """Part of `Run`, below its other parts."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        journal: JournalWriter | NoJournal,
        shipping: Shipping | None,
        directory: Path | None,
        opened_at: float,
    ) -> None:
        self.id = spec.run_id
        self.project = spec.project
        self.entity = spec.entity
        self.group = spec.group or ""
        self.job_type = spec.job_type or ""
        self.attempt = spec.attempt
        self.writer = spec.writer
        self.settings: Settings = spec.settings
        self.opened_at = opened_at
        """Unix seconds at which this attempt began."""
        self.url: str | None = spec.url
        """The run's page; None offline."""
        self.starting_step = journal.rule.step
        self.exit_code: int | None = None
        """Known when the run has finished."""
        self._spec = spec
        self._name = spec.name
        self._notes = spec.notes or ""
        self._tags = tuple(spec.tags or ())
        self._journal = journal
        self._shipping = shipping
        self._run_directory = directory
        self._lock = journal.lock
        self._state: Literal["open", "finished", "foreign"] = "open"

    @property
    def step(self) -> int:
        """The step that the next `log` without a step goes to."""
        return self._journal.rule.step

    @property
    def name(self) -> str | None:
        """Display name; None while no server has given one. Assigning renames the run."""
        return self._name

    @name.setter
    def name(self, value: str) -> None:
        self._name = str(value)
        self._record(Kind.RUN, {"display_name": self._name}, "name=")

    @property
    def notes(self) -> str:
        return self._notes

    @notes.setter
    def notes(self, value: str) -> None:
        self._notes = str(value)
        self._record(Kind.RUN, {"notes": self._notes}, "notes=")

    @property
    def tags(self) -> tuple[str, ...]:
        return self._tags

    @tags.setter
    def tags(self, value: Sequence[str]) -> None:
        self._tags = names.tags(value)
        self._record(Kind.RUN, {"tags": list(self._tags)}, "tags=")

    @property
    def dir(self) -> str:
        """Directory of the run's own files; '' for a disabled run."""
        return str(self._run_directory / "files") if self._run_directory is not None else ""

    @property
    def sync_dir(self) -> str:
        """Directory for `wbdist sync`; '' for a disabled run."""
        return str(self._run_directory) if self._run_directory is not None else ""

    @property
    def journal(self) -> JournalWriter | NoJournal:
        """What the run's rows and records go into; for who stamps them with other times, as the aggregator."""
        return self._journal

    @property
    def journal_path(self) -> Path | None:
        return self._journal.path

    @property
    def path(self) -> str:
        """`entity/project/id`, what `Api().run` takes; without the entity while it is not known."""
        return "/".join(part for part in (self.entity, self.project, self.id) if part)

    @property
    def project_url(self) -> str | None:
        return self.url.rpartition("/runs/")[0] if self.url else None

    @property
    def sweep_id(self) -> str | None:
        """The sweep that this run is a trial of, by its agent's word; None of any other run."""
        return self._spec.sweep or None

    @property
    def sweep_url(self) -> str | None:
        """The sweep's page on W&B's server; None without it, and on the embedded server, which makes no sweeps."""
        there_is_one = self._spec.sweep and self._spec.settings.base_url and self.project_url
        return f"{self.project_url}/sweeps/{quote(self._spec.sweep)}" if there_is_one else None

    @property
    def start_time(self) -> float:
        return self.opened_at

    @property
    def resumed(self) -> bool:
        """Whether this attempt continues an earlier one; a fork and a rewind begin something else."""
        return self._spec.base is not None and not self._spec.fresh

    @property
    def disabled(self) -> bool:
        return self._spec.settings.mode == "disabled"

    @property
    def offline(self) -> bool:
        return self._spec.settings.mode == "offline"

    @property
    def finished(self) -> bool:
        return self._state == "finished"

    def _record(self, kind: Kind, payload: dict[str, Any], what: str) -> None:
        self._check_usable(what)
        self._journal.append(kind, payload)

    def _check_usable(self, what: str) -> None:
        if self._state == "finished":
            raise ShutdownError(
                f"run {self.id} ({self._name or 'unnamed'}) is finished: {what} comes too late; open a new run with init()"
            )
        if self._state == "foreign":
            raise UsageError(
                f"run {self.id} belongs to the parent process: {what} cannot be used in a forked child; open a run of "
                "the child's own with init(), or send the values to the parent"
            )

    def _say(self, text: str, *, warning: bool = False) -> None:
        self.settings.say(text, warning=warning)
