"""Journal records to the lines of the W&B file streams. Pure: the same journal gives the same lines with the same seqs."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from wbdist.core.position import ALERTS, ARTIFACTS, CONSOLE, EVENTS, FILES, HISTORY, PHASES
from wbdist.core.rows import RowAssembler
from wbdist.core.summary import INTERNAL, SummaryTracker
from wbdist.protocol import jsonvalues
from wbdist.run.journal import JournalHeader, Kind, Record

_encode = msgspec.json.Encoder().encode
TELEMETRY: dict[str, Any] = {"5": "0.31.0", "12": "wbdist"}
"""`_wandb.t`: without it other clients do not take the run for a started one and cannot resume it."""


class Translator:
    """Follows one journal from its first record."""

    def __init__(self, header: JournalHeader, shift: int = 0) -> None:
        """`shift`: what steps that the journal names grow by."""
        self._shift = shift
        self._assembler = RowAssembler(
            starting_step=header.starting_step, created=header.created, runtime=header.runtime, summary=header.summary
        )
        self._began = header.created - header.runtime
        self._summary = SummaryTracker(header.summary)
        self.skip: dict[str, int] = {}
        """stream -> lines below this seq are on the server: they are counted, not made."""
        self.produced = {HISTORY: 0, EVENTS: 0, CONSOLE: 0, ALERTS: 0, PHASES: 0, FILES: 0, ARTIFACTS: 0}
        """stream -> seq of the next line."""
        self.lines: dict[str, list[str]] = {HISTORY: [], EVENTS: [], CONSOLE: [], ALERTS: [], PHASES: []}
        """stream -> lines made and not yet taken; the last has seq `produced - 1`."""
        self.files: list[tuple[int, dict[str, Any]]] = []
        """Versions of files not yet taken, with their seqs: their contents go another way than lines."""
        self.artifacts: list[tuple[int, dict[str, Any]]] = []
        """As `files`."""
        self.facts: dict[str, Any] = {}
        """What RUN records said."""
        self.config: dict[str, Any] = {}
        self.facts_version = 0
        self.by_hand = {key: value for key, value in header.summary.items() if not key.startswith("_")}
        """What was set in the summary, also before this attempt (then beside what rows said)."""
        self.by_hand_version = 1
        self.preempting = False
        self.end: dict[str, Any] | None = None
        self.last_time = 0.0
        """Of the last record: when the writer was last seen at work."""

    @property
    def summary_version(self) -> int:
        return self._summary.version

    def first(self, stream: str) -> int:
        """Seq of the first line in `lines[stream]`."""
        return self.produced[stream] - len(self.lines[stream])

    def behind(self) -> bool:
        """Whether lines of this journal are on the server that have not been read: it is read anew, or it is a shorter copy, of
        which the summary and the end are not the last ones."""
        return any(self.produced[stream] < seq for stream, seq in self.skip.items() if stream in self.produced)

    def pending(self) -> bool:
        return any(self.lines.values())

    def take(self, stream: str, count: int) -> None:
        """Forgets the first `count` lines: they are delivered."""
        del self.lines[stream][:count]

    def feed(self, records: Iterable[Record]) -> None:
        for record in records:
            kind = record.kind
            self.last_time = record.time
            if kind is Kind.ROW:
                step = None if record.step is None else record.step + self._shift
                for row in self._assembler.add(record.data, step, record.commit, record.time):
                    self._row(row)
            elif kind is Kind.COMMIT:
                self.close_row()
            elif kind is Kind.CONSOLE:
                self._line(CONSOLE, _console_line, record)
            elif kind is Kind.STATS:
                self._line(EVENTS, self._event_line, record)
            elif kind is Kind.ALERT:
                self._line(ALERTS, self._placed_line, record)
            elif kind is Kind.PHASE:
                self._line(PHASES, self._placed_line, record)
            elif kind is Kind.FILE:
                self.files.append((self.produced[FILES], record.data))
                self.produced[FILES] += 1
            elif kind is Kind.ARTIFACT:
                self.artifacts.append((self.produced[ARTIFACTS], record.data))
                self.produced[ARTIFACTS] += 1
            elif kind is Kind.RUN:
                self.facts.update(record.data)
                self.facts_version += 1
            elif kind is Kind.CONFIG:
                self.config.update(record.data.get("set", {}))
                for key in record.data.get("delete", ()):
                    self.config.pop(key, None)
                self.facts_version += 1
            elif kind is Kind.SUMMARY:
                self._summary.change(record.data.get("set", {}), record.data.get("delete", ()))
                self.by_hand.update(record.data.get("set", {}))
                self.by_hand_version += 1
            elif kind is Kind.DEFINE and "name" in record.data:
                self._assembler.define(record.data)
                self._summary.define(record.data)
                self.facts_version += 1
            elif kind is Kind.PREEMPTING:
                self.preempting = True
            elif kind is Kind.END:
                self.close_row()
                self.end = record.data

    def close_row(self) -> None:
        """Closes the open row: asked for, at the end, or since the writer died."""
        for row in self._assembler.close():
            self._row(row)

    def summary(self) -> dict[str, Any]:
        """The summary of the finished rows, and what a later attempt needs to go on with it (`SummaryTracker.state`)."""
        return self._summary.state()

    def summary_line(self) -> str:
        values = self.summary()
        internal = {**values.get(INTERNAL, {}), "runtime": int(values.get("_runtime", 0))}
        return json_line({**values, INTERNAL: internal})

    def wandb_config(self) -> dict[str, Any]:
        """The whole config in W&B's form."""
        config = {key: {"value": value} for key, value in self.config.items() if key != "_wandb"}
        internal = {"t": TELEMETRY, **self.config.get("_wandb", {})}
        if self._summary.definitions:
            internal["m"] = self._summary.definitions.to_wandb()
        config["_wandb"] = {"value": internal}
        return config

    def _row(self, row: dict[str, Any]) -> None:
        self._summary.add_row(row)
        self._line(HISTORY, json_line, row)

    def _line(self, stream: str, make: Any, source: Any) -> None:
        seq = self.produced[stream]
        self.produced[stream] = seq + 1
        if seq >= self.skip.get(stream, 0):
            self.lines[stream].append(make(source))

    def _placed_line(self, record: Record) -> str:
        return json_line({**record.data, "_step": record.data["_step"] + self._shift, "_timestamp": record.time})

    def _event_line(self, record: Record) -> str:
        return json_line({**record.data, "_timestamp": record.time, "_runtime": record.time - self._began, "_wandb": True})


def json_line(value: dict[str, Any]) -> str:
    """One JSON line, with bare NaN and Infinity where the value has them."""
    text = _encode(value)
    # The fast encoder writes NaN as null; so do real Nones, and then the slow way gives the same.
    return jsonvalues.dumps(value) if b"null" in text else text.decode()


def _console_line(record: Record) -> str:
    moment = datetime.fromtimestamp(record.time, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    mark = "ERROR " if record.data.get("stream") == "stderr" else ""
    return f"{mark}{moment} {record.data.get('text', '')}"
