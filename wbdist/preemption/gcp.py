"""Google Compute Engine: preemption and host maintenance, by requests that the metadata server answers when something changes.

    GET /computeMetadata/v1/instance/preempted            FALSE, then TRUE
    GET /computeMetadata/v1/instance/maintenance-event    NONE | MIGRATE_ON_HOST_MAINTENANCE | TERMINATE_ON_HOST_MAINTENANCE

with `?wait_for_change=true&timeout_sec=60&last_etag=<etag>`. Both are asked from the start: maintenance is only announced to
those who asked before. Machines that are told of maintenance days ahead (GPUs, TPUs, bare metal) have besides

    GET /computeMetadata/v1/instance/upcoming-maintenance?alt=json    404 elsewhere; 503, "NONE" or {} while there is none

which is advice: the end itself is announced by `maintenance-event`, within the window that stands here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from wbdist.preemption.metadata import MetadataSource, UnreadableError, unix_time

if TYPE_CHECKING:
    import requests

log = logging.getLogger("wbdist.preemption")

BASE_URL = "http://metadata.google.internal"
HEADERS = {"Metadata-Flavor": "Google"}
HANG = 60
"""Seconds after which the server answers although nothing has changed."""
TIMEOUT = 10.0
INTERVAL = 1.0
LEAD = 30.0
"""Seconds from `preempted` to the end, at best, without the opt-in notice duration of 120 s."""
GPU_MAINTENANCE = 3600.0
"""Seconds ahead that a GPU machine is told that it will be terminated for maintenance; other machines 60."""
MAINTENANCE = 60.0
LAST_MINUTES = 180.0
"""Seconds before a maintenance that was announced long ahead at which the job stops."""
UPCOMING_INTERVAL = 60.0
UNSUPPORTED_INTERVAL = 3600.0
"""Seconds between looks for upcoming maintenance, and between them where the type of the machine is told nothing of it."""
MAINTENANCE_KEY = "maintenance-event"


class _Upcoming(msgspec.Struct):
    window_start_time: str = ""
    window_end_time: str = ""
    type: str = ""


class GcpSource(MetadataSource):
    """A notice when the instance is preempted or about to be terminated for maintenance."""

    name = "gcp"

    def __init__(self, base_url: str = BASE_URL, *, lead: float = LEAD, gpu: bool | None = None) -> None:
        """`lead`: seconds the instance was promised between notice and end (`--preemption-notice-duration=120s`). `gpu`:
        whether it has one, None to look."""
        super().__init__(base_url, INTERVAL)
        self._lead = lead
        self._gpu = Path("/proc/driver/nvidia").exists() if gpu is None else gpu
        self._known: dict[str, tuple[str, str]] = {}
        """Name -> value and its etag, '' for none, as last told."""
        self._window = ""

    def _questions(self) -> list[Callable[[requests.Session], float]]:
        return [self._preempted, self._maintenance, self._upcoming]

    def _preempted(self, session: requests.Session) -> float:
        value, again = self._changed(session, "preempted")
        if value == "TRUE":
            self._tell("the instance is preempted", time.time() + self._lead)
            return HANG
        return again

    def _maintenance(self, session: requests.Session) -> float:
        event, again = self._changed(session, MAINTENANCE_KEY)
        now = time.time()
        if event is not None:
            self._withdraw(MAINTENANCE_KEY)  # over, or put off
        if event == "TERMINATE_ON_HOST_MAINTENANCE":
            reason = "the instance is terminated for host maintenance"
            if self._gpu:
                end = now + GPU_MAINTENANCE
                self._tell(f"{reason} in {GPU_MAINTENANCE / 60:.0f} min", end, advice=True)
                self._tell_at(MAINTENANCE_KEY, end - LAST_MINUTES, reason, end)
            else:
                self._tell(reason, now + MAINTENANCE)
        elif event == "MIGRATE_ON_HOST_MAINTENANCE":
            log.info("gcp: the instance is about to be migrated live; the job goes on")
        return again

    def _upcoming(self, session: requests.Session) -> float:
        """Windows of maintenance, each said once."""
        session.max_redirects = 1  # it is a directory, whose name may be completed with a slash
        answer = session.get(
            f"{self._base}/computeMetadata/v1/instance/upcoming-maintenance",
            headers=HEADERS,
            params={"alt": "json"},
            timeout=TIMEOUT,
        )
        if answer.status_code == 404:
            return UNSUPPORTED_INTERVAL
        if answer.status_code == 503:
            return UPCOMING_INTERVAL  # "no notifications have been received yet"
        answer.raise_for_status()
        found = _upcoming_of(answer.content)
        if found is None:
            self._window = ""
        elif found.window_start_time != self._window:
            self._window = found.window_start_time
            kind = f"{found.type.lower()} " if found.type else ""
            until = found.window_end_time or "an unknown time"
            reason = f"{kind}host maintenance, from {found.window_start_time} to {until}"
            self._tell(reason, unix_time(found.window_start_time), advice=True)
        return UPCOMING_INTERVAL

    def _changed(self, session: requests.Session, name: str) -> tuple[str | None, float]:
        """The value when it is new to us, None when nothing has changed; and the seconds until the next look, which are none
        where that one hangs. Blocks up to HANG seconds."""
        before, etag = self._known.get(name, ("", ""))
        # The first answer comes at once: the value may have been there before us.
        wait = {"wait_for_change": "true", "timeout_sec": str(HANG), "last_etag": etag} if etag else {}
        answer = session.get(
            f"{self._base}/computeMetadata/v1/instance/{name}",
            headers=HEADERS,
            params=wait,
            timeout=(TIMEOUT, HANG + TIMEOUT if etag else TIMEOUT),
        )
        answer.raise_for_status()
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise UnreadableError(f"an answer of somebody else, without Metadata-Flavor: Google: {answer.text[:100]!r}")
        value, etag = answer.text.strip().upper(), answer.headers.get("ETag", "")
        self._known[name] = value, etag
        return None if value == before else value, 0.0 if etag else self._interval


def _upcoming_of(content: bytes) -> _Upcoming | None:
    """What is announced, None for nothing. Raises msgspec's errors and UnreadableError."""
    found = msgspec.json.decode(content)
    if found is None or found == {} or (isinstance(found, str) and found.upper() == "NONE"):
        return None
    if isinstance(found, dict) and set(found) == {"error"}:
        return None
    upcoming = msgspec.convert(found, _Upcoming)
    if not upcoming.window_start_time:
        raise UnreadableError(f"maintenance without window_start_time: {content[:200]!r}")
    return upcoming
