"""What the journals under one root know of a run: where it stands, and where it stood after a step, without any server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from wbdist.core.branch import split_immutable
from wbdist.core.position import Counts, RunPosition, Watermark
from wbdist.core.rows import StepRule
from wbdist.errors import JournalCorruptError
from wbdist.run.journal import SUFFIX, JournalHeader, JournalReader, Kind, writer_alive
from wbdist.run.shipper.lines import Translator
from wbdist.run.unreadable import Unreadable, look

_ALL = 1 << 62


class LocalJournal(msgspec.Struct, frozen=True):
    path: Path
    header: JournalHeader

    def writer_lives(self) -> bool:
        return writer_alive(self.path)


class Standing(msgspec.Struct, frozen=True):
    """A run after some line of it."""

    position: RunPosition
    config: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    """display_name, notes, tags, group, job_type, as far as they were ever said."""
    metrics: list[dict[str, Any]] = []
    """What define_metric said, as in W&B's config."""


class LocalRun:
    """The journals of one run below one root, feeds left out. Read when made; a run that is not there has none."""

    def __init__(self, root: Path, project: str, entity: str, run_id: str) -> None:
        self.root = root
        self.project = project
        self.entity = entity
        self.run_id = run_id
        self.journals: list[LocalJournal] = []
        self.unreadable: list[Unreadable] = []
        """Journals that are probably this run's, and in none of the answers: whoever builds upon these says so, or refuses."""
        self._find()
        self.journals.sort(key=lambda found: (found.header.attempt, found.path))

    def _find(self) -> None:
        others: set[Path] = set()
        unreadable = []
        for path in self.root.glob(f"*run-*-{self.run_id}*/*{SUFFIX}"):
            try:
                with JournalReader.open(path) as reader:
                    header = reader.header
            except (JournalCorruptError, OSError) as error:
                unreadable.append(look(path, error, self.run_id))
                continue
            same_entity = not self.entity or not header.entity or self.entity == header.entity
            if not (header.run_id == self.run_id and header.project == self.project and same_entity):
                others.add(path.parent)
            elif header.role == "run":
                self.journals.append(LocalJournal(path, header))
        self.unreadable = [one for one in unreadable if one is not None and one.path.parent not in others]

    def __bool__(self) -> bool:
        return bool(self.journals)

    @property
    def attempt(self) -> int:
        """The newest attempt; 0 when there is none."""
        return self.journals[-1].header.attempt if self.journals else 0

    def alive(self) -> LocalJournal | None:
        """A journal whose writer lives, if there is one."""
        return next((journal for journal in self.journals if journal.writer_lives()), None)

    def state(self, attempt: int | None = None) -> Standing:
        """After the last line of `attempt` (default: the newest). The open row of a dead writer counts: it is shipped, too."""
        number = self.attempt if attempt is None else attempt
        return _merge(self, [_follow(journal, None) for journal in self.journals if journal.header.attempt == number])

    def position_at(self, step: int, attempt: int | None = None) -> RunPosition | None:
        """After the last row up to `step`, in what `attempt` (default: the newest) shows; None when the journals do not tell.

        Its `run_id` is the run in which its watermark counts: below the branch point of a fork, that is the source.
        """
        number = self.attempt if attempt is None else attempt
        journals = [journal for journal in self.journals if journal.header.attempt == number]
        if not journals:
            return None
        header = journals[0].header
        if step >= header.starting_step:
            return _merge(self, [_follow(journal, step) for journal in journals]).position
        if header.base is None:
            # With at_step, what lies below is the server's to know. Else there is no row up to here.
            empty = RunPosition(self.run_id, self.project, header.entity, Watermark(number, {}, -1))
            return empty if header.at_step is None else None
        source = header.base_run or self.run_id
        if step >= header.base.step:
            return RunPosition(source, self.project, header.entity, header.base, header.summary, header.runtime)
        below = self if source == self.run_id else LocalRun(self.root, self.project, self.entity, split_immutable(source)[0])
        return below.position_at(step, header.base.attempt)


class _Followed(msgspec.Struct, frozen=True):
    header: JournalHeader
    translator: Translator
    last_time: float
    last_step: int


def _follow(journal: LocalJournal, step: int | None) -> _Followed:
    """Reads a journal to its end, or to the row that goes beyond `step`."""
    header = journal.header
    translator = Translator(header)
    translator.skip = dict.fromkeys(translator.produced, _ALL)
    rule = StepRule(header.starting_step)
    dead = not journal.writer_lives()  # before reading, so that a dying writer's last words are read
    last_time, cut = header.created, False
    with JournalReader.open(journal.path) as reader:
        while not cut and (records := reader.read()):
            for record in records:
                if record.kind is Kind.ROW:
                    if cut := step is not None and (rule.step if record.step is None else record.step) > step:
                        break
                    rule.accept(record.step, record.commit)
                elif record.kind is Kind.COMMIT:
                    rule.close()
                translator.feed((record,))
                last_time = record.time
    if cut or dead:
        translator.close_row()
        rule.close()
    return _Followed(header, translator, last_time, rule.last_step)


def _merge(run: LocalRun, followed: list[_Followed]) -> Standing:
    """What the writers of one attempt say together; of what several of them say, the last word."""
    header = followed[0].header
    counts: Counts = {}
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    metrics: list[dict[str, Any]] = []
    for one in sorted(followed, key=lambda one: one.last_time):
        for stream, count in one.translator.produced.items():
            if count:
                counts.setdefault(stream, {})[one.header.writer] = count
        summary |= one.translator.summary()
        config |= one.translator.config
        metrics = one.translator.wandb_config()["_wandb"]["value"].get("m") or metrics
        facts |= one.translator.facts
    config.pop("_wandb", None)
    position = RunPosition(
        run_id=run.run_id,
        project=run.project,
        entity=header.entity,
        watermark=Watermark(header.attempt, counts, max(one.last_step for one in followed)),
        summary=summary,
        runtime=max(one.last_time - one.header.created + one.header.runtime for one in followed),
    )
    return Standing(position, config, facts, metrics)
