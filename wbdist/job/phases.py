"""What this process spends its time on: start-up, restoring, training, pauses for saves, leaving. Recorded as marks of the
attempt's timeline (`core/goodput.py`) by the one rank that speaks for its run, two for each save, none for a step.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from wbdist.core.goodput import END, OWN, Mark, written
from wbdist.launch import times
from wbdist.launch.times import Start
from wbdist.preemption import lsf, pbs
from wbdist.preemption.kubernetes import Pod
from wbdist.preemption.slurm import SlurmJob

SUBMITTED = "WBDIST_SUBMITTED"
"""Unix time at which the job was submitted, when whoever did it says so; schedulers are asked."""

_first = True
"""Whether this process has had no job yet: its start-up is the first one's."""


class Phases:
    """The phases of one job on this rank. The training thread changes them; `tell_submitted` may come from any thread."""

    def __init__(self, start: Start, *, clock: Callable[[], float] = times.now, wall: Callable[[], float] = time.time) -> None:
        """In start-up since `start.began`. `clock`: seconds since boot; `wall`: Unix seconds."""
        self._start = start
        self._clock, self._wall = clock, wall
        self._lock = threading.RLock()  # a signal's handler may log
        self._spent = dict.fromkeys(OWN, 0.0)
        self._since = start.began
        self._sink: Callable[[Mapping[str, Any]], None] | None = None
        self._steps: Callable[[], int] = int
        self._marks = 0
        self.current = "startup"
        """Which of OWN, or END."""

    @classmethod
    def of_process(cls) -> Phases:
        """Since the start of this process, or of its launcher, for its first job; else from now on."""
        global _first  # noqa: PLW0603  (a fact about the process)
        start = times.start_of_process() if _first else Start(times.now())
        _first = False
        return cls(start)

    def record(self, sink: Callable[[Mapping[str, Any]], None], steps: Callable[[], int]) -> None:
        """From now on every change is a mark: `sink` keeps one, durably, and must not raise. `steps`: those completed."""
        with self._lock:
            self._sink, self._steps = sink, steps
            now = self._clock()
            self._count(now)
            self._mark(now, last=True)

    def enter(self, phase: str, *, began_before: bool = False) -> None:
        """`phase` begins now, or, `began_before`, has begun where the current one did. Nothing when it is the current one, or
        after `end`."""
        with self._lock:
            if self.current not in {phase, END}:
                now = self._clock()
                if began_before:
                    self.current = phase
                self._count(now)
                self.current = phase
                self._mark(now)

    @contextmanager
    def during(self, phase: str) -> Generator[None, None, None]:
        """`phase` for the block, then the one before again."""
        before = self.current
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def working(self) -> None:
        """The script trains, if it has not begun to already."""
        if self.current == "startup":
            self.enter("train")

    def end(self) -> None:
        """The last mark, before the run is finished. Idempotent."""
        self.enter(END)

    def tell_submitted(self, moment: float) -> None:
        """Unix time at which a scheduler got this attempt to start."""
        with self._lock:
            if self.current != END:
                now = self._clock()
                self._count(now)
                self._mark(now, submitted=moment)

    def _count(self, now: float) -> None:
        self._spent[self.current] += now - self._since
        self._since = now

    def _mark(self, now: float, *, last: bool = False, submitted: float | None = None) -> None:
        if self._sink is None:
            return
        wall = self._wall()
        spent = {name: round(seconds, 6) for name, seconds in self._spent.items()}
        mark = Mark(self._marks, wall, self.current, self._steps(), spent, submitted)
        if last and self._start.last_ended is not None and self._start.last_began is not None:
            began, ended = wall - (now - self._start.last_began), wall - (now - self._start.last_ended)
            mark = Mark(self._marks, wall, self.current, mark.step, spent, last_began=began, last_ended=ended)
        self._marks += 1
        self._sink(written(mark))


def ask_when_submitted(phases: Phases, *, ask: bool = True, env: Mapping[str, str] | None = None) -> None:
    """One rank, at the start: tells `phases` when this job was submitted, as far as that is known. Never blocks: a scheduler
    (`ask`) is asked on a thread. Ranks that were started again in place have not been in a queue, and nobody is asked."""
    env = os.environ if env is None else env
    said = env.get(SUBMITTED, "")
    if env.get("WBDIST_RESTART", "0") != "0" or env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if said.replace(".", "", 1).isdigit():
        phases.tell_submitted(float(said))
    elif ask and (source := _scheduler(env)) is not None:

        def tell() -> None:
            if (moment := source()) is not None:
                phases.tell_submitted(moment)

        threading.Thread(target=tell, name="wbdist-submitted", daemon=True).start()


def _scheduler(env: Mapping[str, str]) -> Callable[[], float | None] | None:
    """Who knows when the job was submitted; asking takes seconds at most."""
    if env.get("SLURM_JOB_ID"):
        return SlurmJob(env).submitted
    if env.get(lsf.JOB):
        return lambda: lsf.submitted(env)
    if env.get(pbs.JOB):
        return lambda: pbs.submitted(env)
    return Pod(env).created if env.get("KUBERNETES_SERVICE_HOST") else None
