"""The real app under uvicorn on loopback, over a real store, and a real browser that can reach nothing else."""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

from wbdist.server.app import create_app
from wbdist.server.auth import Auth
from wbdist.server.context import AppContext
from wbdist.server.files import FileStore
from wbdist.server.keys import open_key_ring
from wbdist.server.settings import ServerSettings
from wbdist.server.store import open_store
from wbdist.server.store.interface import Store
from wbdist.server.ui.pages import STATIC

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 10_000


@dataclass
class Served:
    """A running server; `stop` and `start` keep its address and its data."""

    ctx: AppContext
    key: str
    port: int
    url: str
    _server: uvicorn.Server | None = field(default=None, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    @property
    def store(self) -> Store:
        return self.ctx.store

    def start(self) -> None:
        config = uvicorn.Config(
            create_app(self.ctx), host="127.0.0.1", port=self.port, log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start within 60 s"
            time.sleep(0.01)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(60)
            assert not self._thread.is_alive(), "the server did not stop within 60 s"
        self._server = None


def serve(data_dir: Path) -> Served:
    settings = ServerSettings()
    auth = Auth(open_key_ring(data_dir, settings.entity), settings, time.time)
    store = open_store(f"sqlite:///{data_dir / 'wbdist.db'}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    ctx = AppContext(store, auth, FileStore(data_dir / "files"), settings, time.time, url)
    served = Served(ctx, (data_dir / "admin.key").read_text().strip(), port, url)
    served.start()
    return served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for a module's tests: they use projects of their own."""
    if not (STATIC / "index.html").is_file():
        pytest.skip("the pages are not built: python hatch_build.py")
    server = serve(tmp_path_factory.mktemp("ui"))
    yield server
    server.stop()
    server.store.close()


@pytest.fixture(scope="module")  # while Playwright runs, no other test of the process can have an event loop
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Tab:
    """A page, and what went wrong in it."""

    page: Page
    errors: list[str]
    foreign: list[str]
    """Addresses outside the server that the page asked for."""


@contextlib.contextmanager
def open_tab(browser: Browser, served: Served, *, login: bool = True, **options: object) -> Iterator[Tab]:
    context: BrowserContext = browser.new_context(base_url=served.url, **options)  # type: ignore[arg-type]
    context.set_default_timeout(TIMEOUT_MS)
    tab = Tab(context.new_page(), [], [])

    def guard(route: Route) -> None:
        if urlsplit(route.request.url).netloc == f"127.0.0.1:{served.port}":
            route.continue_()
        else:
            tab.foreign.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    tab.page.on("console", lambda message: tab.errors.append(message.text) if message.type in {"error", "warning"} else None)
    tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
    if login:
        answer = context.request.post(
            "/api/ui/login", data={"key": served.key}, headers={"Origin": served.url, "Content-Type": "application/json"}
        )
        assert answer.ok, answer.text()
    yield tab
    context.close()


@pytest.fixture
def tabs(browser: Browser, served: Served) -> Callable[..., contextlib.AbstractContextManager[Tab]]:
    """Opens further pages, with playwright's context options; what they complain about is the test's to check."""
    return functools.partial(open_tab, browser, served)


@pytest.fixture
def tab(browser: Browser, served: Served) -> Iterator[Tab]:
    """A logged-in page; at the end nothing may have been said on its console, and nothing asked for elsewhere."""
    with open_tab(browser, served) as opened:
        yield opened
        assert opened.errors == []
        assert opened.foreign == []
