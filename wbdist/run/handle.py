"""`Run`: the handle that `init` and `open_run` return."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from msgspec.structs import replace

from wbdist.core.position import ALERTS, ARTIFACTS, CONSOLE, EVENTS, FILES, HISTORY, RunPosition, Watermark
from wbdist.core.summary import INTERNAL
from wbdist.errors import FencedError, JournalError, ShutdownError
from wbdist.run import console, process_end
from wbdist.run.absent import AbsentNames
from wbdist.run.artifact_methods import ArtifactMethods
from wbdist.run.config import Config
from wbdist.run.file_methods import FileMethods
from wbdist.run.journal import Kind
from wbdist.run.own_output import OwnOutput
from wbdist.run.summary import Summary
from wbdist.run.system import sampler
from wbdist.run.values import NeedsFilesError, summary_values

if TYPE_CHECKING:
    from datetime import timedelta

    from wbdist.run.alerts import AlertLevel, Alerts
    from wbdist.run.artifacts import Artifact
    from wbdist.run.disabled import NoJournal
    from wbdist.run.journal import JournalWriter
    from wbdist.run.lifecycle import RunSpec
    from wbdist.run.metrics import JournaledSummary, Metric
    from wbdist.run.shipping import Shipping
    from wbdist.run.watching import Watched

logger = logging.getLogger("wbdist.run")

WARN_SECONDS = 10.0
"""Dropped rows are warned of at once, then at most this often, with a count."""


class Run(FileMethods, OwnOutput, ArtifactMethods, AbsentNames):
    """One run as this process writes it. Thread-safe; belongs to the process that opened it. Make it with `init` or `open_run`.

    Every row is in the journal, durable against SIGKILL, when `log` returns. Nothing here waits for the network but
    `finish`, `flush` and `mark_preempting`, each with a deadline.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        journal: JournalWriter | NoJournal,
        shipping: Shipping | None,
        directory: Path | None,
        opened_at: float,
    ) -> None:
        """Use `init` or `open_run`. `shipping` None: nothing leaves this machine by itself."""
        super().__init__(spec, journal=journal, shipping=shipping, directory=directory, opened_at=opened_at)
        self.dropped_rows = 0
        """`log` calls that were dropped because their step lay behind the run's."""
        self._warned_at = 0.0
        self._log_row: Callable[[Mapping[str, Any], int | None, bool | None], bool] = journal.log
        self._fenced = ""
        """Why another attempt has the run, once that is known."""
        self._said_fenced = False
        self._is_scripts = False
        self._artifacts = 0
        self._on_finish: list[Callable[[], None]] = []
        self._alerts: Alerts | None = None
        self._watched: list[Watched] = []
        self._defined: JournaledSummary | None = None
        """Where the summary comes from once there are defined metrics."""
        self._summary = Summary(self._set_summary, self._summary_values)
        self._config = Config(self._set_config, allow_val_change=spec.allow_val_change)

    # Logging ------------------------------------------------------------------------------------------

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Adds `data` to the row of `step`; durable against SIGKILL at return, about 1 us for ten numbers.

        Without `step` the row is complete and the next call makes the next one (`commit=False` leaves it open for more).
        With `step`, rows stay open until a greater step comes (`commit=True` closes at once); a smaller step than the
        current one is dropped with a warning, since history only grows. Nested dicts become `a.b.c`.

        A scalar tensor is read at once, for about 2 us; on an accelerator that waits for everything queued there, so bring
        such values to the host together, when the step does so anyway. (Rows are durable at return; a value that is not
        known yet cannot be.)

        Raises TypeError for what cannot be logged (nothing of the call is then kept), DiskFullError when the journal's
        disk is full, ShutdownError when the run is finished, UsageError in a forked child.
        """
        try:
            accepted = self._log_row(data, step, commit)
        except NeedsFilesError:
            at = self._journal.rule.step if step is None else step
            accepted = at >= self._journal.rule.step and self._log_row(self._with_files(data, at), step, commit)
        if not accepted:
            self._drop(step)

    def _drop(self, step: int | None) -> None:
        self.dropped_rows += 1
        now = monotonic()
        if now - self._warned_at < WARN_SECONDS and self.dropped_rows > 1:
            return
        self._warned_at = now
        counted = f" ({self.dropped_rows} rows dropped so far)" if self.dropped_rows > 1 else ""
        self._say(
            f"run {self.id}: log(step={step}) is dropped, the current step is {self._journal.rule.step} and steps must be "
            f"monotonically increasing{counted}; log another count as a metric of its own if you need it",
            warning=True,
        )

    def commit_row(self) -> None:
        """Closes the pending row, if there is one. Raises as `log`."""
        self._check_usable("commit_row()")
        self._journal.commit_row()

    def define_reduction(self, operations: Mapping[str, str]) -> None:
        """Journals how ranks' values of these keys become one (`core/reducers.py`), for the aggregator that reads a feed.

        Holds for rows logged after it. Raises UsageError for what is no mapping of keys to operations, and as `log`.
        """
        from wbdist.run.reductions import check_operations

        check_operations(operations)
        self._record(Kind.DEFINE, {"reduce": dict(operations)}, "define_reduction()")

    def position(self) -> RunPosition:
        """Where the run stands now: everything logged so far, the pending row excluded (so `commit_row()` first). No I/O.

        What a checkpoint stores; a run opened with it as `base` goes on as if it had never stopped.
        """
        with self._lock:
            base = self._spec.base
            return RunPosition(
                run_id=self.id,
                project=self.project,
                entity=self.entity,
                watermark=Watermark(
                    attempt=self.attempt,
                    counts={
                        HISTORY: {self.writer: self._journal.rule.rows},
                        CONSOLE: {self.writer: self._lines},
                        EVENTS: {self.writer: self._samples},
                        FILES: {self.writer: self._files.count if self._files is not None else 0},
                        ARTIFACTS: {self.writer: self._artifacts},
                        ALERTS: {self.writer: self._alerts.count if self._alerts is not None else 0},
                    },
                    step=self._journal.rule.last_step,
                ),
                summary=self._summary_state(),
                runtime=(base.runtime if base is not None else 0.0) + (time() - self.opened_at),
            )

    def define_metric(  # noqa: PLR0917  (W&B's order)
        self,
        name: str,
        step_metric: str | Metric | None = None,
        step_sync: bool | None = None,
        hidden: bool | None = None,
        summary: str | None = None,
        goal: str | None = None,
        overwrite: bool | None = None,
    ) -> Metric:
        """Says what the metric `name` (or all that begin alike: `val/*`) is drawn over and what the summary keeps of it.

        `step_metric`: its x axis; rows without that one get its last value (`step_sync=False`: they do not). `summary`: any of
        min, max, mean, first, last, best, separated by commas, which make the summary's value a dict of these; `none` keeps it
        out, `copy` is the last value as it is. `goal`: "minimize" or "maximize", for `best`. Calls for one name add up, unless
        `overwrite`. Holds for what is logged after it; costs `log` nothing. A metric's own definition beats that of a prefix.

        Raises UsageError for arguments that cannot be, and as `log`.
        """
        from wbdist.run.metrics import metric

        made = metric(name, step_metric, step_sync, hidden, summary, goal, overwrite)
        self._define(made.arguments())
        return made

    def _define(self, arguments: dict[str, Any]) -> None:
        self._record(Kind.DEFINE, arguments, "define_metric()")
        if self._defined is None and self.journal_path is not None:
            from wbdist.run.metrics import JournaledSummary

            self._defined = JournaledSummary(self.journal_path)
            self.on_finish(self._defined.close)

    def alert(
        self,
        title: str,
        text: str,
        level: str | AlertLevel | None = None,
        wait_duration: float | timedelta | None = None,
    ) -> None:
        """Says what a person should see: on the terminal, in the run's output, and on its page; a W&B server sends messages.

        `level`: INFO, WARN or ERROR. One title is said again after `wait_duration` seconds (60) at the earliest. Durable at
        return, waits for no server. Raises UsageError for other levels, and as `log`.
        """
        self._check_usable("alert()")
        if self._alerts is None:
            from wbdist.run.alerts import Alerts

            self._alerts = Alerts(self._journal, self._say_and_keep)
        self._alerts.alert(title, text, level, wait_duration)

    def watch(  # noqa: PLR0917  (W&B's order)
        self,
        models: Any,
        criterion: Any = None,
        log: Literal["gradients", "parameters", "all"] | None = "gradients",
        log_freq: int = 1000,
        idx: int | None = None,
        log_graph: bool = False,
    ) -> None:
        """Keeps histograms of a model's gradients, parameters or both, of every `log_freq`-th training batch, in the open row.

        `models`: one `torch.nn.Module` (also one in DDP) or several; on the rank that asks: gradients are this rank's own. A
        batch in between costs one call of a hook. Ends with `unwatch` or the run. Raises UsageError for a model that is watched
        already and for what is no model.
        """
        from wbdist.run.watching import watch

        del criterion  # W&B draws it in its graph
        self._check_usable("watch()")
        watch(self._watched, models, log, log_freq, idx, log_graph, lambda row: self.log(row, commit=False))

    def unwatch(self, models: Any = None) -> None:
        """Ends `watch` for these models, or for all."""
        from wbdist.run.watching import unwatch

        unwatch(self._watched, models)

    # Config and summary -------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        return self._config

    @property
    def summary(self) -> Summary:
        """The last value of each logged key, and what was set by hand."""
        return self._summary

    # Ending -------------------------------------------------------------------------------------------

    def flush(self, timeout: float) -> bool:
        """Makes everything logged so far durable against power loss (fsync); True when the server has acknowledged all of it.

        Blocks for the disk, and at most `timeout` seconds for the server (not at all offline). The pending row is not
        sent before it is closed. Raises JournalError when the disk fails.
        """
        self._check_usable("flush()")
        self._journal.sync()
        if self.disabled:
            return True
        return self._shipping is not None and self._shipping.flush(timeout).acked

    def mark_preempting(self, timeout: float = 1.0) -> bool:
        """Says that this run is about to be preempted: durable at once, and sent ahead of everything queued.

        Blocks at most `timeout` seconds; True when the server knows (False also offline). A run that is then lost, or
        ends with another code than 0, is `preempted`, which schedulers requeue.
        """
        self._check_usable("mark_preempting()")
        self._journal.append(Kind.PREEMPTING, {})
        self._journal.sync()
        if self.disabled:
            return True
        return self._shipping is not None and self._shipping.flush(timeout, priority=True).acked

    def hurry(self, seconds: float) -> None:
        """From now on `finish` waits at most `seconds` for the server; the rest is left to the shipper."""
        patience = min(self.settings.finish_timeout, max(0.0, seconds))
        self.settings = replace(self.settings, finish_timeout=patience)

    def keep_facts(self, facts: Mapping[str, float]) -> None:
        """Numbers about how this process fared, beside its system metrics; not in step, durable when it returns."""
        self._keep_sample(dict(facts))

    def keep_phase(self, mark: Mapping[str, Any]) -> None:
        """A mark of the attempt's timeline (`core/goodput.py`): any thread, not in step, durable when it returns. One that the
        journal cannot take is said in the log alone: the next one has its numbers, too."""
        try:
            self._journal.append(Kind.PHASE, mark)
        except (JournalError, ShutdownError) as error:
            logger.warning("run %s: a mark of its timeline is lost: %s", self.id, error)

    def finish(self, exit_code: int | None = None, *, cause: str = "exit", quiet: bool | None = None) -> None:
        """Ends the run: the pending row is closed, everything is durable (fsynced) when this returns; about 5 ms.

        Online it then waits until the server has everything, at most `settings.finish_timeout` seconds, and says so in one
        line when it leaves the rest to the shipper, which goes on after this process has ended. Idempotent. `exit_code`
        None: 0, unless an exception is in flight in the calling thread (a `finish()` in a `finally:`): then that one's.

        When all this is done, and another process has taken over a run that `init` opened, raises FencedError, which ends a
        script that does not catch it with code 69; but no exception takes the place of one that is in flight.
        """
        del quiet  # W&B's deprecated argument
        if self._state == "foreign":
            self._check_usable("finish()")
        in_flight = sys.exc_info()[1]
        code = process_end.code_of(in_flight) if exit_code is None else int(exit_code)
        if self._watched:
            self.unwatch()
        if self._sampling is not None:
            sampler.unsubscribe(self._sampling)  # not under the lock: a sample that is being taken wants it
        with self._lock:
            if self._state != "open":
                return
            console.detach(self._keep_line)
            self._state = "finished"
            self.exit_code = code
            self._log_row = self._refuse_row
        process_end.forget(self)
        try:
            self._keep_own_files(self._config.as_dict(), self._summary_values())
            if self._files is not None:
                self._files.at_finish()
        finally:
            self._end(code, cause)
        if self._fenced and self._is_scripts and in_flight is None:
            raise FencedError(self._why_fenced())

    def _end(self, code: int, cause: str) -> None:
        try:
            self._journal.close(code if self.settings.x_update_finish_state else None, cause)
        finally:
            # Also when the disk fails at the end. Not under the lock: a callback may wait for other processes.
            for callback in self._on_finish:
                callback()
        if self._shipping is not None:
            self._wait_for_server(self._shipping)

    def _wait_for_server(self, shipping: Shipping) -> None:
        timeout = self.settings.finish_timeout
        outcome = shipping.flush(timeout, files=self._files is not None or self._artifacts > 0)
        if outcome.error.startswith("fenced"):
            self._fenced = outcome.error.removeprefix("fenced: ")
            self._say_fenced()
        elif not outcome.acked:
            why = outcome.error or f"not everything is on the server after {timeout:g} s"
            self._say(
                f"run {self.id}: {why}; all of it is safe on disk and the shipper goes on sending it "
                f"(by hand: wbdist sync {self._run_directory})",
                warning=True,
            )
        elif self.url:
            self._say(f"run {self._name or self.id} is complete at {self.url}")

    def _is_fenced(self) -> bool:
        self._fenced = self._fenced or (self._shipping.fenced() if self._shipping is not None else "")
        return self._fenced != ""

    def _why_fenced(self) -> str:
        return f"run {self.id}: {self._fenced}; what this one logs is kept in the archive"

    def _say_fenced(self) -> None:
        if not self._said_fenced:
            self._said_fenced = True
            self._say(self._why_fenced(), warning=True)

    def _finish_at_exit(self, code: int) -> None:
        try:
            with suppress(FencedError):  # said already; the exit code cannot be changed any more
                self.finish(code)
        except JournalError as error:
            self._say(str(error), warning=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Exit code 0 without an exception, SystemExit's own code, 1 for every other exception; it propagates."""
        if isinstance(error, SystemExit):
            self.finish(process_end.code_of(error))
        else:
            self.finish(0 if error is None else 1)

    def __repr__(self) -> str:
        return f"<wbdist.Run {self.path} attempt {self.attempt} step {self._journal.rule.step} {self._state}>"

    def belongs_to_script(self) -> None:
        """Says that no job looks after this run.

        From now on the main thread gets a SIGINT (or `settings.stop_fn` is called) when somebody asks on the server that it
        stop; and a warning says it when another attempt takes the run over, as `finish` then does by FencedError.
        Nothing offline.
        """
        self._is_scripts = True
        if self._shipping is not None:
            from wbdist.run import stopping

            text = f"run {self.id}: somebody asked on the server that it stop"
            say = lambda: self._say(text, warning=True)  # noqa: E731
            self.on_finish(stopping.watch(self._shipping.stop_asked, say, self.settings.stop_fn))
            self.on_finish(stopping.watch(self._is_fenced, self._say_fenced, lambda: None))

    def log_through(self, log_row: Callable[[Mapping[str, Any], int | None, bool | None], bool]) -> None:
        """From now on `log` hands its arguments to `log_row`, which journals them, or says False when the row is dropped."""
        self._log_row = log_row

    def on_finish(self, callback: Callable[[], None]) -> None:
        """`callback` is called once, when the run has ended and its journal is closed, in the thread that ends it."""
        self._on_finish.append(callback)

    # Inner --------------------------------------------------------------------------------------------

    def ship_files(self, timeout: float) -> str:
        """Waits until the server has every file and artifact so far, at most `timeout` seconds; what is wrong, or ''."""
        if self._shipping is None:
            return "this run has no server"
        return self._shipping.flush(timeout, files=True).error

    def keep_artifact(self, artifact: Artifact, aliases: list[str]) -> None:
        """For `log_artifact`: sets the contents aside and journals it."""
        self._check_usable("log_artifact()")
        if self.disabled:
            return
        from wbdist.run import artifact_logging
        from wbdist.run.journal import JournalWriter

        assert isinstance(self._journal, JournalWriter)
        assert self._run_directory is not None
        staged = artifact_logging.stage(artifact, self._run_directory.absolute())
        with self._lock:
            artifact_logging.record(self, self._journal, artifact, staged, aliases)
            self._artifacts += 1

    def _set_config(self, changed: dict[str, Any]) -> None:
        self._record(Kind.CONFIG, {"set": changed}, "config")

    def _set_summary(self, changed: dict[str, Any], deleted: Sequence[str]) -> None:
        self._check_usable("summary")
        try:
            kept = summary_values(changed)
        except NeedsFilesError:
            kept = {} if self.disabled else summary_values(self._with_files(changed, "summary"))
        change = {"set": kept, "delete": list(deleted)}
        self._journal.append(Kind.SUMMARY, {what: names for what, names in change.items() if names})

    def _summary_state(self) -> dict[str, Any]:
        """The summary, with what the next attempt needs to go on with it."""
        return self._journal.summary() if self._defined is None else self._defined.state()

    def _summary_values(self) -> dict[str, Any]:
        values = self._summary_state()
        values.pop(INTERNAL, None)
        return values

    def _refuse_row(self, *_: Any, **__: Any) -> NoReturn:
        self._check_usable("log()")
        raise AssertionError("an open run refused a row")

    def _disown(self) -> None:
        """In a forked child: the run stays the parent's. The lock may be held by a thread that does not exist here."""
        if self._state == "open":
            self._state = "foreign"
        self._lock = threading.RLock()
        if self._defined is not None:
            self._defined.lock = threading.Lock()
        self._log_row = self._refuse_row
