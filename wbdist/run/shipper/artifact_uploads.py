"""The artifacts of one journal on their way: W&B's steps, each of which may be repeated.

Create (the client's id makes a second one the same), ask where contents go, PUT those that the server has not, PUT the
manifest, commit. The commit makes it the next version and moves its aliases, so a kill before it leaves nothing to be seen.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from wbdist.protocol import artifacts as protocol
from wbdist.protocol.artifacts import FileSlot, Manifest, ManifestEntry
from wbdist.protocol.attempts import FileStamp
from wbdist.run.artifact_record import STAGED, ArtifactRecord
from wbdist.run.journal import JournalHeader
from wbdist.run.shipper.sending import Wire, digest_of

SENT = "sent"
"""In place of an artifact's contents, once the server has them."""
BATCH = 500
"""Files whose addresses are asked for at a time."""


class ArtifactUploads:
    """Of one journal. Offered in order by the delivery's thread, sent by the uploader's."""

    def __init__(self, header: JournalHeader, directory: Path, log: logging.Logger) -> None:
        """`directory`: where the journal lies."""
        self._header = header
        self._directory = directory
        self._log = log
        self._lock = threading.Lock()
        self._pending: list[tuple[int, ArtifactRecord]] = []
        self._offered = 0

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def offer(self, seq: int, payload: Mapping[str, Any]) -> None:
        """The ARTIFACT record number `seq`; one that was offered before is nothing new."""
        with self._lock:
            if seq >= self._offered:
                self._offered = seq + 1
                self._pending.append((seq, msgspec.convert(payload, ArtifactRecord)))

    def next(self) -> tuple[int, ArtifactRecord] | None:
        with self._lock:
            return self._pending[0] if self._pending else None

    def drop(self) -> None:
        """The first one is done with, one way or the other."""
        with self._lock:
            del self._pending[0]

    def send(self, wire: Wire, run: tuple[str, str, str], *, ours: bool, seq: int, record: ArtifactRecord) -> None:
        """Brings one artifact to the server. Raises what `Wire` does, and OSError for contents that cannot be read."""
        staged = self._place(record)
        try:
            if not (staged / SENT).exists():
                self._send(wire, run, staged, seq if ours else None, record)
        except FileNotFoundError:
            if not (staged / SENT).exists():  # else another process, like `wbdist sync`, was faster
                raise

    def _send(self, wire: Wire, run: tuple[str, str, str], staged: Path, seq: int | None, record: ArtifactRecord) -> None:
        """`seq`: in the stream of artifacts, for our own server."""
        header = self._header
        stamp = None if seq is None else FileStamp(header.attempt, header.nonce, header.writer, seq, record.step)
        manifest = msgspec.json.decode((staged / "manifest.json").read_bytes(), type=Manifest)
        created = wire.ask(
            protocol.create(
                run,
                type=record.type,
                name=record.name,
                digest=record.digest,
                client_id=record.client_id,
                aliases=record.aliases,
                description=record.description,
                metadata=record.metadata,
                stamp=stamp,
            ),
            protocol.read_created,
        )
        if not created.committed:
            self._fill(wire, run, created.id, staged, manifest)
        self._log.info("artifact %s of run %s is on the server", record.name, run[2])
        (staged / SENT).touch()
        for path in staged.iterdir():
            if path.name != SENT:
                path.unlink(missing_ok=True)

    def _fill(self, wire: Wire, run: tuple[str, str, str], artifact: str, staged: Path, manifest: Manifest) -> None:
        slot = wire.ask(protocol.create_manifest(run, artifact, "", upload=False), protocol.read_manifest_slot)
        contents = manifest.contents
        numbered = [(number, name) for number, name in enumerate(sorted(contents)) if contents[name].ref is None]
        for first in range(0, len(numbered), BATCH):
            batch = numbered[first : first + BATCH]
            asked = protocol.create_files(artifact, slot.id, {name: contents[name].digest for _, name in batch})
            places = {place.name: place for place in wire.ask(asked, protocol.read_file_slots)}
            for number, name in batch:
                contents[name] = self._put_one(wire, staged / str(number), places[name], contents[name])
        whole = staged / "manifest.sent.json"
        whole.write_bytes(msgspec.json.encode(manifest))
        with whole.open("rb") as file:
            asked = protocol.create_manifest(run, artifact, digest_of(file), upload=True)
            slot = wire.ask(asked, protocol.read_manifest_slot)
            wire.put("the manifest", slot.url, file, protocol.headers(slot.headers))
        wire.ask(protocol.commit(artifact), lambda data: data)

    def _put_one(self, wire: Wire, path: Path, slot: FileSlot, entry: ManifestEntry) -> ManifestEntry:
        if slot.url:
            with path.open("rb") as file:
                wire.put(slot.name, slot.url, file, slot.headers)
        return msgspec.structs.replace(entry, birth=slot.birth)

    def _place(self, record: ArtifactRecord) -> Path:
        """Also when the run's directory has been moved since."""
        path = Path(record.staged)
        return path if path.exists() else self._directory / STAGED / path.name
