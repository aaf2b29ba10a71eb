"""Google Compute Engine's metadata server: values with etags, and requests that hang until one changes."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime

import msgspec

from wbdist.preemption.rehearsal.service import Answer, Request, Service

PREFIX = "/computeMetadata/v1/instance/"
FLAVOR = {"Metadata-Flavor": "Google", "Server": "Metadata Server for VM"}
UPCOMING = "upcoming-maintenance"
NOTHING_YET = '{ "error": "no notifications have been received yet, try again later" }'


class GcpMetadata(Service):
    """`preempted`, `maintenance-event` and `upcoming-maintenance` of one instance."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self._values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self._etags = {name: secrets.token_hex(8) for name in self._values}
        self._upcoming = ""
        self._unavailable = False

    def preempt(self) -> None:
        """The instance is taken away."""
        self._set("preempted", "TRUE")

    def announce_maintenance(self, event: str = "TERMINATE_ON_HOST_MAINTENANCE") -> None:
        """The host is about to be maintained."""
        self._set("maintenance-event", event)

    def plan_maintenance(self, lead: float = 3 * 86400.0, hours: float = 4.0) -> None:
        """A window of maintenance is known, `lead` seconds ahead."""
        start, end = (_iso(time.time() + lead + more) for more in (0.0, hours * 3600))
        document = {
            "can_reschedule": "true",
            "latest_window_start_time": start,
            "maintenance_reasons": ["PLANNED_UPDATE"],
            "maintenance_status": "PENDING",
            "type": "SCHEDULED",
            "window_end_time": end,
            "window_start_time": start,
        }
        with self.changed:
            self._upcoming = msgspec.json.encode(document).decode()

    def be_unavailable(self, unavailable: bool = True) -> None:
        """Answers 503, also to requests that hang, until told otherwise."""
        with self.changed:
            self._unavailable = unavailable
            self.changed.notify_all()

    def _set(self, name: str, value: str) -> None:
        with self.changed:
            self._values[name] = value
            self._etags[name] = secrets.token_hex(8)
            self.changed.notify_all()

    def answer(self, request: Request) -> Answer | None:
        if request.headers.get("metadata-flavor") != "Google":
            return Answer(403, "Missing Metadata-Flavor:Google header.", headers=FLAVOR)
        name = request.path.removeprefix(PREFIX)
        if (request.method, request.path) == ("GET", PREFIX + UPCOMING):
            with self.changed:
                return Answer(200 if self._upcoming else 503, self._upcoming or NOTHING_YET, "application/json", FLAVOR)
        if request.method != "GET" or not request.path.startswith(PREFIX) or name not in self._values:
            return Answer(404, headers=FLAVOR)
        with self.changed:
            if request.query.get("wait_for_change", "").lower() == "true":
                self._hang(name, request)
            if self.closing:
                return None
            if self._unavailable:
                return Answer(503, headers=FLAVOR)
            headers = {**FLAVOR, "ETag": self._etags[name]}
            return Answer(200, self._values[name], "application/text", headers)

    def _hang(self, name: str, request: Request) -> None:
        """Until the value has another etag than the last one that the client knows; without one, until it changes."""
        known = request.query.get("last_etag", self._etags[name])
        seconds = request.query.get("timeout_sec")
        until = None if seconds is None else time.monotonic() + float(seconds)
        self.changed.wait_for(
            lambda: self.closing or self._unavailable or self._etags[name] != known,
            None if until is None else max(0.0, until - time.monotonic()),
        )


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
