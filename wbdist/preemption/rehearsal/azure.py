"""Azure's scheduled events: one numbered document for all machines of an availability set, and approvals."""

from __future__ import annotations

import time
import uuid
from email.utils import formatdate
from typing import Any

import msgspec

from wbdist.preemption.rehearsal.service import Answer, Request, Service

EVENTS = "/metadata/scheduledevents"
NAME = "/metadata/instance/compute/name"


class AzureMetadata(Service):
    """The service of machine `machine`; `approved` says which events a client has let go ahead."""

    def __init__(self, port: int = 0, *, machine: str = "worker_0") -> None:
        super().__init__(port)
        self.machine = machine
        self.approved: list[str] = []
        self._incarnation = 1
        self._events: list[dict[str, Any]] = []

    def schedule(self, kind: str = "Preempt", lead: float = 30.0, *, machines: list[str] | None = None) -> str:
        """An event for `machines`, default this one; its id."""
        event = {
            "EventId": str(uuid.uuid4()).upper(),
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": [self.machine] if machines is None else machines,
            "EventStatus": "Scheduled",
            "NotBefore": formatdate(time.time() + lead, usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }
        with self.changed:
            self._events.append(event)
            self._incarnation += 1
            self.changed.notify_all()
        return str(event["EventId"])

    def answer(self, request: Request) -> Answer | None:
        if request.headers.get("metadata") != "true":
            return _error("Bad request. Required metadata header not specified")
        if "x-forwarded-for" in request.headers:
            return _error("Bad request. The request was forwarded")
        if "api-version" not in request.query:
            return _error("Bad request. api-version was not specified")
        with self.changed:
            if request.path == NAME and request.method == "GET":
                return Answer(200, self.machine)
            if request.path != EVENTS:
                return Answer(404)
            if request.method == "POST":
                return self._approve(request)
            document = {"DocumentIncarnation": self._incarnation, "Events": self._events}
            return Answer(200, msgspec.json.encode(document).decode(), "application/json; charset=utf-8")

    def _approve(self, request: Request) -> Answer:
        try:
            wanted = [str(entry["EventId"]) for entry in msgspec.json.decode(request.body)["StartRequests"]]
        except (msgspec.DecodeError, KeyError, TypeError):
            return _error("Bad request. StartRequests are missing")
        known = {event["EventId"]: event for event in self._events}
        if not all(event in known for event in wanted):
            return _error("Bad request. There is no such event")
        for event in wanted:
            known[event].update(EventStatus="Started", NotBefore="")
            self.approved.append(event)
        self._incarnation += 1
        self.changed.notify_all()
        return Answer(200)


def _error(message: str) -> Answer:
    return Answer(400, msgspec.json.encode({"error": message}).decode(), "application/json")
