"""Kubernetes: what stands behind a pod's SIGTERM, and a stop asked for by an annotation.

The downward API does not tell when a pod will be killed, so the API server is asked once the signal has come, where the pod's
service account may `get` pods; else WBDIST_GRACE is what we know. Annotations do come through the downward API, as a file:

    kubectl annotate pod trainer-0 wbdist/stop="node is drained tonight"
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from wbdist.errors import UsageError
from wbdist.preemption.metadata import EARLY, direct_session, unix_time
from wbdist.preemption.notice import Notice

log = logging.getLogger("wbdist.preemption")

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ANNOTATIONS = "/etc/podinfo/annotations"
"""Where the downward API's volume is by convention; WBDIST_PODINFO names another file."""
ANNOTATION = "wbdist/stop"
INTERVAL = 1.0
TIMEOUT = 3.0


class _Metadata(msgspec.Struct):
    creationTimestamp: str | None = None  # noqa: N815  (Kubernetes' names)
    deletionTimestamp: str | None = None  # noqa: N815


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""
    reason: str | None = None
    message: str | None = None


class _Status(msgspec.Struct):
    conditions: list[_Condition] | None = None


class _Pod(msgspec.Struct):
    metadata: _Metadata
    status: _Status = msgspec.field(default_factory=_Status)


class Pod:
    """The pod that this process runs in."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = os.environ if env is None else env

    def explain(self, number: int) -> Notice | None:
        """When the pod will be killed and why it is deleted, as far as the API server says; may take some seconds."""
        del number
        pod = self._ask("the pod's end is not known, WBDIST_GRACE says how long it may take")
        return None if pod is None else _notice_of(pod)

    def created(self) -> float | None:
        """Unix time at which the pod was made, for a scheduler to place; None where the API server does not say."""
        pod = self._ask("when the pod was made is not known, nor how long it waited")
        return None if pod is None else unix_time(pod.metadata.creationTimestamp or "")

    def _ask(self, unknown: str) -> _Pod | None:
        """The pod as the API server has it; may take some seconds. None, and `unknown` in the log, when it does not say."""
        import requests

        account = Path(self._env.get("WBDIST_SERVICE_ACCOUNT") or ACCOUNT)
        host, port = self._env.get("KUBERNETES_SERVICE_HOST", ""), self._env.get("KUBERNETES_SERVICE_PORT", "443")
        base = self._env.get("WBDIST_KUBERNETES_API") or f"https://{f'[{host}]' if ':' in host else host}:{port}"
        name = self._env.get("WBDIST_POD_NAME") or self._env.get("HOSTNAME", "")
        try:
            token, namespace = ((account / file).read_text().strip() for file in ("token", "namespace"))
            with direct_session() as session:
                answer = session.get(
                    f"{base}/api/v1/namespaces/{namespace}/pods/{name}",
                    headers={"Authorization": f"Bearer {token}"},
                    verify=str(account / "ca.crt"),
                    timeout=TIMEOUT,
                )
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=_Pod)
        except (OSError, requests.RequestException, msgspec.MsgspecError) as error:
            log.info("kubernetes: %s: %s", unknown, error)
            return None


def _notice_of(pod: _Pod) -> Notice | None:
    if not pod.metadata.deletionTimestamp:
        return None
    why = "the pod is deleted"
    for condition in pod.status.conditions or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            why = f"{condition.reason or 'disrupted'}: {condition.message or ''}".rstrip(": ")
    # The time of deletion with the grace already added.
    return Notice("kubernetes", why, time.monotonic(), unix_time(pod.metadata.deletionTimestamp))


class AnnotationSource:
    """A notice when the pod is annotated with `wbdist/stop`; the value is the reason."""

    def __init__(self, path: str | os.PathLike[str], interval: float = INTERVAL) -> None:
        self._path = Path(path)
        self._interval = interval
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, tell: Callable[[Notice], bool]) -> None:
        """Any thread. Raises UsageError when the source was started before."""
        if self._thread is not None:
            raise UsageError("this AnnotationSource was started before; make another")
        self._thread = threading.Thread(target=self._watch, args=(tell,), name="wbdist-annotations", daemon=True)
        self._thread.start()

    def _watch(self, tell: Callable[[Notice], bool]) -> None:
        while not self._closing.is_set():
            reason = self._reason()
            if reason is not None:
                tell(Notice("kubernetes", reason, time.monotonic()))
                return
            self._closing.wait(self._interval - min(EARLY, self._interval / 10))

    def _reason(self) -> str | None:
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except OSError:
            return None  # being replaced, as the volume is at each change; or there is none
        for line in lines:
            name, _, value = line.partition("=")
            if name == ANNOTATION:
                return _unquoted(value) or f"annotated with {ANNOTATION}"
        return None

    def close(self) -> None:
        """Any thread. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(1.0)


def _unquoted(value: str) -> str:
    """The downward API quotes values as Go does, of which JSON understands what people write."""
    try:
        return msgspec.json.decode(value, type=str).strip()
    except msgspec.MsgspecError:
        return value.strip('"')
