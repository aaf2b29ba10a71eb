"""A Kubernetes API server's answer about one pod, and what a pod finds mounted."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from wbdist.preemption.rehearsal.service import Answer, Request, Service

NAMESPACE, POD = "training", "trainer-0"


class KubernetesApi(Service):
    """Knows one pod, to whoever has its service account's token."""

    def __init__(self, mounts: Path, port: int = 0, *, allowed: bool = True) -> None:
        """`mounts`: a directory for the token and the annotations. `allowed`: the account may get pods."""
        super().__init__(port)
        self._token = secrets.token_urlsafe(20)
        self._allowed = allowed
        self._pod: dict[str, Any] = {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {"name": POD, "namespace": NAMESPACE, "creationTimestamp": _moment(time.time())},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        }
        (mounts / "token").write_text(self._token)
        (mounts / "namespace").write_text(NAMESPACE)
        self._annotations = mounts / "annotations"
        self._annotations.write_text('kubernetes.io/config.source="api"\n')
        self.environment = {
            "WBDIST_KUBERNETES_API": self.url,
            "WBDIST_POD_NAME": POD,
            "WBDIST_SERVICE_ACCOUNT": str(mounts),
            "WBDIST_PODINFO": str(self._annotations),
        }
        """What a process in the pod needs to find all this."""

    def delete(self, grace: float, reason: str = "PreemptionByScheduler") -> None:
        """The pod is deleted: its time of deletion is the end of its grace. (The signal is the caller's to send.)"""
        when = _moment(time.time() + grace)
        with self.changed:
            self._pod["metadata"].update(deletionTimestamp=when, deletionGracePeriodSeconds=int(grace))
            self._pod["status"]["conditions"].append(
                {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "rehearsed"}
            )

    def annotate(self, value: str) -> None:
        """As `kubectl annotate pod ... wbdist/stop=value`, a minute later."""
        beside = self._annotations.with_suffix(".new")
        beside.write_text(f'kubernetes.io/config.source="api"\nwbdist/stop="{value}"\n')
        beside.replace(self._annotations)

    def answer(self, request: Request) -> Answer | None:
        if request.headers.get("authorization") != f"Bearer {self._token}":
            return _status(401, "Unauthorized")
        if not self._allowed:
            return _status(403, "Forbidden")
        if (request.method, request.path) != ("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/{POD}"):
            return _status(404, "NotFound")
        with self.changed:
            return Answer(200, msgspec.json.encode(self._pod).decode(), "application/json")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _status(code: int, reason: str) -> Answer:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
    return Answer(code, msgspec.json.encode(body).decode(), "application/json")
