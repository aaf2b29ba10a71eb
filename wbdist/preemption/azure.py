"""Azure scheduled events, from the instance metadata service.

    GET  /metadata/scheduledevents?api-version=2020-07-01     a numbered document with the events of the whole availability set
    POST the same, {"StartRequests": [{"EventId": ...}]}      approval: the event begins now instead of at its time

An event is approved only once the job has left with its checkpoint committed and its rows shipped.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import msgspec

from wbdist.preemption.metadata import MetadataSource, direct_session

if TYPE_CHECKING:
    import requests

log = logging.getLogger("wbdist.preemption")

BASE_URL = "http://169.254.169.254"
HEADERS = {"Metadata": "true"}
EVENTS_VERSION = "2020-07-01"
COMPUTE_VERSION = "2021-02-01"
INTERVAL = 1.0
TIMEOUT = 5.0
FIRST_TIMEOUT = 150.0
"""The first request switches the service on and may take two minutes."""
LAST_MINUTES = 180.0
"""Seconds before a reboot or redeployment, announced 10 to 15 minutes ahead, at which the job stops."""


class _Event(msgspec.Struct):
    EventId: str
    EventType: str
    Resources: list[str] = []
    EventStatus: str = ""
    NotBefore: str = ""
    Description: str = ""


class _Document(msgspec.Struct):
    DocumentIncarnation: int = 0
    Events: list[_Event] = []


class AzureSource(MetadataSource):
    """A notice when this machine is preempted, terminated, rebooted or redeployed; advice to save before it is frozen."""

    name = "azure"

    def __init__(self, base_url: str = BASE_URL, interval: float = INTERVAL) -> None:
        super().__init__(base_url, interval)
        self._machine = ""
        self._seen_document = -1
        self._seen: set[str] = set()
        self._to_approve: list[str] = []
        self._lock = threading.Lock()

    def _questions(self) -> list[Callable[[requests.Session], float]]:
        return [self._look]

    @property
    def approvable(self) -> bool:
        """Whether there is an event that waits for `approve`."""
        with self._lock:
            return bool(self._to_approve)

    def approve(self) -> None:
        """Any thread, once, when nothing more has to be saved from this machine: the events that stopped the job may begin now.
        At most a few seconds; that it did not work is no loss, they then begin at their time."""
        import requests

        with self._lock:
            wanted, self._to_approve = self._to_approve, []
        if not wanted:
            return
        body = {"StartRequests": [{"EventId": event} for event in wanted]}
        try:
            with direct_session() as session:
                session.post(
                    f"{self._base}/metadata/scheduledevents",
                    params={"api-version": EVENTS_VERSION},
                    headers=HEADERS,
                    json=body,
                    timeout=TIMEOUT,
                ).raise_for_status()
        except requests.RequestException as error:
            log.info("azure: the scheduled event could not be approved: %s", error)

    def _look(self, session: requests.Session) -> float:
        if not self._machine:
            self._machine = self._find_name(session)
        answer = session.get(
            f"{self._base}/metadata/scheduledevents",
            params={"api-version": EVENTS_VERSION},
            headers=HEADERS,
            timeout=FIRST_TIMEOUT if self._seen_document < 0 else TIMEOUT,
        )
        answer.raise_for_status()
        document = msgspec.json.decode(answer.content, type=_Document)
        if document.DocumentIncarnation != self._seen_document:
            self._seen_document = document.DocumentIncarnation
            for event in document.Events:
                if self._machine in event.Resources and event.EventId not in self._seen:
                    self._seen.add(event.EventId)
                    self._take(event)
        return self._interval

    def _find_name(self, session: requests.Session) -> str:
        """What events call this machine."""
        answer = session.get(
            f"{self._base}/metadata/instance/compute/name",
            params={"api-version": COMPUTE_VERSION, "format": "text"},
            headers=HEADERS,
            timeout=TIMEOUT,
        )
        if answer.status_code == 404:
            return platform.node()
        answer.raise_for_status()
        return answer.text.strip()

    def _take(self, event: _Event) -> None:
        # Blank once the event has started: now.
        begins = parsedate_to_datetime(event.NotBefore).timestamp() if event.NotBefore else time.time()
        reason = f"scheduled event {event.EventType}" + (f": {event.Description}" if event.Description else "")
        if event.EventType == "Freeze":
            self._tell(reason, begins, advice=True)
            return
        with self._lock:
            if event.EventStatus != "Started":
                self._to_approve.append(event.EventId)
        if event.EventType in {"Reboot", "Redeploy"} and begins - time.time() > LAST_MINUTES:
            self._tell(reason, begins, advice=True)
            self._tell_at(begins - LAST_MINUTES, reason, begins)
        else:
            self._tell(reason, begins)
