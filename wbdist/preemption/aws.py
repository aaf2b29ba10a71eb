"""AWS EC2: spot interruptions, rebalance recommendations, scheduled maintenance; from the instance metadata service (IMDSv2).

PUT /latest/api/token                                     a token; every other request carries it
GET /latest/meta-data/spot/instance-action                404 until the instance is to go, about 2 minutes before
GET /latest/meta-data/events/recommendations/rebalance    404 until it is at risk: minutes to hours earlier, or never
GET /latest/meta-data/events/maintenance/scheduled        a list: reboots, retirements, ...; days earlier, until they are over
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from wbdist.preemption.machine import booted
from wbdist.preemption.metadata import MetadataSource, UnreadableError, unix_time

if TYPE_CHECKING:
    import requests

log = logging.getLogger("wbdist.preemption")

BASE_URL = "http://169.254.169.254"
TOKEN_SECONDS = 21600
RENEW_BEFORE = 15.0
TIMEOUT = 2.0
"""Seconds for one answer; it comes from the host beneath, in milliseconds."""
INTERVAL = 2.0
MAINTENANCE_INTERVAL = 30.0
LAST_MINUTES = 180.0
"""Seconds before a scheduled reboot or stop at which the job stops."""
REBOOTS = {"instance-reboot", "system-reboot"}
STOPPING = REBOOTS | {"instance-stop", "instance-retirement"}
"""Scheduled events that end what runs on the instance; in others, such as network or power maintenance, it stays."""
BLOCKED_INTERVAL = 60.0
"""Seconds between tries when the token cannot reach us: a setting of the instance, which rarely changes under a job."""


class _Action(msgspec.Struct):
    action: str
    time: str | None = None


class _Rebalance(msgspec.Struct):
    noticeTime: str  # noqa: N815  (AWS's name)


class _Event(msgspec.Struct):
    NotBefore: str
    Code: str
    Description: str | None = None
    EventId: str = ""
    State: str = "active"


class AwsSource(MetadataSource):
    """A notice when EC2 takes the spot instance away, and minutes before it reboots, stops or retires any instance; advice to
    save when it says that it may, or will."""

    name = "aws"

    def __init__(self, base_url: str = BASE_URL, interval: float = INTERVAL) -> None:
        super().__init__(base_url, interval)
        self._token = ""
        self._token_until = 0.0
        self._without_token = False
        self._diagnosed = False
        self._recommended = False
        self._next_events = 0.0
        self._events: set[str] = set()
        """Advice was given of these."""

    def _questions(self) -> list[Callable[[requests.Session], float]]:
        return [self._look]

    def _look(self, session: requests.Session) -> float:
        if not self._has_token(session):
            return BLOCKED_INTERVAL
        found = self._get(session, "spot/instance-action")
        if found is not None:
            said = msgspec.json.decode(found, type=_Action)
            if not said.action:
                raise UnreadableError(f"a spot action without a name: {found!r}")
            # Hibernation begins with the notice.
            deadline = time.time() if said.action.casefold() == "hibernate" else unix_time(said.time or "")
            self._tell(f"EC2 spot interruption: {said.action} at {said.time}", deadline)
        elif not self._recommended:
            self._beside("rebalance recommendations", self._rebalance, session)
        if time.monotonic() >= self._next_events:
            self._next_events = time.monotonic() + MAINTENANCE_INTERVAL
            self._beside("scheduled maintenance", self._scheduled_maintenance, session)
        return self._interval

    def _rebalance(self, session: requests.Session) -> None:
        found = self._get(session, "events/recommendations/rebalance")
        if found is not None:
            when = msgspec.json.decode(found, type=_Rebalance).noticeTime
            self._recommended = True
            self._tell(f"EC2 rebalance recommendation of {when}: the instance is at elevated risk", None, advice=True)

    def _scheduled_maintenance(self, session: requests.Session) -> None:
        found = self._get(session, "events/maintenance/scheduled") or b"[]"
        unreadable = None
        for raw in msgspec.json.decode(found, type=list[msgspec.Raw]):
            try:
                self._take(msgspec.json.decode(raw, type=_Event))
            except (msgspec.MsgspecError, UnreadableError) as error:
                unreadable = error  # the others are heard all the same
        if unreadable is not None:
            raise UnreadableError(f"an event that cannot be read: {unreadable}")

    def _take(self, event: _Event) -> None:
        """Looked at again and again: it may be cancelled, or put off."""
        if event.State.casefold() != "active":
            return
        begins = unix_time(event.NotBefore)
        if begins is None:
            raise UnreadableError(f"NotBefore {event.NotBefore!r} is no time")
        if event.Code.casefold() in REBOOTS and begins < booted():
            return  # we have come back from it; it may be listed for an hour more
        reason = f"EC2 scheduled {event.Code} at {event.NotBefore}" + (f": {event.Description}" if event.Description else "")
        if event.Code.casefold() in STOPPING and begins - time.time() <= LAST_MINUTES:
            self._tell(reason, begins)
        elif event.EventId not in self._events:
            self._events.add(event.EventId)
            self._tell(reason, begins, advice=True)

    def _get(self, session: requests.Session, path: str) -> bytes | None:
        """The answer, None for 404. Renews the token once when it is refused."""
        for again in (False, True):
            headers = {} if self._without_token else {"X-aws-ec2-metadata-token": self._token}
            answer = session.get(f"{self._base}/latest/meta-data/{path}", headers=headers, timeout=TIMEOUT)
            if answer.status_code != 401 or again:
                break
            self._token_until = 0.0
            if not self._has_token(session):
                break
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return answer.content

    def _has_token(self, session: requests.Session) -> bool:
        """Whether requests may be made, with a token that lasts or where none is wanted."""
        import requests

        if self._without_token or time.monotonic() < self._token_until - RENEW_BEFORE:
            return True
        try:
            answer = session.put(
                f"{self._base}/latest/api/token",
                headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)},
                timeout=TIMEOUT,
            )
        except requests.ReadTimeout:
            # Connected, and the answer was lost on the way: it may travel a limited number of hops, 1 by default on many
            # images, and a container's bridge is one.
            return self._diagnose(session)
        answer.raise_for_status()
        self._token = answer.text
        self._token_until = time.monotonic() + TOKEN_SECONDS
        return True

    def _diagnose(self, session: requests.Session) -> bool:
        answer = session.get(f"{self._base}/latest/meta-data/", timeout=TIMEOUT)
        self._without_token = answer.status_code == 200
        if not self._diagnosed:
            self._diagnosed = True
            means = (
                "requests without a token work, so notices are heard"
                if self._without_token
                else "no spot notice can be heard here; SIGTERM at the end is all that is left"
            )
            log.warning(
                "aws: the metadata service is there but its token does not arrive, as in a container with a bridge network and "
                "hop limit 1: %s. Raise the limit (aws ec2 modify-instance-metadata-options --instance-id ID "
                "--http-put-response-hop-limit 2) or give the container the host's network.",
                means,
            )
        return self._without_token
