"""The journal's bytes: header, frames, records. Pure: no files, no clock.

    file    = header frame*
    header  = magic (8) | version u16 | length u32 | check u32 | JSON facts
    frame   = length u32 | check u32 | seq u32 | kind u8 | payload          length counts seq, kind and payload

`check` is the CRC-32 of what `length` counts, started from the length, so that a run of zeros (space reserved ahead) is
never a frame. `seq` counts frames from 0 without gaps. The first frame that does not verify, or is out of sequence, ends
the journal: everything before it is exact, everything after it is ignored.

A row of plain scalars is *packed*: its keys and types are written once in a SCHEMA frame, each row then carries the
schema's number and the bare values (floats 8 bytes, ints 8, bools 1, strings 4 + their bytes, None nothing). Every other
row, and every other record, is MessagePack, which keeps NaN, infinities and 64-bit integers exactly (JSON would not).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final, Literal, NamedTuple

import msgspec

from wbdist.core.position import Watermark
from wbdist.errors import JournalCorruptError
from wbdist.protocol.attempts import BeginAttempt

MAGIC: Final = b"WBDJ\r\n\x1a\n"
VERSION: Final = 1
MAX_FRAME: Final = 1 << 28
"""Longest frame believed (256 MiB); a larger length is damage."""

_HEADER: Final = struct.Struct("<8sHII")
FRAME_HEAD: Final = struct.Struct("<II")
BODY_HEAD: Final = struct.Struct("<IB")
FRAME_OVERHEAD: Final = FRAME_HEAD.size + BODY_HEAD.size
PACKED_HEAD: Final = struct.Struct("<IBHId")
"""seq, kind, schema, step, time: then the values."""
_FRAME: Final = struct.Struct("<III")
"""length, check, seq"""


class Kind(IntEnum):
    """What a record is. Numbers are for ever; readers skip kinds they do not know."""

    RUN = 1
    """Facts for the server: display_name, group, job_type, notes, tags, host, program, commit, repo, sweep.
    Later ones update earlier ones."""
    CONFIG = 2
    """{"set": {key: value}, "delete": [key]}: changes to the config."""
    SUMMARY = 3
    """{"set": {key: value}, "delete": [key]}: changes made by hand; rows update the summary by themselves."""
    ROW = 4
    """One `append_row` call; see `Record.step`, `.commit`."""
    DEFINE = 5
    """One define_metric call, its arguments by name."""
    CONSOLE = 6
    """{"text": one line, "stream": "stdout" | "stderr"}: one line of output.log."""
    STATS = 7
    """System metrics {name: value}: one line of the events stream."""
    FILE = 8
    """One version of a file of the run: `run.files.FileRecord`. Its `path` is absolute; when the run's directory has been moved
    since, the file lies at the same place beside the journal."""
    PREEMPTING = 9
    """{}: the run is marked preempting."""
    COMMIT = 10
    """{}: closes the pending row, if there is one."""
    END = 11
    """{"exit_code": int | None, "cause": str}: the writer's last word. exit_code None: this writer ends, the run does not."""
    ARTIFACT = 12
    """One artifact to log: `run.artifact_logging.ArtifactRecord`."""
    ALERT = 13
    """One `Run.alert`: {"title", "text", "level", "wait" (seconds), "_step" (of the row that is open then)}."""
    PHASE = 14
    """A mark of the attempt's timeline: `core.goodput.Mark`."""
    SCHEMA = 32
    """Internal: keys and types of packed rows."""
    ROW_PACKED = 33
    """Internal: a packed row that leaves its step open."""
    ROW_PACKED_COMMIT = 34
    """Internal: a packed row that closes its step."""


class FeedFacts(msgspec.Struct, frozen=True):
    """What a feed knows of the others of its attempt, for whoever makes the run of them when nobody lives any more."""

    ranks: int
    """How many feeds there are."""
    here: int
    """How many of them on its host."""
    aggregated: bool
    """Whether there was an aggregator when it began, so that the run has a journal."""


class JournalHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Facts fixed when the writer starts."""

    run_id: str
    project: str
    entity: str
    """May be '': the server's default entity for the key."""
    attempt: int
    nonce: str
    writer: str
    role: Literal["run", "feed"] = "run"
    feed: FeedFacts | None = None
    """Of a feed."""
    base: Watermark | None = None
    """What this attempt builds upon; None: nothing, unless `at_step` says otherwise."""
    base_run: str = ""
    """The run (id or immutable id) in which `base` or `at_step` counts; '' is this one."""
    at_step: int | None = None
    """Build upon the rows up to this step, inclusive; for a history that only the server knows."""
    fresh: tuple[str, ...] = ()
    """Streams that start empty although history continues."""
    behind: int | None = None
    """The first step of a run that was to go on where nobody could tell what there is of it: whoever sends it begins an attempt
    behind what the server has then, and later segments behind that one (`shipper/placing.py`)."""
    root: str = ""
    """Of such a later segment: the nonce of the first one."""
    primary: bool = True
    """Whether this writer says what the run is; False: one of several, whose rows alone count."""
    cause: str = ""
    """Why this attempt exists: 'start', 'preempted', 'lost', ..."""
    rank: int = 0
    host: str = ""
    pid: int = 0
    created: float = 0.0
    """Unix seconds at which `_runtime` began to count in this attempt."""
    online: bool = False
    """False: the shipper leaves this journal to `wbdist sync`."""
    base_url: str = ""
    """Where the run goes, when known at the start."""
    data_dir: str = ""
    """Of the embedded server at `base_url`: where its address is found when it has come back on another port."""
    runtime: float = 0.0
    """Seconds of `_runtime` before this attempt."""
    summary: dict[str, Any] = {}
    """The run's summary at the base."""
    copied: bool = False
    """Brought back from a checkpoint: the original's frames up to the checkpoint's cut. How its writer ended is not in here."""

    @property
    def starting_step(self) -> int:
        """The first step this attempt may log."""
        if self.at_step is not None:
            return self.at_step + 1
        return self.base.step + 1 if self.base is not None else 0


def begin_request(header: JournalHeader) -> BeginAttempt:
    """What a journal asks of the server before its first line: of its header alone, so that asking again changes nothing."""
    return BeginAttempt(
        header.attempt,
        header.nonce,
        header.writer,
        header.base,
        header.cause,
        header.base_run,
        header.at_step,
        header.fresh,
        started=header.created,
    )


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record as read back. `seq` grows by one a frame; the reader hides SCHEMA frames, so numbers may be skipped."""

    seq: int
    kind: Kind
    time: float
    step: int | None
    """Rows only: the step asked for, None when the caller gave none."""
    commit: bool | None
    """Rows only."""
    data: dict[str, Any]


class Schema:
    """Keys and types of packed rows: made by the writer at a shape's first row, by a reader from the SCHEMA frame."""

    __slots__ = ("codes", "framed", "keys", "number", "packed", "plain", "types", "unpack")

    CODES: Final = {float: "d", int: "q", bool: "?", str: "s", type(None): "n"}
    _TYPES: Final = {code: kind for kind, code in CODES.items()}
    _STRUCT: Final = {"d": "d", "q": "q", "?": "?", "s": "I", "n": ""}

    def __init__(self, number: int, keys: tuple[str, ...], codes: str) -> None:
        self.number = number
        self.keys = keys
        self.codes = codes
        self.types = tuple(self._TYPES[code] for code in codes)
        values = "".join(self._STRUCT[code] for code in codes)
        self.packed = struct.Struct(f"<IBHId{values}")
        self.framed = struct.Struct(f"<IIIBHId{values}")
        """A whole frame, as `PackedRows` has it."""
        self.unpack = struct.Struct(f"<{values}")
        self.plain = not set(codes) & {"s", "n"}
        """Every value has a fixed place: the row is one `pack` of the dict's values."""

    def describe(self) -> bytes:
        """Payload of the SCHEMA frame."""
        return msgspec.msgpack.encode((self.number, self.codes, self.keys))

    @classmethod
    def parse(cls, payload: bytes | memoryview) -> Schema:
        number, codes, keys = msgspec.msgpack.decode(payload, type=tuple[int, str, tuple[str, ...]])
        return cls(number, keys, codes)

    def encode(self, seq: int, kind: int, step: int, time: float, values: tuple[Any, ...]) -> bytes:
        """A packed row's body. Raises struct.error for a step or an int that does not fit (the caller then writes a ROW)."""
        if self.plain:
            return self.packed.pack(seq, kind, self.number, step, time, *values)
        fixed: list[Any] = []
        tail: list[bytes] = []
        for code, value in zip(self.codes, values, strict=True):
            if code == "s":
                text = value.encode()
                fixed.append(len(text))
                tail.append(text)
            elif code != "n":
                fixed.append(value)
        return self.packed.pack(seq, kind, self.number, step, time, *fixed) + b"".join(tail)

    def decode(self, frames: memoryview, at: int) -> dict[str, Any]:
        """The row's data; its values begin at `at`."""
        fixed = self.unpack.unpack_from(frames, at)
        if self.plain:
            return dict(zip(self.keys, fixed, strict=True))
        at += self.unpack.size
        values = iter(fixed)
        data: dict[str, Any] = {}
        for key, code in zip(self.keys, self.codes, strict=True):
            if code == "n":
                data[key] = None
            elif code == "s":
                size = next(values)
                data[key] = str(frames[at : at + size], "utf-8")
                at += size
            else:
                data[key] = next(values)
        return data


def encode_header(header: JournalHeader) -> bytes:
    facts = msgspec.json.encode(header)
    return _HEADER.pack(MAGIC, VERSION, len(facts), zlib.crc32(facts, len(facts))) + facts


def decode_header(data: bytes, name: str) -> tuple[JournalHeader, int]:
    """The header and the offset of the first frame. Raises JournalCorruptError naming `name`."""
    if len(data) < _HEADER.size or data[: len(MAGIC)] != MAGIC:
        raise JournalCorruptError(f"{name} is not a wbdist journal: it does not begin with {MAGIC!r}")
    _, version, length, check = _HEADER.unpack_from(data)
    if version != VERSION:
        raise JournalCorruptError(f"{name} has journal version {version}; this wbdist reads version {VERSION}: upgrade it")
    facts = data[_HEADER.size : _HEADER.size + length]
    if len(facts) < length or zlib.crc32(facts, length) != check:
        raise JournalCorruptError(f"{name}: the header is incomplete or damaged")
    return msgspec.json.decode(facts, type=JournalHeader), _HEADER.size + length


def header_size(data: bytes) -> int:
    """Bytes the whole header takes, from its first 18; 18 itself when these do not say."""
    return _HEADER.size + (_HEADER.unpack_from(data)[2] if len(data) >= _HEADER.size and data[:8] == MAGIC else 0)


def encode_frame(body: bytes) -> bytes:
    """Frames a body (seq, kind, payload)."""
    size = len(body)
    return FRAME_HEAD.pack(size, zlib.crc32(body, size)) + body


def encode_record(seq: int, kind: Kind, fields: tuple[Any, ...]) -> bytes:
    """A MessagePack record as a frame. Raises TypeError, OverflowError or UnicodeEncodeError for what it cannot hold."""
    return encode_frame(BODY_HEAD.pack(seq, kind) + msgspec.msgpack.encode(fields))


def verified_end(data: bytes | memoryview, at: int, seq: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each verified frame's body in `data` from `at`, as long as they verify and count on from `seq`."""
    size = len(data)
    view = memoryview(data)
    while at + FRAME_OVERHEAD <= size:
        length, check, found = _FRAME.unpack_from(view, at)
        start = at + 8
        at = start + length
        if length < 5 or length > MAX_FRAME or at > size or found != seq & 0xFFFFFFFF:
            return
        if zlib.crc32(view[start:at], length) != check:
            return
        yield start, at
        seq += 1


class PackedRows(NamedTuple):
    """Rows of one schema, one behind the other in the journal: (length, check, seq, kind, schema, step, time, *values)."""

    schema: Schema
    rows: list[tuple[Any, ...]]


KIND_AT: Final = 3
STEP_AT: Final = 5
TIME_AT: Final = 6
VALUES_AT: Final = 7
_FRAMED_HEAD: Final = struct.Struct("<IIIBH")


class FrameDecoder:
    """Frames to records, in order; remembers the schemas it has seen. For readers, and for whoever is sent frames."""

    def __init__(self) -> None:
        self.seq = 0
        """The next frame expected."""
        self._schemas: dict[int, Schema] = {}

    def decode(self, frames: bytes | memoryview, at: int = 0) -> tuple[list[Record], int]:
        """The records of the verified frames from `at`, and where the first unverified byte lies."""
        records: list[Record] = []
        view = memoryview(frames)
        schemas = self._schemas
        for start, end in verified_end(view, at, self.seq):
            number = view[start + 4]
            if number == _COMMITTED or number == _OPEN:  # noqa: SIM109, PLR1714  (the common case, and faster so)
                seq, _, schema, step, time = PACKED_HEAD.unpack_from(view, start)
                data = schemas[schema].decode(view, start + PACKED_HEAD.size)
                records.append(Record(seq, Kind.ROW, time, step, number == _COMMITTED, data))
            else:
                self._add(view[start:end], records)
            self.seq += 1
            at = end
        return records, at

    def decode_rows(self, frames: bytes | memoryview, at: int = 0) -> tuple[list[Record | PackedRows], int]:
        """As `decode`, with packed rows of fixed size left as they are; about a microsecond for one of those."""
        found: list[Record | PackedRows] = []
        view = memoryview(frames)
        while (end := self._packed_rows(view, at, found)) > at or (end := self._record(view, at, found)) > at:
            at = end
        return found, at

    def _packed_rows(self, view: memoryview, at: int, found: list[Record | PackedRows]) -> int:
        """The verified rows of one schema that begin at `at`, if any do; where they end."""
        if at + FRAME_OVERHEAD + 2 > len(view):
            return at
        _, _, _, kind, number = _FRAMED_HEAD.unpack_from(view, at)
        if not _OPEN <= kind <= _COMMITTED or (schema := self._schemas.get(number)) is None or not schema.plain:
            return at
        size = schema.framed.size
        length = size - FRAME_HEAD.size
        rows: list[tuple[Any, ...]] = []
        seq, add = self.seq, rows.append
        for row in schema.framed.iter_unpack(view[at : at + (len(view) - at) // size * size]):
            end = at + size
            if row[0] != length or row[2] != seq & 0xFFFFFFFF or not _OPEN <= row[3] <= _COMMITTED or row[4] != number:
                break
            if zlib.crc32(view[end - length : end], length) != row[1]:
                break
            add(row)
            at = end
            seq += 1
        self.seq = seq
        if rows:
            found.append(PackedRows(schema, rows))
        return at

    def _record(self, view: memoryview, at: int, found: list[Record | PackedRows]) -> int:
        """The verified frame at `at`, if there is one; where it ends."""
        for start, end in verified_end(view, at, self.seq):
            records: list[Record] = []
            if _OPEN <= view[start + 4] <= _COMMITTED:
                seq, kind, number, step, time = PACKED_HEAD.unpack_from(view, start)
                data = self._schemas[number].decode(view, start + PACKED_HEAD.size)
                records.append(Record(seq, Kind.ROW, time, step, kind == _COMMITTED, data))
            else:
                self._add(view[start:end], records)
            found += records
            self.seq += 1
            return end
        return at

    def _add(self, body: memoryview, records: list[Record]) -> None:
        """A record of any kind but a packed row."""
        seq, number = BODY_HEAD.unpack_from(body)
        payload = body[BODY_HEAD.size :]
        if number == Kind.SCHEMA:
            parsed = Schema.parse(payload)
            self._schemas[parsed.number] = parsed
        elif number == Kind.ROW:
            time, step_asked, commit, data = msgspec.msgpack.decode(payload)
            records.append(Record(seq, Kind.ROW, time, step_asked, commit, data))
        elif number in _KNOWN:
            time, data = msgspec.msgpack.decode(payload)
            records.append(Record(seq, Kind(number), time, None, None, data))


_KNOWN: Final = frozenset(int(kind) for kind in Kind)
_OPEN: Final = int(Kind.ROW_PACKED)
_COMMITTED: Final = int(Kind.ROW_PACKED_COMMIT)
