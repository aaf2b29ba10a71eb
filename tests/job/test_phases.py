"""The timeline's arithmetic: whatever a job does, wherever it dies, its phases are a partition of the wall-clock time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbdist.core.goodput import OWN, PHASES, SLACK, Life, Mark, goodput, phases_of, read_mark
from wbdist.job.phases import Phases, ask_when_submitted
from wbdist.launch import times
from wbdist.launch.times import Start
from wbdist.preemption.rehearsal.kubernetes import KubernetesApi
from wbdist.run.journal import JournalHeader, JournalReader, JournalWriter, Kind
from wbdist.run.local_timeline import local_phases

EPOCH = 1_800_000_000.0
CLOSE = 1e-3
"""Marks are told in microseconds, and a Unix time has few digits more."""
SECONDS = st.one_of(st.just(0.0), st.floats(0, 1000).map(lambda seconds: round(seconds, 3)))


class Episode(NamedTuple):
    """What happens in one attempt."""

    away: float
    """Seconds before its process starts."""
    queued: float | None
    """And then in a queue, of which it is told."""
    startup: float
    work: list[tuple[str, float, float]]
    """Phase, its seconds, and how the wall clock is set just before it."""
    left: bool
    """By itself; else it is killed."""
    mute: bool
    """Killed so early that there is a run, and no mark."""
    alive: float
    """Seconds after its last mark until its last row."""
    unseen: float
    """From then until it was dead."""
    watched: bool
    """By a launcher, which tells the next attempt."""
    base: int
    """Which of the saves so far (the last is 0) the next one goes on from; beyond all: it starts anew."""


EPISODES = st.builds(
    Episode,
    away=SECONDS,
    queued=st.one_of(st.none(), SECONDS),
    startup=SECONDS,
    work=st.lists(
        st.tuples(
            st.sampled_from(["train", "train", "save", "restore"]),
            SECONDS,
            st.sampled_from([0.0, 0.0, 0.0, 3600.0, -3600.0, 0.7, -0.7]),
        ),
        max_size=7,
    ),
    left=st.booleans(),
    mute=st.integers(0, 5).map(lambda die: die == 0),
    alive=SECONDS,
    unseen=SECONDS,
    watched=st.booleans(),
    base=st.integers(0, 5),
)


class Saved(NamedTuple):
    attempt: int
    step: int
    kept: dict[int, float]
    """attempt -> seconds of its training that are in this checkpoint."""


class Play:
    """Episodes, acted by a real recorder on made-up clocks; what is true, besides what is told of it."""

    def __init__(self, episodes: list[Episode]) -> None:
        self.now, self.ahead = 100.0, 0.0
        """Seconds since boot, which is the truth, and what the wall clock is ahead of it."""
        self.lives: list[Life] = []
        self.true: list[dict[str, float]] = []
        self.begin: float | None = None
        self.end = 0.0
        self._saves: list[Saved] = []
        self._kept: dict[int, float] = {}
        self._last: Start | None = None
        base: Saved | None = None
        for number, episode in enumerate(episodes, 1):
            after = episodes[number] if number < len(episodes) else None
            self._attempt(number, episode, base, after)
            base = self._saves[-1 - episode.base] if episode.base < len(self._saves) else None
        for number, phases in enumerate(self.true, 1):
            phases["lost"] = phases["train"] - self._kept.get(number, 0.0)
            phases["train"] -= phases["lost"]

    def wall(self) -> float:
        return EPOCH + self.now + self.ahead

    def _attempt(self, number: int, episode: Episode, base: Saved | None, after: Episode | None) -> None:
        true = dict.fromkeys(PHASES, 0.0)
        self.true.append(true)
        self.now += episode.away
        submitted = self.wall() if episode.queued is not None and not episode.mute else None
        if submitted is not None:
            self.begin = self.now if self.begin is None else self.begin
            self.now += episode.queued or 0.0
            true["queued"] = episode.queued or 0.0
        began = self.now
        start = Start(began) if self._last is None else Start(began, self._last.last_began, self._last.last_ended)
        self._last = None
        self.now += episode.startup
        self._kept = {} if base is None else dict(base.kept)
        marks: list[Mark] = []
        life = Life(number, self.wall(), marks, base=None if base is None else (base.attempt, base.step))
        if episode.mute:
            self.begin = self.now if self.begin is None else self.begin
            true["down"] = self.now - self.end if number > 1 else 0.0
            self.end = self.now
            self.lives.append(life)
            return
        self.begin = began if self.begin is None else self.begin
        true["down"] = began - true["queued"] - self.end if number > 1 else 0.0
        true["startup"] = episode.startup
        step = 0 if base is None else base.step + 1

        def keep(row: Any) -> None:
            mark = read_mark(json.loads(json.dumps(row)), self.wall())
            assert mark is not None
            marks.append(mark)

        phases = Phases(start, clock=lambda: self.now, wall=self.wall)
        phases.record(keep, lambda: step)
        if submitted is not None:
            phases.tell_submitted(submitted)
        for phase, seconds, jump in episode.work:
            self.ahead += jump
            if phase == "save":
                self._saves.append(Saved(number, step - 1, {**self._kept, number: true["train"]}))
            phases.enter("startup" if jump else phase)  # a clock that was set is read before it is believed
            phases.enter(phase)
            self.now += seconds
            true[phase] += seconds
            step += phase == "train"
        if episode.left:
            phases.enter("stop")
            self.now += episode.alive
            true["stop"] += episode.alive
            phases.end()
            self.end = self.now
        else:
            self.now += episode.alive
            true[phases.current] += episode.alive
            life = Life(number, life.started, marks, seen=self.wall(), base=life.base)
            self.end = self.now
            self.now += episode.unseen
            # The launcher's word is as good as a row; not after the clock was set, or it would be taken for another attempt's.
            was_set = abs(sum(jump for _, _, jump in episode.work)) >= SLACK
            if episode.watched and after is not None and not after.mute and not was_set:
                true[phases.current] += episode.unseen
                self.end = self.now
        if episode.watched:
            self._last = Start(0.0, began, self.now)
        self.lives.append(life)
        self._kept[number] = true["train"]


@given(st.lists(EPISODES, min_size=1, max_size=5))
def test_phases_partition_the_wall_clock(episodes: list[Episode]) -> None:
    """Proves that for any sequence of attempts (killed at any moment, also before their first mark; clocks set while they ran;
    queued or not; going on from any checkpoint) the phases are what they were, and add up to the time from the first submission
    to the last sign of life."""
    play = Play(episodes)
    found = phases_of(play.lives)
    if not found:
        assert all(episode.mute for episode in episodes)
        return
    for number, true in enumerate(play.true, 1):
        assert found[number] == pytest.approx(true, abs=CLOSE)
    assert play.begin is not None
    told = goodput(found.values())
    assert (told.seconds if told else 0.0) == pytest.approx(play.end - play.begin, abs=CLOSE)


def life(
    attempt: int, at: float, phase: str, *, seen: float = 0.0, told: tuple[float, float] | None = None, **spent: float
) -> Life:
    """One with one mark, written at `at`."""
    began, ended = told or (None, None)
    mark = Mark(0, at, phase, 0, {**dict.fromkeys(OWN, 0.0), **spent}, last_began=began, last_ended=ended)
    return Life(attempt, at, [mark], seen)


def test_a_superseded_attempt_counts_until_the_next_one_began() -> None:
    """Proves that what a job does after another has taken its run over is no part of the time, in whatever phase it is."""
    told = phases_of([life(1, 110, "train", startup=10, seen=500), life(2, 205, "end", startup=5, train=0)])
    assert (told[1]["train"] + told[1]["lost"], told[2]["down"]) == (90, 0)
    told = phases_of([life(1, 300, "end", startup=10, train=100, save=50, stop=40), life(2, 205, "end", startup=5)])
    assert [told[1][name] for name in ("startup", "lost", "save", "stop")] == [10, 90, 0, 0]
    assert sum(map(sum, (phases.values() for phases in told.values()))) == 205 - 100


def test_a_launchers_word_is_about_the_start_it_names() -> None:
    """Proves that the end of a start that never became an attempt is not taken for the end of the attempt before it."""
    first = life(1, 110, "train", startup=10, seen=150)
    own = phases_of([first, life(2, 305, "end", startup=5, told=(100, 180))])
    assert (own[1]["lost"], own[2]["down"]) == (70, 120)
    anothers = phases_of([first, life(2, 305, "end", startup=5, told=(200, 290))])
    assert (anothers[1]["lost"], anothers[2]["down"]) == (40, 150)


def test_work_is_lost_from_the_checkpoint_on_that_the_next_attempt_was_built_on() -> None:
    """Proves that of several saves the right one counts, also where each step had one."""
    marks = [
        Mark(step, 110 + 10 * step, "save", step, {**dict.fromkeys(OWN, 0.0), "train": 10.0 * step}) for step in range(1, 6)
    ]
    end = Life(2, 200, [Mark(0, 200, "end", 9, {**dict.fromkeys(OWN, 0.0), "train": 5.0})])
    for step in range(1, 6):
        told = phases_of([Life(1, 110, marks), msgspec.structs.replace(end, base=(1, step - 1))])
        assert (told[1]["train"], told[1]["lost"]) == (10 * step, 50 - 10 * step)


def test_an_outdated_submission_is_no_time_in_a_queue() -> None:
    """Proves that what was submitted once and started again in other ways was down then; to the second, since schedulers' times
    have no more."""
    first, second = life(1, 110, "end", startup=10), life(2, 205, "end", startup=5)

    def told(submitted: float) -> tuple[float, float]:
        mark = msgspec.structs.replace(second.marks[0], submitted=submitted)
        phases = phases_of([first, msgspec.structs.replace(second, marks=[mark])])[2]
        return phases["queued"], phases["down"]

    assert told(50) == (0, 90)
    assert told(150) == (50, 40)
    assert told(109) == (90, 0)


@pytest.mark.parametrize(
    "damaged",
    [{"n": True}, {"n": "1"}, {"phase": "lunch"}, {"train": -1.0}, {"train": float("nan")}, {"_step": None}, {"save": "1"}],
)
def test_lines_that_are_no_marks_are_left_out(damaged: dict[str, Any]) -> None:
    """Proves that what any client may send to a server does not break what it shows."""
    sound = {"n": 1, "phase": "train", "_step": 3, **dict.fromkeys(OWN, 0.5)}
    assert read_mark(sound, 1.0) is not None
    assert read_mark({**sound, **damaged}, 1.0) is None
    assert read_mark(sound, float("inf")) is None


def test_journals_that_end_anywhere_partition_what_they_tell(tmp_path: Path) -> None:
    """Proves that a journal cut within any record tells phases that add up to the time until its last whole record."""
    made = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    made.mkdir(parents=True)
    header = JournalHeader(run_id="abc", project="p", entity="", attempt=1, nonce="n", writer="rank0", created=EPOCH + 105)
    path = made / "rank0.a1.wbdj"
    clock = [100.0]
    times_of: list[tuple[int, float]] = []
    with JournalWriter.create(path, header, storage="written") as journal:
        phases = Phases(Start(100.0), clock=lambda: clock[0], wall=lambda: EPOCH + clock[0])

        def keep(row: Any) -> None:
            journal.append(Kind.PHASE, row, EPOCH + clock[0])
            times_of.append((journal.size, clock[0]))

        clock[0] = 107.0
        phases.record(keep, lambda: 0)
        phases.enter("train")
        for step in range(6):
            clock[0] += 10
            journal.append_row({"loss": 1.0, "word": "x" * step}, step=step, commit=True, time=EPOCH + clock[0])
            times_of.append((journal.size, clock[0]))
            if step % 2:
                with phases.during("save"):
                    clock[0] += 2
        phases.end()
    whole = path.read_bytes()
    first = JournalReader.open(path).first
    ends = [first, *(size for size, _ in times_of)]
    for length in sorted({end + more for end in ends for more in (0, 1, 15)} | {end - 1 for end in ends[1:]}):
        path.write_bytes(whole[:length])
        signs = [moment for size, moment in times_of if size <= length]
        marks = times_of[0][0] <= length
        told = goodput(local_phases(tmp_path / "wandb", "p", "", "abc").values())
        assert (told is not None) == marks
        if told is not None:
            assert told.seconds == pytest.approx(signs[-1] - 100.0, abs=CLOSE)


def test_when_a_job_was_submitted(tmp_path: Path) -> None:
    """Proves that Slurm, or Kubernetes where it allows that, is asked without holding anybody up; that a
    submitter's own word comes first, and that ranks which were started again in place ask nobody."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\necho "JobId=7 JobState=RUNNING SubmitTime=2026-01-02T03:04:05 EndTime=Unknown"\n')
    program.chmod(0o755)
    slurm = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    queued = datetime.fromisoformat("2026-01-02T03:04:05").timestamp()

    def told(env: dict[str, str], **more: Any) -> list[Any]:
        rows: list[Any] = []
        phases = Phases(Start(times.now()))
        phases.record(rows.append, int)
        ask_when_submitted(phases, env=env, **more)
        for thread in threading.enumerate():
            if thread.name == "wbdist-submitted":
                thread.join(60)
        return [row["submitted"] for row in rows if "submitted" in row]

    assert told(slurm) == [queued]
    assert told({**slurm, "WBDIST_SUBMITTED": "1767300000.5"}) == [1767300000.5]
    assert told({**slurm, "WBDIST_RESTART": "1"}) == told({**slurm, "TORCHELASTIC_RESTART_COUNT": "2"}) == []
    assert told(slurm, ask=False) == told({**slurm, "SLURM_JOB_ID": ""}) == []
    for allowed in (True, False):
        with KubernetesApi(tmp_path, allowed=allowed) as api:
            moments = told({**api.environment, "KUBERNETES_SERVICE_HOST": "localhost"})
        assert [time.time() - 60 < moment <= time.time() for moment in moments] == [True] * allowed


def test_how_a_process_came_to_be() -> None:
    """Proves that a process knows its own start, takes the launcher's earlier one, and does not believe what cannot be."""
    before = times.now()
    code = "import time; from wbdist.launch import times; time.sleep(0.2); print(times.process_began())"
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert before - 0.02 <= began <= times.now() - 0.2  # the kernel counts hundredths
    own = times.process_began()
    assert times.start_of_process({}) == Start(own)
    told = times.variables(Start(own - 5, own - 9, own - 6))
    assert times.start_of_process(told).began == pytest.approx(own - 5, abs=1e-5)
    assert times.start_of_process(told).last_ended == pytest.approx(own - 6, abs=1e-5)
    assert times.start_of_process({**told, times.BEGAN: f"{own + 60}"}) == Start(own)
    assert times.start_of_process({**told, times.BEGAN: "noon"}) == Start(own)


def test_a_phase_that_began_before_it_was_known() -> None:
    """Proves that what passed between a save and the stop at the same boundary is the stop's, and no training."""
    now = [0.0]
    phases = Phases(Start(0.0), clock=lambda: now[0], wall=lambda: EPOCH + now[0])
    marks: list[Mark | None] = []
    phases.record(lambda row: marks.append(read_mark(row, EPOCH + now[0])), lambda: 5)
    for phase, moment in (("train", 1.0), ("save", 3.0), ("train", 4.0)):
        now[0] = moment
        phases.enter(phase)
    now[0] = 4.5
    phases.enter("stop", began_before=True)
    now[0] = 6.0
    phases.end()
    last = marks[-1]
    assert last is not None
    assert (last.spent["train"], last.spent["save"], last.spent["stop"]) == (2.0, 1.0, 2.0)
