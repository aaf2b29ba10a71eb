"""Bringing one journal to its server, exactly once: the state machine shared by the shipper and `wbdist sync`.

    read records -> make lines (those the server has are only counted) -> one file_stream request at a time -> forget them
    when acknowledged

Where to begin is asked from the server (BeginAttempt answers the next expected seq), so a delivery can be killed and begun
again at any moment. Memory is bounded: the journal is read on only when the lines of the last read are acknowledged.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from wbdist.core.position import ALERTS, CONSOLE, FILES, HISTORY, PHASES, SUMMARY
from wbdist.errors import JournalCorruptError
from wbdist.protocol import file_stream, operations, reads
from wbdist.protocol.attempts import FEATURE, SHARED, Ended, StreamAnswer, StreamStamp
from wbdist.run.journal import JournalReader
from wbdist.run.journal_format import begin_request
from wbdist.run.shipper.foreign_memory import ForeignMemory
from wbdist.run.shipper.lines import Translator, json_line
from wbdist.run.shipper.placing import NotNowError, place
from wbdist.run.shipper.remote import Answer, Remote, UnreachableError
from wbdist.run.shipper.uploads import Uploads

T = TypeVar("T")
_NO_FEATURES: frozenset[str] = frozenset()

_NEVER = 1 << 62
"""A seq that no line reaches."""
MAX_LINES = 1000
MAX_BYTES = 1 << 20
"""Of one request's lines; a single longer line goes alone."""


class Pace(msgspec.Struct, frozen=True):
    """Seconds. What our own server is asked is cheap; W&B's asks clients for 15 s between requests."""

    ours: float = 0.25
    foreign: float = 15.0
    heartbeat: float = 30.0
    poll: float = 0.05
    """Between looks at a journal that grows; up to `idle` at one that does not."""
    idle: float = 1.0
    retry_min: float = 0.25
    retry_max: float = 3.0
    retry_max_foreign: float = 60.0


class State(Enum):
    OPENING = "opening"
    STREAMING = "streaming"
    DONE = "done"
    """Everything, the end included, is acknowledged."""
    FENCED = "fenced"
    """A newer attempt owns the run; what this one had logged went to the archive."""
    FAILED = "failed"
    """Refused for good; `error` says why."""


TERMINAL = frozenset({State.DONE, State.FENCED, State.FAILED})


class RefusedError(Exception):
    """The server said no for good."""


class RetryLaterError(Exception):
    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Delivery:
    """One journal on its way. Not thread-safe but for `ask` (any thread) and reading the attributes."""

    def __init__(
        self,
        path: Path,
        remote: Remote,
        log: logging.Logger,
        pace: Pace | None = None,
        *,
        names: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        console: bool = True,
    ) -> None:
        """`names`: run_id, project, entity (and other facts of the header) to send under instead of the journal's. `tags`: what
        to call some of the run's tags. `console`: printed lines, too.

        Raises JournalCorruptError or OSError when the journal cannot be opened.
        """
        self.path = path
        self.remote = remote
        self.state = State.OPENING
        self.error = ""
        self.asked = 0
        """Number of the last flush asked for."""
        self.flushed = 0
        """Everything that was in the journal when this flush was asked for is acknowledged."""
        self.caught_up = False
        """Everything readable was acknowledged at least once: a newer attempt of the run may begin."""
        self.delivered = 0
        """Requests the server took: grows as long as there is progress."""
        self.trouble = ""
        """Why the last step has to be repeated; '' when it has not."""
        self.writer_lives = True
        self.due = 0.0
        """When `step` has something to do next."""
        self._log = log
        self._pace = pace or Pace()
        self._reader = JournalReader.open(path)
        self.header = msgspec.structs.replace(self._reader.header, **(names or {}))
        self._console = console
        self._tags = dict(tags or {})
        self._translator = Translator(self.header)
        self._shift = 0
        """What this journal's steps grow by on the server."""
        self._memory = ForeignMemory(path, remote.base_url)
        self.uploads = Uploads(self.header, path.parent, log)
        """The run's files: on their way beside the lines, and beyond their end."""
        self._entity = self.header.entity
        self._project = self.header.project
        self._ours = False
        self._base: dict[str, int] = {}
        """stream -> W&B offset of our seq 0."""
        self._inherited: dict[str, Any] = {}
        """Config of what this attempt branches off, in W&B's form."""
        self._speaks = True
        """Whether this attempt says what the run is: its facts, config and summary. An older one, of which lines are visible
        below the newest, adds lines only; the order in which segments arrive then makes no difference."""
        self._facts_sent = 0
        self._summary_sent = 0
        self._shares = self.header.nonce.startswith(SHARED)
        """Whether this writer is one of those that share the run: its summary is the server's to make, of all writers' rows,
        but for what is set by hand."""
        self._preempting_sent = False
        self._last_sent = 0.0
        self._last_look = 0.0
        self._tries = 0
        self.stopped = False
        """Somebody asked on the server that the run's process stop."""
        self.fenced = False
        """A newer attempt owns the run; the journal goes to the archive."""
        self._behind = True
        """Whether there may be more in the journal than was ever read: then no pause between reads."""

    @property
    def run_key(self) -> tuple[str, str, str]:
        return (self.header.entity, self.header.project, self.header.run_id)

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL

    def ask(self) -> int:
        """Asks for a flush; it has happened when `flushed` is at least the number returned."""
        self.asked += 1
        self.due = 0.0
        return self.asked

    def close(self) -> None:
        self._reader.close()

    def step(self, now: float) -> None:
        """One look at the journal and at most a few requests; sets `due`. Blocks as long as a request does."""
        try:
            self._step(now)
            if self._tries:
                self._log.info("%s: the server is back after %d failed tries", self.path.name, self._tries)
            self._tries, self.trouble = 0, ""
        except (UnreachableError, RetryLaterError) as error:
            self._retry(now, error)
        except RefusedError as error:
            self._finish(State.FAILED, str(error))
        except (JournalCorruptError, OSError) as error:
            self._finish(State.FAILED, f"the journal cannot be read: {error}")
        except Exception as error:  # noqa: BLE001  (said; the thread delivers other journals, too)
            self._log.exception("%s: a fault of the shipper", self.path)
            fault = f"{type(error).__name__}: {error}"
            self._finish(State.FAILED, f"a fault of the shipper ({fault}); logs/shipper.log has its traceback")

    def _step(self, now: float) -> None:
        ticket = self.asked
        translator = self._translator
        alive = self._reader.writer_alive()  # before reading: what a dying writer wrote last is then read
        grew, at_end = False, translator.end is not None
        if not translator.pending() and not at_end:
            records = self._reader.read()
            grew, at_end = bool(records), not records
            self._behind = self._behind and grew
            translator.feed(records)
            self._offer_files()
        self.writer_lives = alive
        if self.state is State.OPENING:
            if not translator.facts_version and alive and ticket == self.flushed and now < self.header.created + 1.0:
                self.due = now + self._pace.poll  # the facts of the run are about to be written
                return
            self._open()
            if self.finished:
                return
        ended = translator.end is not None
        lost = not alive and not ended and at_end
        if lost:
            translator.close_row()
        if ended or lost:
            self.uploads.end(lost=lost)
        # W&B's server takes what comes behind the end for a run that goes on: there the end waits for the files.
        ending = (ended or lost) and (self._ours or not self.uploads.busy)
        if self._must_send(now, ticket, grew, ending):
            (self._archive if self.fenced else self._send)(now, end=ending)
            if self.finished:
                return
        self._settle(now, ticket, at_end)

    def _offer_files(self) -> None:
        for seq, payload in self._translator.files:
            self.uploads.offer(seq, payload)
        self._translator.files.clear()
        for seq, payload in self._translator.artifacts:
            self.uploads.artifacts.offer(seq, payload)
        self._translator.artifacts.clear()

    def _settle(self, now: float, ticket: int, at_end: bool) -> None:
        """What is reached, and when to come back. `at_end`: this step looked into the journal and found nothing more."""
        if self._translator.pending() or not at_end:
            pause = 0.0 if self._behind or self._full() else self._pace.poll
            self._last_look = now
        else:
            if not self._unsent():
                self.caught_up = True
                self.flushed = max(self.flushed, ticket)
            quiet = now - max(self._last_look, self._last_sent)
            pause = min(self._pace.idle, max(self._pace.poll, quiet / 4))
        self.due = 0.0 if self.flushed < self.asked else now + pause

    def _must_send(self, now: float, ticket: int, grew: bool, ending: bool) -> bool:
        translator = self._translator
        if ending or self._full() or (translator.preempting and not self._preempting_sent and not self.fenced):
            return True
        quiet = now - self._last_sent
        if not self._unsent() and not translator.pending():
            return quiet >= self._pace.heartbeat
        if ticket > self.flushed and not grew:
            return True
        return quiet >= (self._pace.ours if self._ours else self._pace.foreign)

    def _unsent(self) -> bool:
        """Whether something beside lines waits to be sent."""
        translator = self._translator
        if self.fenced or not self._speaks or translator.behind():  # what is known so far was said before, or later things
            return False
        return (
            translator.facts_version != self._facts_sent
            or self._summary_version() not in {None, self._summary_sent}
            or (translator.preempting and not self._preempting_sent)
        )

    def _full(self) -> bool:
        return any(len(lines) >= MAX_LINES for lines in self._translator.lines.values())

    # Opening ------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Makes the run known, begins the attempt, learns where to go on."""
        header = self.header
        self._ours = FEATURE in self._ask_for(
            operations.server_features(), operations.read_server_features, unknown=_NO_FEATURES
        )
        if self._ours:
            self._make_known()
            if header.behind is not None:
                self._find_place()
                header = self.header
            if header.at_step is not None:
                self._learn_base(header.at_step)
            begin = begin_request(header)
            begun = self._ask_for(
                operations.begin_attempt(self._entity, self._project, header.run_id, begin), operations.read_begun
            )
            self._base = dict(begun.lines)
            self.uploads.begin(self._entity, self._project, ours=True, have=begun.next.get(FILES, {}))
            if header.behind is not None and not header.root and not begun.accepted and not any(begun.next.values()):
                raise RetryLaterError(f"another attempt of run {header.run_id} has just begun")
            self._speaks = begun.attempt == header.attempt and header.primary
            if not begun.accepted:
                self._fence(begun.attempt)
            else:
                self._go_on_from({stream: counts.get(header.writer, 0) for stream, counts in begun.next.items()})
        else:
            self._open_foreign()
        self.state = State.STREAMING

    def _make_known(self) -> None:
        """Creates the run when there is none. One that exists is left as it is: a newer attempt may have said what it is."""
        header = self.header
        status = operations.run_resume_status(self._entity or None, self._project, header.run_id)
        names = self._ask_for(status, operations.read_run_names, unknown=("", ""))
        if not names[1]:
            facts = {
                key: value for key, value in self._facts().items() if key in {"display_name", "group", "job_type", "sweep"}
            }
            upserted = self._ask_for(operations.upsert_run(**self._names(), **facts), operations.read_upserted)
            names = upserted.entity, upserted.project
        self._entity, self._project = names

    def _find_place(self) -> None:
        """Of a journal that goes behind whatever there is: attempt and base. Raises RefusedError while the run is written."""
        where = (self._entity, self._project, self.header.run_id)
        attempts = self._ask_for(reads.attempts(*where), reads.read_attempts)
        found = self._ask_for(operations.run_position(*where), operations.read_position)
        try:
            placed = place(self.header, self.path, attempts, None if found is None else found[1])
        except NotNowError as error:
            raise RefusedError(str(error)) from error
        self.header, self._shift = placed.header, placed.shift
        self.uploads = Uploads(self.header, self.path.parent, self._log)  # their stamps name the attempt

    def _learn_base(self, step: int) -> None:
        """What a branch off a run that was only known here takes over from it: its config, and the summary at the step.

        The header holds them when `init` could ask the server, and they are then the same.
        """
        source = self.header.base_run or self.header.run_id
        where = (self._entity, self._project, source)
        status = self._ask_for(operations.run_resume_status(*where), operations.read_resume_status)
        if status is not None:
            self._inherited = {key: value for key, value in status.config.items() if key != "_wandb"}
        if not self.header.summary:
            try:
                found = self._ask_for(operations.run_position(*where, step=step), operations.read_position)
            except RefusedError:
                # Since this attempt began, the source may have been rewound to before that step. If it has not begun, it is
                # refused for the same reason in a moment.
                found = None
            if found is not None:
                position = found[1]
                self.header = msgspec.structs.replace(self.header, summary=position.summary, runtime=position.runtime)

    def _open_foreign(self) -> None:
        """W&B's own rule: lines are told by their offset; the first ones are kept (`ForeignMemory`)."""
        config = self._wandb_config()
        upserted = self._ask_for(
            operations.upsert_run(**self._names(), **self._facts(), config=config), operations.read_upserted
        )
        self._facts_sent = self._translator.facts_version
        self._entity, self._project = upserted.entity, upserted.project
        known = self._memory.read()
        if known is None:
            known = {**self._foreign_lines(), HISTORY: upserted.history_line_count}
            self._memory.keep(known)
        self._base = known
        self._translator.skip[ALERTS] = known.get(ALERTS, 0)
        self._translator.take(ALERTS, known.get(ALERTS, 0))
        self.uploads.begin(self._entity, self._project, ours=False, have={})

    def _names(self) -> dict[str, Any]:
        return {"project": self._project, "run_id": self.header.run_id, "entity": self._entity or None}

    def _facts(self) -> dict[str, Any]:
        known = {"display_name", "group", "job_type", "notes", "tags", "host", "program", "commit", "repo", "sweep"}
        facts = {key: value for key, value in self._translator.facts.items() if key in known}
        if self._tags and facts.get("tags"):
            facts["tags"] = list(dict.fromkeys(self._tags.get(tag, tag) for tag in facts["tags"]))
        return facts

    def _foreign_lines(self) -> dict[str, int]:
        """stream -> lines there are; what a fork or rewind begins anew begins at 0."""
        if self.header.base is None or self.header.fresh:
            return {}
        status = operations.run_resume_status(self._entity or None, self._project, self.header.run_id)
        known = self._ask_for(status, operations.read_resume_status)
        return {} if known is None else dict(known.lines)

    def _wandb_config(self) -> dict[str, Any]:
        header = self.header
        config = {**self._inherited, **self._translator.wandb_config()}
        if not self._ours and header.at_step is not None and header.base_run:
            config["_wandb"]["value"]["branch_point"] = {"run_id": header.base_run, "step": header.at_step}
        return config

    def _go_on_from(self, expected: dict[str, int]) -> None:
        """Reads the journal again from its start, making lines from `expected` on."""
        self._behind = True
        self._reader.rewind()
        self._translator = Translator(self.header, self._shift)
        self._translator.skip = expected if self._console else {**expected, CONSOLE: _NEVER}
        self._translator.feed(self._reader.read())
        self._offer_files()
        self._facts_sent = self._summary_sent = 0
        self._preempting_sent = False

    def _send_foreign_alerts(self) -> None:
        """W&B's wire has no lines of them. One that its server does not want is not sent again."""
        translator, run = self._translator, (self._entity, self._project, self.header.run_id)
        while lines := translator.lines[ALERTS]:
            said = msgspec.json.decode(lines[0])
            notice = operations.notify_alert(run, said["title"], said["text"], said["level"], said["wait"])
            self._ask_for(notice, lambda _: True, unknown=True)
            self._base[ALERTS] = translator.first(ALERTS) + 1
            self._memory.keep(self._base)
            translator.take(ALERTS, 1)

    # Sending ------------------------------------------------------------------------------------------

    def _send(self, now: float, *, end: bool) -> None:
        """Everything that waits, in as many requests as needed; the end of the run in the last one."""
        translator = self._translator
        if self._speaks and translator.facts_version != self._facts_sent and not translator.behind():
            version = translator.facts_version
            config = self._wandb_config()
            operation = operations.upsert_run(**self._names(), **self._facts(), config=config)
            self._ask_for(operation, operations.read_upserted)
            self._facts_sent = version
        if not self._ours:
            self._send_foreign_alerts()
            translator.lines[PHASES].clear()  # there are no attempts that they could belong to
        while True:
            chunks, counts = self._batch()
            last = all(counts.get(stream, 0) == len(lines) for stream, lines in translator.lines.items())
            summed = self._summary_version()
            if self._speaks and last and summed not in {None, self._summary_sent} and not translator.behind():
                line = json_line(translator.by_hand) if self._shares else translator.summary_line()
                chunks[SUMMARY] = file_stream.FileChunk([line], 0)
            final = end and last and not translator.behind()
            request = file_stream.StreamRequest(
                files=chunks,
                uploaded=self.uploads.take_uploaded(),
                preempting=self._speaks and translator.preempting and not self._preempting_sent,
                complete=final and self._exit_code() is not None,
                exitcode=self._exit_code() if final else None,
                wbdist=self._stamp(counts, final),
            )
            answer = self._stream(request)
            if answer is not None and answer.code == "gap":
                self._log.warning("%s: the server expects %s; going back there", self.path.name, answer.next)
                self._go_on_from(dict(answer.next))
                self.due = 0.0
                return
            for stream, count in counts.items():
                translator.take(stream, count)
            self._last_sent = now
            if answer is not None and answer.code == "fenced":
                self._fence(answer.attempt)
                return
            self._preempting_sent = translator.preempting
            if SUMMARY in chunks:
                assert summed is not None
                self._summary_sent = summed
            if last:
                break
        if end:
            if translator.end is None and self._reader.torn():
                self._log.warning(
                    "%s: the bytes behind offset %d do not verify and are ignored", self.path, self._reader.offset
                )
            self.caught_up = True
            self._finish(State.DONE, "")

    def _summary_version(self) -> int | None:
        """Of what this writer has to say of the summary; None when it has nothing to say."""
        if not self._shares:
            return self._translator.summary_version
        return self._translator.by_hand_version if self._ours and self._translator.by_hand else None

    def _batch(self) -> tuple[dict[str, file_stream.FileChunk], dict[str, int]]:
        """The next lines of each stream, up to the limits."""
        chunks: dict[str, file_stream.FileChunk] = {}
        counts: dict[str, int] = {}
        room = MAX_BYTES
        for stream, lines in self._translator.lines.items():
            taken: list[str] = []
            for line in lines[:MAX_LINES]:
                if taken and room < len(line):
                    break
                room -= len(line)
                taken.append(line)
            if taken:
                offset = self._base.get(stream, 0) + self._translator.first(stream)
                chunks[stream] = file_stream.FileChunk(taken, offset)
                counts[stream] = len(taken)
        return chunks, counts

    def _stamp(self, counts: dict[str, int], final: bool) -> StreamStamp:
        header = self.header
        ended = None
        # A copy does not know how its writer ended; and that one of several ended says nothing of the run.
        if final and header.primary and not header.copied:
            end = self._translator.end
            if end is None:
                ended = Ended("lost", "the writer's process died without a word", at=self._translator.last_time)
            elif end.get("exit_code") is not None:  # else this writer ends, the run does not
                ended = Ended(str(end.get("cause") or "exit"), at=self._translator.last_time)
        seq = {stream: self._translator.first(stream) for stream in counts}
        return StreamStamp(header.attempt, header.nonce, header.writer, seq, ended)

    def _exit_code(self) -> int | None:
        end = self._translator.end
        return None if end is None else end.get("exit_code")

    def _archive(self, now: float, *, end: bool) -> None:
        """Fenced: what is logged goes to the archive, as long as the writer logs; then its end."""
        translator = self._translator
        while True:
            chunks, counts = self._batch()
            last = all(counts.get(stream, 0) == len(lines) for stream, lines in translator.lines.items())
            final = end and last
            request = file_stream.StreamRequest(
                files=chunks,
                complete=final and self._exit_code() is not None,
                exitcode=self._exit_code() if final else None,
                wbdist=self._stamp(counts, final),
            )
            answer = self._stream(request)
            if answer is not None and answer.code == "gap":
                self._go_on_from(dict(answer.next))
                self.due = 0.0
                return
            for stream, count in counts.items():
                translator.take(stream, count)
            self._last_sent = now
            if last:
                break
        if end:
            self._finish(State.FENCED, self.error)

    def _fence(self, current: int) -> None:
        self.fenced = True
        self.due = 0.0
        header = self.header
        if current == header.attempt:
            self.error = f"fenced: another job holds attempt {current} of run {header.run_id}"
        else:
            self.error = f"fenced: attempt {current} of run {header.run_id} has taken over from attempt {header.attempt}"
        self._log.warning("%s: %s", self.path.name, self.error)

    # The wire -----------------------------------------------------------------------------------------

    def _stream(self, request: file_stream.StreamRequest) -> StreamAnswer | None:
        target = file_stream.path(self._entity, self._project, self.header.run_id)
        answer = self.remote.post(target, file_stream.encode_request(request))
        reply = file_stream.decode_reply(answer.body)
        if answer.ok or (answer.status == 409 and reply.wbdist is not None and reply.wbdist.code in {"gap", "fenced"}):
            self.delivered += 1
            self.stopped = self.stopped or reply.stopped
            return reply.wbdist
        raise self._problem("file_stream", answer, reply.error)

    def _ask_for(
        self, operation: operations.Operation, read: Callable[[Mapping[str, Any]], T], *, unknown: T | None = None
    ) -> T:
        """What `read` makes of the answer; `unknown` (if given) when the server does not know the operation."""
        answer = self.remote.post("/graphql", operation.body())
        message = operations.error_message(answer.body)
        if answer.ok and not message:
            self.delivered += 1
            try:
                return read(msgspec.json.decode(answer.body)["data"])
            except (ValueError, KeyError, TypeError) as error:
                # Not the server's own words: a proxy's error page, or a server being replaced.
                raise RetryLaterError(
                    f"{self.remote.base_url} answers {operation.name} with what is not understood: {error!r}"
                ) from error
        if unknown is not None and (answer.ok or answer.status in {400, 404, 422}):
            return unknown
        if answer.status == 409 and operation.name == operations.UPSERT_NAME:
            raise RetryLaterError(f"{operation.name}: {message}")
        raise self._problem(operation.name, answer, message)

    def _problem(self, what: str, answer: Answer, message: str) -> Exception:
        message = message or answer.body[:200].decode("utf-8", "replace")
        text = f"{self.remote.base_url} answers {what} with HTTP {answer.status}: {message}"
        if answer.status == 401 and answer.api_key != self.remote.api_key:
            return RetryLaterError(text)  # another key was given meanwhile
        if answer.ok or not answer.retryable:
            if answer.status == 401 and not self.remote.api_key:
                text += " (no API key is known for this server; run `wbdist login`, or set WANDB_API_KEY)"
            return RefusedError(text)
        return RetryLaterError(text, answer.retry_after)

    def _retry(self, now: float, error: UnreachableError | RetryLaterError) -> None:
        self._tries += 1
        self.trouble = str(error)
        longest = self._pace.retry_max if self._ours or self.state is State.OPENING else self._pace.retry_max_foreign
        wait = min(longest, self._pace.retry_min * 2 ** min(self._tries - 1, 20)) * random.uniform(1.0, 1.25)
        asked = getattr(error, "wait", None)
        if asked is not None:
            wait = asked
        self.due = now + wait
        if self._tries in {1, 10, 100} or self._tries % 1000 == 0:
            self._log.warning("%s: %s (try %d, next in %.1f s)", self.path.name, error, self._tries, wait)

    def _finish(self, state: State, error: str) -> None:
        if state is State.FAILED:
            self._log.error("%s: given up: %s", self.path, error)
        self.error = error
        self.state = state
        self.flushed = self.asked if state is State.DONE else self.flushed
        self._reader.close()
