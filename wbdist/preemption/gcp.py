"""Google Compute Engine: preemption and host maintenance, by requests that the metadata server answers when something changes.

    GET /computeMetadata/v1/instance/preempted            FALSE, then TRUE
    GET /computeMetadata/v1/instance/maintenance-event    NONE | MIGRATE_ON_HOST_MAINTENANCE | TERMINATE_ON_HOST_MAINTENANCE

with `?wait_for_change=true&timeout_sec=60&last_etag=<etag>`. Both are asked from the start: maintenance is only announced to
those who asked before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from wbdist.preemption.metadata import MetadataSource

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


class GcpSource(MetadataSource):
    """A notice when the instance is preempted or about to be terminated for maintenance."""

    name = "gcp"

    def __init__(self, base_url: str = BASE_URL, *, lead: float = LEAD, gpu: bool | None = None) -> None:
        """`lead`: seconds the instance was promised between notice and end (`--preemption-notice-duration=120s`). `gpu`:
        whether it has one, None to look."""
        super().__init__(base_url, INTERVAL)
        self._lead = lead
        self._gpu = Path("/proc/driver/nvidia").exists() if gpu is None else gpu
        self._etags: dict[str, str] = {}

    def _questions(self) -> list[Callable[[requests.Session], float]]:
        return [self._preempted, self._maintenance]

    def _preempted(self, session: requests.Session) -> float:
        if self._changed(session, "preempted") == "TRUE":
            self._tell("the instance is preempted", time.time() + self._lead)
            return HANG
        return 0.0

    def _maintenance(self, session: requests.Session) -> float:
        event = self._changed(session, "maintenance-event")
        now = time.time()
        if event == "TERMINATE_ON_HOST_MAINTENANCE":
            reason = "the instance is terminated for host maintenance"
            if self._gpu:
                self._tell(f"{reason} in {GPU_MAINTENANCE / 60:.0f} min", now + GPU_MAINTENANCE, advice=True)
                self._tell_at(now + GPU_MAINTENANCE - LAST_MINUTES, reason, now + GPU_MAINTENANCE)
            else:
                self._tell(reason, now + MAINTENANCE)
        elif event == "MIGRATE_ON_HOST_MAINTENANCE":
            log.info("gcp: the instance is about to be migrated live; the job goes on")
        return 0.0

    def _changed(self, session: requests.Session, name: str) -> str | None:
        """The value when it is new to us, None when nothing has changed. Blocks up to HANG seconds."""
        before = self._etags.get(name)
        # The first answer comes at once: the value may have been there before us.
        wait = {} if before is None else {"wait_for_change": "true", "timeout_sec": str(HANG), "last_etag": before}
        answer = session.get(
            f"{self._base}/computeMetadata/v1/instance/{name}",
            headers=HEADERS,
            params=wait,
            timeout=(TIMEOUT, TIMEOUT if before is None else HANG + TIMEOUT),
        )
        answer.raise_for_status()
        etag = answer.headers["ETag"]
        self._etags[name] = etag
        return None if etag == before else answer.text.strip()
