"""Live updates: which runs changed, as Server-Sent Events. What changed the page asks for itself.

The store is asked, not told: with several server processes on one database, another process may have stored the lines.
All pages that look at the same runs share one watch. A page that reads slowly, or not at all, holds back nothing: what it
has not read yet is one number a run, overwritten by the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec
import orjson
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from wbdist.server.store.interface import Store

_log = logging.getLogger(__name__)

_INTERVAL = 0.5
"""Seconds between two looks at the store."""
_SHARE = 10
"""A look that takes long makes the next one wait this many times as long: watching costs at most 10 % of a core a watch."""
_BEAT = 10.0
"""Seconds between signs of life. An event rather than a comment: browsers hide comments, and the page has to notice silence."""
_LIFE = 900.0
"""Seconds until a stream ends and the browser asks again, so that a login that ended ends this too."""
_MAX_STREAMS = 256
"""In one process; more are told to come back."""


class Watched(msgspec.Struct, frozen=True):
    """The runs that a page shows: one run, one group, or (neither given) a project."""

    entity: str
    project: str
    group: str | None = None
    run: str | None = None

    def versions(self, store: Store) -> dict[str, int]:
        """run id -> version, now. Blocks on the database."""
        if self.run is not None:
            found = store.find_run(self.entity, self.project, self.run)
            return {found.run_id: found.version} if found else {}
        return {row.run_id: row.version for row in store.list_runs(self.entity, self.project, group=self.group)}


class TooManyStreamsError(Exception):
    """The process has as many live streams as it is allowed."""


class LiveUpdates:
    """The watches of one server process. Only to be used on its event loop."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self.clock = clock
        self._watches: dict[Watched, _Watch] = {}
        self.stopping = asyncio.Event()
        """Set when the server stops: every stream ends at once, and the pages come back when it is there again."""

    def stream(self, watched: Watched) -> Response:
        """The answer to a page that wants to know about `watched`. Raises TooManyStreamsError."""
        if sum(len(watch.pages) for watch in self._watches.values()) >= _MAX_STREAMS:
            raise TooManyStreamsError
        return EventStream(self, watched)

    def join(self, watched: Watched) -> Page:
        watch = self._watches.get(watched)
        if watch is None:
            watch = self._watches[watched] = _Watch()
            watch.task = asyncio.create_task(self._look(watched, watch))
        page = Page()
        page.offer(watch.versions)
        watch.pages.add(page)
        return page

    def leave(self, watched: Watched, page: Page) -> None:
        watch = self._watches[watched]
        watch.pages.discard(page)
        if not watch.pages:
            del self._watches[watched]
            assert watch.task is not None
            watch.task.cancel()

    async def _look(self, watched: Watched, watch: _Watch) -> None:
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                versions = await run_in_threadpool(watched.versions, self._store)
            except Exception:  # noqa: BLE001 - a database that is away for a while must not end the watch
                _log.exception("looking for changed runs failed; trying again")
            else:
                changed = {run: version for run, version in versions.items() if watch.versions.get(run) != version}
                watch.versions = versions
                if changed:
                    for page in watch.pages:
                        page.offer(changed)
            await asyncio.sleep(max(_INTERVAL, _SHARE * (loop.time() - started)))


class _Watch:
    def __init__(self) -> None:
        self.pages: set[Page] = set()
        self.versions: dict[str, int] = {}
        self.task: asyncio.Task[None] | None = None


class Page:
    """One open page: what it has not been told yet."""

    def __init__(self) -> None:
        self._untold: dict[str, int] = {}
        self._news = asyncio.Event()

    def offer(self, versions: dict[str, int]) -> None:
        if versions:
            self._untold.update(versions)
            self._news.set()

    async def take(self) -> dict[str, int]:
        """What changed since the last call; empty after `_BEAT` seconds without a change."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_BEAT):
                await self._news.wait()
        self._news.clear()
        untold, self._untold = self._untold, {}
        return untold


class EventStream(Response):
    """`event: versions` with {run id: version}: all of them first, then those that changed; `event: beat` in between.

    Both carry the server's time in `id`, for pages whose clock is wrong.
    """

    media_type = "text/event-stream"

    def __init__(self, updates: LiveUpdates, watched: Watched) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._updates = updates
        self._watched = watched

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"retry: 1000\n\n", "more_body": True})
        page = self._updates.join(self._watched)
        telling = asyncio.create_task(self._tell(page, send))
        leaving = asyncio.create_task(_disconnected(receive))
        stopping = asyncio.create_task(self._updates.stopping.wait())
        try:
            # uvicorn cancels the requests that outlast a stop's grace: for a stream an ordinary end, no failure to log.
            with suppress(asyncio.CancelledError):
                await asyncio.wait({telling, leaving, stopping}, timeout=_LIFE, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._updates.leave(self._watched, page)
            for task in (telling, leaving, stopping):
                task.cancel()
            await asyncio.gather(telling, leaving, stopping, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, page: Page, send: Send) -> None:
        while True:
            versions = await page.take()
            name = b"versions" if versions else b"beat"
            event = b"id: %.3f\nevent: %s\ndata: %s\n\n" % (self._updates.clock(), name, orjson.dumps(versions))
            await send({"type": "http.response.body", "body": event, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
