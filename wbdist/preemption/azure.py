"""Azure scheduled events, from the instance metadata service.

    GET  /metadata/scheduledevents?api-version=2020-07-01     a numbered document with the events of the whole availability set
    POST the same, {"StartRequests": [{"EventId": ...}]}      approval: the event begins now instead of at its time

An event is approved only once the job has left with its checkpoint committed and its rows shipped.
"""

from __future__ import annotations

import logging
import platform
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from wbdist.preemption.machine import booted
from wbdist.preemption.metadata import MetadataSource, UnreadableError, direct_session, unix_time

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
ENDING = {"preempt", "terminate"}
POSTPONABLE = {"reboot", "redeploy"}
"""Event types after which nothing runs here. A freeze passes, and of a type that is not documented nobody knows: advice."""
AHEAD = 600.0
"""Seconds at least that a reboot or redeployment is announced ahead."""
LAST_MINUTES = 180.0
"""Seconds before a reboot or redeployment, announced 10 to 15 minutes ahead, at which the job stops."""


class _Event(msgspec.Struct):
    EventId: str
    EventType: str
    Resources: list[str] = []
    EventStatus: str = ""
    NotBefore: str | None = None
    Description: str | None = None


class _Document(msgspec.Struct):
    DocumentIncarnation: int
    Events: list[msgspec.Raw] = []


class AzureSource(MetadataSource):
    """A notice when this machine is preempted, terminated, rebooted or redeployed; advice to save before it is frozen."""

    name = "azure"

    def __init__(self, base_url: str = BASE_URL, interval: float = INTERVAL) -> None:
        super().__init__(base_url, interval)
        self._machine = ""
        self._seen_document = -1
        self._seen: dict[str, _Event] = {}
        """Those of this machine in the last document, by id."""
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
            self._take_all(document.Events)
        return self._interval

    def _take_all(self, events: list[msgspec.Raw]) -> None:
        found: dict[str, _Event] = {}
        for raw in events:
            try:
                event = msgspec.json.decode(raw, type=_Event)
            except msgspec.MsgspecError as error:
                log.warning("azure: a scheduled event cannot be read (%s) and counts as none: %s", error, bytes(raw)[:500])
                continue
            if self._machine.casefold() in (name.casefold() for name in event.Resources):
                found[event.EventId] = event
        # What is no longer listed is over, or was called off.
        for gone in self._seen.keys() - found.keys():
            self._settle(gone)
        before, self._seen = self._seen, found
        for event in found.values():
            last = before.get(event.EventId)
            if last is None or (last.EventStatus, last.NotBefore) != (event.EventStatus, event.NotBefore):
                self._take(event, first=last is None)

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
        name = answer.text.strip()
        if not re.fullmatch(r"[\w.-]{1,200}", name):
            raise UnreadableError(f"the name of this machine as {name[:100]!r}")
        return name

    def _settle(self, event: str) -> None:
        """There is nothing more to stop for, or to approve."""
        self._withdraw(event)
        with self._lock:
            self._to_approve = [waiting for waiting in self._to_approve if waiting != event]

    def _take(self, event: _Event, *, first: bool) -> None:
        """One that is new, has begun, or has another time than before."""
        started = event.EventStatus.casefold() == "started"
        # Blank once the event has started: now.
        begins = unix_time(event.NotBefore) if event.NotBefore else time.time()
        reason = f"scheduled event {event.EventType}" + (f": {event.Description}" if event.Description else "")
        kind = event.EventType.casefold()
        self._settle(event.EventId)
        if first and started and kind in POSTPONABLE and time.time() - booted() < AHEAD:
            # Announced before this machine was started, and so what it has come back from: listed until Azure has looked.
            log.info("azure: %s is over, though still listed", reason)
            return
        if kind not in ENDING | POSTPONABLE:
            if first:
                self._tell(reason, begins, advice=True)
            return
        if not started:
            with self._lock:
                self._to_approve.append(event.EventId)
        if kind in POSTPONABLE and begins is not None and begins - time.time() > LAST_MINUTES:
            if first:
                self._tell(reason, begins, advice=True)
            self._tell_at(event.EventId, begins - LAST_MINUTES, reason, begins)
        else:
            self._tell(reason, begins)
