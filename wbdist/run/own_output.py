"""What a run keeps that nobody logs: printed lines, and system metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from wbdist.errors import JournalError
from wbdist.run import console
from wbdist.run.facts import RunFacts
from wbdist.run.journal import Kind
from wbdist.run.system import sampler

logger = logging.getLogger("wbdist.run")


class OwnOutput(RunFacts):
    """Part of `Run`."""

    _lines = 0
    _sampling: sampler.Subscription | None = None
    _samples = 0

    def capture_console(self) -> None:
        """From now on, what this process prints is kept with the run."""
        console.attach(self._keep_line)

    def sample_system(self) -> None:
        """From now on, system metrics of this process, and of the machine as the spec says, are kept with the run."""
        settings, spec = self.settings, self._spec
        self._sampling = sampler.Subscription(
            self._keep_sample,
            settings.x_stats_sampling_interval,
            host=spec.sample == "all",
            label=self._system_label(),
            disk_paths=settings.x_stats_disk_paths,
            gpus=settings.x_stats_gpu_device_ids,
        )
        sampler.subscribe(self._sampling)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        """Keeps numbers among the system metrics, as `system.<name>`: told by time and not by step, and so the place for what
        two runs of the same computation need not have alike. Any thread; one small write. Nothing where system metrics are
        switched off, or the run has ended."""
        suffix = f"/l:{label}" if (label := self._system_label()) else ""
        with self._lock:
            if self._state == "open" and not self.settings.x_disable_stats:
                self._keep_sample({f"system.{name}{suffix}": value for name, value in metrics.items()})

    def _say_and_keep(self, text: str) -> None:
        self._say(text, warning=True)
        if self.settings.silent or not self._spec.capture_console:  # else it was kept as everything that is printed
            self._keep_line(text, "stderr")

    def _keep_line(self, text: str, stream: str) -> None:
        """One printed line -> the journal. A failing journal must not break `print`: it is said once, and rows raise it."""
        label = self.settings.x_label
        try:
            self._journal.append(Kind.CONSOLE, {"text": f"[{label}] {text}" if label else text, "stream": stream})
            self._lines += 1
        except (JournalError, TypeError) as error:
            console.detach(self._keep_line)
            logger.warning("run %s: console output is not kept any more: %s", self.id, error)

    def _system_label(self) -> str:
        return self.settings.x_label or (f"rank{self._spec.rank}" if self._spec.role == "feed" else "")

    def _keep_sample(self, metrics: dict[str, float]) -> None:
        try:
            with self._lock:
                self._journal.append(Kind.STATS, metrics)
                self._samples += 1
        except JournalError as error:  # rows raise it, where somebody can act on it
            logger.warning("run %s: a sample of the system metrics is lost: %s", self.id, error)
