"""The files of one journal on their way to the server, beside its lines: never before them, never in their way.

FILE records are versions of files in order. A version is PUT with its stamp, so sending it twice changes nothing; where to go
on after a restart is asked from the server, as for lines. While the writer lives, a live file that it writes without
calling `save` again is sent too, as the line of a writer of its own (`<writer>.live`), once it has been left alone for a
while. After the writer's death no such change is believed: it may be half a file.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from wbdist.protocol import files as protocol
from wbdist.protocol import operations
from wbdist.protocol.attempts import STAMP_HEADER, FileStamp
from wbdist.run.artifact_record import ArtifactRecord
from wbdist.run.files import STAGED, FileRecord
from wbdist.run.journal import JournalHeader
from wbdist.run.shipper.artifact_uploads import ArtifactUploads
from wbdist.run.shipper.remote import Remote, UnreachableError
from wbdist.run.shipper.sending import AgainError, ChangedError, FailedError, Wire, digest_of
from wbdist.run.snapshots import Key, key_of

BATCH = 100
"""Versions for which addresses are asked at a time."""
WATCH_SECONDS = 0.5
"""Between looks at live files."""
QUIET_LOOKS = 2
"""A live file that looks the same so many times on end is taken for written."""
RETRY_MIN, RETRY_MAX = 0.25, 5.0


class Version(msgspec.Struct):
    """One version that waits."""

    seq: int
    writer: str
    record: FileRecord


class _Watched(msgspec.Struct):
    source: Path
    sent: Key | None
    seen: Key | None = None
    looks: int = 0


class Uploads:
    """Of one journal. `offer`, `begin`, `end` are the delivery's thread's, `step` the uploader's; the rest anybody's."""

    def __init__(self, header: JournalHeader, directory: Path, log: logging.Logger) -> None:
        """`directory`: where the journal lies."""
        self._header = header
        self._directory = directory
        self._log = log
        self.artifacts = ArtifactUploads(header, directory, log)
        self._lock = threading.Lock()
        self._pending: list[Version] = []
        self._offered = 0
        self._skip = 0
        self._live_seq = 0
        self._begun = False
        self._ended = False
        self._lost = False
        self._ours = False
        self._entity = header.entity
        self._project = header.project
        self._known: dict[str, str] = {}
        """name -> MD5 (base64) of what the server has."""
        self._watched: dict[str, _Watched] = {}
        self._newest: dict[str, int] = {}
        self._uploaded: list[str] = []
        self._tries = 0
        self.due = 0.0
        """When `step` has something to do next."""
        self.failed: dict[str, str] = {}
        """name -> why it did not arrive."""
        self.progress = 0
        """Grows as long as there is progress."""
        self.trouble = ""

    @property
    def busy(self) -> bool:
        """Whether a version is still to come. Those with policy `end` wait for the journal's end."""
        with self._lock:
            return self._begun and (self.artifacts.pending or any(self._ready(version) for version in self._pending))

    @property
    def watching(self) -> bool:
        return self._begun and not self._ended and bool(self._watched)

    @property
    def error(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.failed.items())

    def offer(self, seq: int, payload: Mapping[str, Any]) -> None:
        """The FILE record number `seq` of the journal; one that was offered before is nothing new."""
        with self._lock:
            if seq < self._offered:
                return
            self._offered = seq + 1
            record = msgspec.convert(payload, FileRecord)
            self._newest[record.name] = seq
            if record.policy == "live":
                self._watched[record.name] = _Watched(Path(record.source), record.key)
            else:
                self._watched.pop(record.name, None)
            self._pending.append(Version(seq, self._header.writer, record))
            self.due = 0.0

    def begin(self, entity: str, project: str, *, ours: bool, have: Mapping[str, int]) -> None:
        """The server knows the run. `have`: writer -> versions of this attempt that it has."""
        with self._lock:
            self._entity, self._project, self._ours = entity, project, ours
            self._skip = have.get(self._header.writer, 0)
            self._live_seq = have.get(self._live_writer, 0)
            self._begun = True

    def end(self, *, lost: bool = False) -> None:
        """The writer has ended. `lost`: without a word."""
        with self._lock:
            self._ended, self._lost = True, lost
            self.due = 0.0

    def take_uploaded(self) -> list[str]:
        """Names that arrived since the last call, for the server's `uploaded`."""
        with self._lock:
            taken, self._uploaded = self._uploaded, []
            return taken

    def step(self, remote: Remote, now: float, writer_alive: Callable[[], bool]) -> None:
        """Sends what waits, a batch at most; sets `due`. Blocks as long as its requests do."""
        batch = self._batch()
        wire = Wire(remote)
        try:
            if self.watching:
                self._look(writer_alive)
            if batch:
                self._send(wire, batch)
            elif self._begun and (artifact := self.artifacts.next()) is not None:
                self._send_artifact(wire, *artifact)
            if self._tries:
                self._log.info("files of run %s: the server is back after %d failed tries", self._header.run_id, self._tries)
            self._tries, self.trouble = 0, ""
            self.due = 0.0 if self.busy else now + WATCH_SECONDS
        except (UnreachableError, AgainError, ChangedError) as error:
            self._tries += 1
            self.trouble = str(error)
            wait = min(RETRY_MAX, RETRY_MIN * 2 ** min(self._tries - 1, 10)) * random.uniform(1.0, 1.25)
            self.due = now + wait
            if self._tries in {1, 10, 100} or self._tries % 1000 == 0:
                self._log.warning("files of run %s: %s (try %d)", self._header.run_id, error, self._tries)
        except FailedError as error:
            for version in batch:
                self._fail(version, str(error))
        except Exception as error:  # noqa: BLE001  (said; the thread sends the files of other journals, too)
            self.trouble, self.due = self._fault(error), now + RETRY_MAX
            for version in batch:
                if version in self._pending:
                    self._fail(version, self.trouble)

    def _send_artifact(self, wire: Wire, seq: int, record: ArtifactRecord) -> None:
        try:
            self.artifacts.send(wire, self._run, ours=self._ours, seq=seq, record=record)
        except (UnreachableError, AgainError, ChangedError):
            raise
        except Exception as error:  # noqa: BLE001  (said; what comes behind it is sent all the same)
            reason = str(error) if isinstance(error, FailedError | OSError) else self._fault(error)
            self._log.error("artifact %s of run %s is not uploaded: %s", record.name, self._header.run_id, reason)
            self.failed[f"artifact {record.name}"] = reason
        self.artifacts.drop()
        self.progress += 1

    @property
    def _run(self) -> tuple[str, str, str]:
        return self._entity, self._project, self._header.run_id

    @property
    def _live_writer(self) -> str:
        return f"{self._header.writer}.live"

    def _ready(self, version: Version) -> bool:
        return version.record.policy != "end" or self._ended

    def _batch(self) -> list[Version]:
        with self._lock:
            if not self._begun:
                return []
            self._pending = [version for version in self._pending if not self._arrived(version)]
            return [version for version in self._pending if self._ready(version)][:BATCH]

    def _arrived(self, version: Version) -> bool:
        """Whether an earlier shipper has sent it, or had given it up for a newer one. The newest version of a file is sent
        all the same, if the server has other contents: what the server counts says nothing of those that came out of turn."""
        ours = version.writer == self._header.writer
        return ours and version.seq < self._skip and self._newest[version.record.name] > version.seq

    def _look(self, writer_alive: Callable[[], bool]) -> None:
        """Makes versions of live files that were written without `save`, and are left alone now."""
        for name, watched in list(self._watched.items()):
            try:
                key = key_of(watched.source.stat())
            except OSError:
                continue  # being replaced
            if key == watched.sent:
                watched.looks = 0
                continue
            watched.looks = watched.looks + 1 if key == watched.seen else 1
            watched.seen = key
            if watched.looks < QUIET_LOOKS or not writer_alive():
                continue
            with self._lock:
                if any(version.record.name == name for version in self._pending):
                    continue
                record = FileRecord(str(watched.source), name, "live", str(watched.source), key)
                self._pending.append(Version(self._live_seq, self._live_writer, record))
                self._live_seq += 1
            watched.sent = key

    # The wire -----------------------------------------------------------------------------------------

    def _send(self, wire: Wire, batch: list[Version]) -> None:
        names = list(dict.fromkeys(version.record.name for version in batch))
        if unknown := [name for name in names if name not in self._known]:
            asked = protocol.run_files(*self._run, names=unknown, limit=len(unknown))
            page = wire.ask(asked, protocol.read_run_files)
            self._known.update(dict.fromkeys(unknown, ""))
            self._known.update({file.name: file.md5 for file in (page.files if page else ())})
        slots = wire.ask(protocol.create_run_files(*self._run, names), protocol.read_upload_slots)
        changed: ChangedError | None = None
        for version in batch:
            try:
                self._send_one(wire, version, slots)
            except FailedError as error:
                self._fail(version, str(error))
            except ChangedError as error:
                changed = error
            except (UnreachableError, AgainError):
                raise
            except Exception as error:  # noqa: BLE001  (said; the others of the batch are sent all the same)
                self._fail(version, self._fault(error))
        if changed is not None:
            raise changed

    def _send_one(self, wire: Wire, version: Version, slots: operations.UploadSlots) -> None:
        record = version.record
        try:
            with self._place(record).open("rb") as file:
                if self._believable(version, file):
                    self._put(wire, version, file, slots)
        except FileNotFoundError:
            # An older version gave way to a newer one, or a live file is being replaced.
            if version.writer == self._header.writer and self._newest[record.name] == version.seq:
                raise FailedError(f"{record.path} is gone") from None
        except OSError as error:
            raise FailedError(str(error)) from error
        self._done(version)

    def _place(self, record: FileRecord) -> Path:
        """Where the contents lie, also when the run's directory has been moved since."""
        path = Path(record.path)
        if path.exists():
            return path
        moved = self._directory / (Path(STAGED, path.name) if path.parent.name == STAGED else Path("files", record.name))
        return moved if moved.exists() else path

    def _believable(self, version: Version, file: IO[bytes]) -> bool:
        """Whether what lies there is whole: of a file read in place, that its writer lives, or has not touched it since."""
        record = version.record
        if record.path != record.source or record.key in {None, key_of(os.fstat(file.fileno()))}:
            return True
        if version.writer == self._header.writer:
            if self._lost:
                raise FailedError(f"{record.path} was changed after it was saved, and the writer died: it may be half a file")
            return True
        if (watched := self._watched.get(record.name)) is not None:
            watched.sent = None  # look again
        return False

    def _put(self, wire: Wire, version: Version, file: IO[bytes], slots: operations.UploadSlots) -> None:
        name = version.record.name
        if self._known.get(name, "0") not in {"", "0"} and digest_of(file) == self._known[name]:
            return
        url = slots.urls.get(name)
        if url is None:
            return  # the server needs no contents
        headers = dict(slots.headers)
        if self._ours:
            header = self._header
            stamp = FileStamp(header.attempt, header.nonce, version.writer, version.seq, version.record.step)
            headers[STAMP_HEADER] = stamp.header()
        self._known[name] = wire.put(name, url, file, headers)
        self.progress += 1
        with self._lock:
            self._uploaded.append(name)

    def _done(self, version: Version) -> None:
        with self._lock:
            self._pending.remove(version)
        self.progress += 1
        self._drop_older(version)

    def _drop_older(self, version: Version) -> None:
        """A snapshot is kept until the next version of its file has arrived: `restore` may want the newest."""
        path = self._place(version.record)
        superseded = version.writer == self._header.writer and self._newest[version.record.name] > version.seq
        if superseded and path.parent == self._directory / STAGED:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._log.warning("%s has arrived and cannot be removed: %s", path, error)

    def _fault(self, error: Exception) -> str:
        """What to say of an error that nobody has thought of; the log has its traceback. Called where it is handled."""
        self._log.exception("files of run %s: a fault of the shipper", self._header.run_id)
        return f"a fault of the shipper ({type(error).__name__}: {error}); logs/shipper.log has its traceback"

    def _fail(self, version: Version, reason: str) -> None:
        self._log.error("file %s of run %s is not uploaded: %s", version.record.name, self._header.run_id, reason)
        with self._lock:
            self.failed[version.record.name] = reason
            with suppress(ValueError):
                self._pending.remove(version)
