"""The whole server in this process, behind the shipper's own way of asking it; with a clock, restarts and faults on demand.

    world = World(directory)
    journal = world.journal(attempt=1)            a real journal, its writer alive
    delivery = world.delivery(journal)            the shipper's real delivery of it
    delivery.step(world.now)

Requests go through the real ASGI app, request by request on this thread, so that a run of thousands of them is repeatable.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from wbdist.core.position import CONSOLE, HISTORY, Watermark
from wbdist.run.journal import JournalHeader, JournalReader, JournalWriter, journal_name
from wbdist.run.shipper.delivery import Delivery, Pace
from wbdist.run.shipper.lines import Translator
from wbdist.run.shipper.oneshot import Synced, ship
from wbdist.run.shipper.remote import Answer, Remote, UnreachableError
from wbdist.server.app import create_app
from wbdist.server.auth import Auth
from wbdist.server.context import AppContext
from wbdist.server.files import FileStore
from wbdist.server.keys import ADMIN_KEY_FILE, open_key_ring
from wbdist.server.settings import ServerSettings
from wbdist.server.store import open_store
from wbdist.server.store.interface import AttemptRow, RunRow

URL = "http://127.0.0.1:1"
Fault = Literal["", "drop", "drop-after", "twice"]
"""What happens to a request: lost on the way there; lost on the way back; arrives twice."""
log = logging.getLogger("wbdist.test")


class World:
    """One server, one run `r` in project `p`, and journals below `directory`. `close` it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = 1_800_000_000.0
        self.fault: Callable[[], Fault] = lambda: ""
        """Asked before each request."""
        self.arrived: list[tuple[str, bytes]] = []
        """Every request that the server got."""
        self.writers: list[JournalWriter] = []
        self._runner = asyncio.Runner()
        self._places = itertools.count()
        directory.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        data = self.directory / "server"
        data.mkdir(exist_ok=True)
        settings = ServerSettings()
        auth = Auth(open_key_ring(data, settings.entity), settings, lambda: self.now)
        store = open_store(f"sqlite:///{data / 'wbdist.db'}")
        self.key = (data / ADMIN_KEY_FILE).read_text().strip()
        self.ctx = AppContext(store, auth, FileStore(data / "files"), settings, lambda: self.now, URL)
        self._app = create_app(self.ctx)

    def restart(self) -> None:
        """The server forgets what it did not store."""
        self.ctx.store.close()
        self._open()

    def close(self) -> None:
        for writer in self.writers:
            writer.close(0)
        self.ctx.store.close()
        self._runner.close()

    # The wire -------------------------------------------------------------------------------------------

    def post(self, path: str, body: bytes) -> Answer:
        """One request to the app, as it is."""
        return self._runner.run(self._request(path, body))

    async def _request(self, path: str, body: bytes) -> Answer:
        credentials = base64.b64encode(f"api:{self.key}".encode())
        headers = [
            (b"host", b"127.0.0.1:1"),
            (b"authorization", b"Basic " + credentials),
            (b"content-type", b"application/json"),
        ]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
        scope |= {"http_version": "1.1", "scheme": "http", "query_string": b"", "root_path": "", "server": ("127.0.0.1", 1)}
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        status, parts = 0, []

        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        await self._app(scope, receive, send)
        return Answer(status, b"".join(parts))

    def remote(self) -> Remote:
        return _AppRemote(self)

    # Clients --------------------------------------------------------------------------------------------

    def journal(
        self, attempt: int, *, run_id: str = "r", writer: str = "rank0", nonce: str = "", **facts: Any
    ) -> JournalWriter:
        """A fresh one in a directory of its own."""
        directory = self.directory / "wandb" / f"run-{next(self._places)}"
        directory.mkdir(parents=True)
        facts = {"created": self.now, "online": True, "base_url": URL, "entity": "", **facts}
        header = JournalHeader(
            run_id=run_id, project="p", attempt=attempt, nonce=nonce or f"n{attempt}", writer=writer, **facts
        )
        made = JournalWriter.create(directory / journal_name(writer, attempt), header)
        self.writers.append(made)
        return made

    def delivery(self, journal: JournalWriter) -> Delivery:
        return Delivery(journal.path, self.remote(), log, Pace(poll=0.0, ours=0.0, foreign=0.0))

    def lose(self, journal: JournalWriter) -> None:
        """As if its process had been killed: no end in it, and its lock is free."""
        journal._release()
        self.writers.remove(journal)

    def sync(self, journals: list[Path]) -> list[Synced]:
        """`wbdist sync` of these, one after the other in the order given."""
        return [result for path in journals for result in ship([path], lambda _: self.remote(), 10.0, log)]

    # What the server shows ------------------------------------------------------------------------------

    @property
    def run(self) -> RunRow | None:
        return self.run_called("r")

    def run_called(self, run_id: str) -> RunRow | None:
        return self.ctx.store.get_run("local", "p", run_id)

    def rows(self, attempt: int | None = None, nonce: str | None = None, run_id: str = "r") -> list[dict[str, Any]]:
        """Of the live view; of one attempt's; or what a rival of that attempt sent."""
        run = self.run_called(run_id)
        return [] if run is None else self.ctx.store.history(run.pk, attempt=attempt, nonce=nonce)

    def console(self, run_id: str = "r") -> list[str]:
        """Of the live view, without times."""
        run = self.run_called(run_id)
        lines = [] if run is None else self.ctx.store.console(run.pk, limit=10_000)
        return [line.partition(" ")[2] for line in lines]

    def attempts(self) -> dict[int, AttemptRow]:
        run = self.run
        return {} if run is None else {entry.attempt: entry for entry in self.ctx.store.attempts(run.pk)}


class _AppRemote(Remote):
    """A way to the world's app on which requests can be lost, or doubled."""

    def __init__(self, world: World) -> None:
        super().__init__(URL, world.key)
        self._world = world

    def post(self, path: str, body: bytes) -> Answer:
        world = self._world
        fault = world.fault()
        if fault == "drop":
            raise UnreachableError("lost on the way there")
        world.arrived.append((path, body))
        answer = world.post(path, body)
        if fault == "twice":
            answer = world.post(path, body)
        if fault == "drop-after":
            raise UnreachableError("lost on the way back")
        return answer


def lines_of(path: Path) -> dict[str, list[str]]:
    """stream -> the lines of a journal, as the shipper makes them."""
    with JournalReader.open(path) as reader:
        translator = Translator(reader.header)
        while records := reader.read():
            translator.feed(records)
        translator.close_row()
        return translator.lines


def cut(journals: list[JournalWriter], step: int) -> Watermark:
    """What a checkpoint after `step` would pin, of the writers of one attempt. Their rows have to be committed."""
    rows, printed = {}, {}
    for journal in journals:
        lines = lines_of(journal.path)
        rows[journal.header.writer] = sum(msgspec.json.decode(line)["_step"] <= step for line in lines[HISTORY])
        printed[journal.header.writer] = len(lines[CONSOLE])
    return Watermark(journals[0].header.attempt, {HISTORY: rows, CONSOLE: printed}, step)
