"""EC2's instance metadata service, as far as spot instances have to do with it."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime

import msgspec

from wbdist.preemption.rehearsal.service import Answer, Request, Service

NOT_FOUND = Answer(404, "<html><body><h1>404 - Not Found</h1></body></html>", "text/html")
LONGEST_TOKEN = 21600


class AwsMetadata(Service):
    """IMDSv2. `tokens_required` False answers requests without a token, too (version 1). `lost_tokens`: tokens are never
    delivered, as in a container one network hop too far away."""

    def __init__(self, port: int = 0, *, tokens_required: bool = True, lost_tokens: bool = False) -> None:
        super().__init__(port)
        self._tokens_required, self._lost_tokens = tokens_required, lost_tokens
        self._tokens: dict[str, float] = {}
        self._documents: dict[str, str] = {"": "instance-life-cycle\nspot/", "instance-life-cycle": "spot"}

    def interrupt(self, action: str = "terminate", lead: float = 120.0) -> None:
        """The two-minute warning, or what is left of it."""
        when = _iso(time.time() + lead)
        with self.changed:
            self._documents["spot/instance-action"] = msgspec.json.encode({"action": action, "time": when}).decode()
            if action != "hibernate":
                self._documents["spot/termination-time"] = when

    def recommend_rebalance(self) -> None:
        """The instance is at elevated risk."""
        with self.changed:
            document = {"noticeTime": _iso(time.time())}
            self._documents["events/recommendations/rebalance"] = msgspec.json.encode(document).decode()

    def schedule_maintenance(self, code: str = "system-reboot", lead: float = 3600.0, state: str = "active") -> None:
        """A scheduled event, or what has become of it."""
        times = [datetime.fromtimestamp(time.time() + lead + more, UTC).strftime("%d %b %Y %H:%M:%S GMT") for more in (0, 7200)]
        event = {"NotBefore": times[0], "NotAfter": times[1], "Code": code, "Description": f"scheduled {code}"}
        with self.changed:
            document = [{**event, "EventId": "instance-event-0d59937288b749b32", "State": state}]
            self._documents["events/maintenance/scheduled"] = msgspec.json.encode(document).decode()

    def forget_tokens(self) -> None:
        """All tokens given so far are refused from now on."""
        with self.changed:
            self._tokens.clear()

    def answer(self, request: Request) -> Answer | None:
        with self.changed:
            if request.path == "/latest/api/token":
                return self._token(request)
            if request.method != "GET":
                return Answer(405)
            token = request.headers.get("x-aws-ec2-metadata-token")
            if token is None and self._tokens_required:
                return Answer(401)
            if token is not None and self._tokens.get(token, 0.0) < time.monotonic():
                return Answer(401)
            prefix = "/latest/meta-data/"
            found = self._documents.get(request.path.removeprefix(prefix)) if request.path.startswith(prefix) else None
            return NOT_FOUND if found is None else Answer(200, found)

    def _token(self, request: Request) -> Answer | None:
        if request.method != "PUT":
            return Answer(405)
        if "x-forwarded-for" in request.headers:
            return Answer(403)
        lifetime = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if not lifetime.isdigit() or not 1 <= int(lifetime) <= LONGEST_TOKEN:
            return Answer(400)
        if self._lost_tokens:
            self.changed.wait_for(lambda: self.closing)
            return None
        token = secrets.token_urlsafe(40)
        self._tokens[token] = time.monotonic() + int(lifetime)
        return Answer(200, token, headers={"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": lifetime})


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
