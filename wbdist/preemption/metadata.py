"""Asking a cloud's metadata service again and again, on a thread that mostly sleeps.

What all clouds have in common: a link-local address where no proxy may be used, answers that mean "nothing yet", failures that
pass. What differs (paths, headers, payloads) is in one file a cloud.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import msgspec

from wbdist.errors import UsageError
from wbdist.preemption.notice import Notice

if TYPE_CHECKING:
    import requests

log = logging.getLogger("wbdist.preemption")

LONGEST_PAUSE = 5.0
"""Seconds between two tries while the service fails: some notices come only 30 s ahead, and a request to the host is cheap."""
EARLY = 0.05
"""Seconds by which a look begins before its interval is over, since its answer takes time, too; at most a tenth of it."""
CLOSING = 1.0
"""Seconds that `close` waits; a request that hangs longer is abandoned with its thread, which can tell nobody any more."""


class UnreadableError(Exception):
    """An answer that is none of those the provider documents: not to be taken for a notice, nor for "nothing yet"."""


def direct_session() -> requests.Session:
    """HTTP without the environment's proxies and credentials, and without redirects (`requests.TooManyRedirects`): none of them
    is for link-local addresses."""
    import requests

    session = requests.Session()
    session.trust_env = False
    session.max_redirects = 0
    return session


def unix_time(text: str) -> float | None:
    """`2026-11-21T03:22:00Z`, `Mon, 11 Apr 2022 22:26:58 GMT` or `21 Jan 2019 09:00:43 GMT` as unix time, UTC where no zone is
    named; None for what is no time."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = read(text)
        except ValueError:
            continue
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return None


class MetadataSource(ABC):
    """One thread of questions for each `_questions` entry; `start` once, `close` any time."""

    name: str

    def __init__(self, base_url: str, interval: float) -> None:
        """`interval`: how many seconds late a notice may come where the service cannot hold an answer back."""
        if interval <= 0:
            raise UsageError(f"interval={interval!r}: give the seconds between two looks at {base_url}, more than 0")
        self._base = base_url.rstrip("/")
        self._interval = interval
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._tell_hub: Callable[[Notice], bool] | None = None
        self._postponed: dict[str, tuple[float, Notice]] = {}
        """By what it is about: (unix time, notice), given when that time comes."""
        self._postponing = threading.Lock()
        self._failing: set[str] = set()
        """The questions beside the main one that failed last time."""

    @abstractmethod
    def _questions(self) -> list[Callable[[requests.Session], float]]:
        """Each is asked for ever on a thread of its own: it looks once, tells what it found, and returns the seconds until it
        wants to be asked again. What it raises from `requests`, UnreadableError and msgspec's errors are failures that pass."""

    def start(self, tell: Callable[[Notice], bool]) -> None:
        """Any thread. Raises UsageError when the source was started before."""
        if self._threads:
            raise UsageError(f"this {type(self).__name__} was started before; make another")
        self._tell_hub = tell
        for question in self._questions():
            thread = threading.Thread(target=self._ask, args=(question,), name=f"wbdist-{self.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Any thread. Idempotent; within about a second, whatever a request is waiting for."""
        self._closing.set()
        until = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _tell(self, reason: str, deadline: float | None, *, advice: bool = False) -> None:
        assert self._tell_hub is not None
        self._tell_hub(Notice(self.name, reason, time.monotonic(), deadline, advice=advice))

    def _tell_at(self, about: str, when: float, reason: str, deadline: float) -> None:
        """Tells once unix time `when` has come, instead of what was postponed about the same before; a hanging request may
        delay that by as long as it hangs."""
        with self._postponing:
            self._postponed[about] = (when, Notice(self.name, reason, 0.0, deadline))

    def _withdraw(self, about: str) -> None:
        """The provider has changed its mind: what was postponed about this is not told."""
        with self._postponing:
            self._postponed.pop(about, None)

    def _beside(self, what: str, question: Callable[[requests.Session], None], session: requests.Session) -> None:
        """Asks for something less urgent, whose failures must not slow down what is asked on the same thread."""
        import requests

        try:
            question(session)
            self._failing.discard(what)
        except (requests.RequestException, UnreadableError, msgspec.MsgspecError) as error:
            if what not in self._failing:
                self._failing.add(what)
                log.warning("%s: the metadata service at %s tells nothing about %s: %s", self.name, self._base, what, error)

    def _ask(self, question: Callable[[requests.Session], float]) -> None:
        import requests

        failures = 0
        with direct_session() as session:
            while not self._closing.is_set():
                began = time.monotonic()
                try:
                    pause = question(session)
                    pause = max(pause / 10, pause - (time.monotonic() - began) - min(EARLY, pause / 10))
                    if failures:
                        log.info("%s: the metadata service at %s answers again", self.name, self._base)
                    failures = 0
                except (requests.RequestException, UnreadableError, msgspec.MsgspecError) as error:
                    failures += 1
                    pause = min(self._interval * 2**failures, LONGEST_PAUSE)
                    # The first failure may be a hiccup, and after the second everybody knows.
                    if failures == 2:
                        log.warning(
                            "%s: the metadata service at %s does not answer properly (%s); no notice is heard until it does",
                            self.name,
                            self._base,
                            error,
                        )
                self._wait(pause)

    def _wait(self, pause: float) -> None:
        until = time.monotonic() + pause
        while not self._closing.is_set():
            self._tell_postponed()
            left = until - time.monotonic()
            if left <= 0 or self._closing.wait(min(left, 1.0)):
                return

    def _tell_postponed(self) -> None:
        with self._postponing:
            due = [about for about, (when, _) in self._postponed.items() if time.time() >= when]
            notices = [self._postponed.pop(about)[1] for about in due]
        for notice in notices:
            self._tell(notice.reason, notice.deadline)
