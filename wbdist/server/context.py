"""What every part of the app needs, made once by whoever starts the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wbdist.server.auth import Auth
from wbdist.server.console_file import ConsoleFiles
from wbdist.server.files import FileStore
from wbdist.server.refused import RefusalLog
from wbdist.server.settings import ServerSettings
from wbdist.server.store.interface import Store


@dataclass(frozen=True, slots=True)
class AppContext:
    """Shared by all requests and threads; nothing in it changes once the app is made."""

    store: Store
    auth: Auth
    files: FileStore
    settings: ServerSettings
    clock: Callable[[], float]
    """Unix seconds. The store has no clock; every time it stores comes from here."""
    base_url: str
    """The address that was printed at start, without a trailing slash. Answers use the address the client came by."""
    on_stop: list[Callable[[], None]] = field(default_factory=list)
    """Called on the event loop when the server begins to stop, for what would otherwise last until the grace is over."""
    console_files: ConsoleFiles = field(default_factory=ConsoleFiles)
    refused: RefusalLog = field(default_factory=RefusalLog)
