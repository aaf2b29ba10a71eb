"""Schedulers' notices, known ends and the HTTP trigger: real signals, a real `scontrol` on the PATH, real requests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from support.waiting import until

from wbdist.errors import UsageError
from wbdist.preemption import clock, sources
from wbdist.preemption.http import HttpSource
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.notice import Notice
from wbdist.preemption.rehearsal.batch import SlurmRehearsal
from wbdist.preemption.rehearsal.kubernetes import KubernetesApi


@pytest.fixture
def listening() -> Iterator[Callable[..., NoticeHub]]:
    """Hubs with the sources that a setting chooses, in an environment."""
    hubs: list[NoticeHub] = []

    def make(setting: str, env: dict[str, str] | None = None, **more: Any) -> NoticeHub:
        hub = NoticeHub(sources.choose(setting, for_host=True, env=env or {}, **more))
        hubs.append(hub)
        hub.start()
        return hub

    yield make
    for hub in reversed(hubs):
        hub.close()


def noticed(hub: NoticeHub, number: int | None = None) -> Notice:
    """The notice, all explained, after a signal to ourselves."""
    if number is not None:
        os.kill(os.getpid(), number)
    until(lambda: hub.notice, "the notice")
    hub.settle(60.0)
    assert hub.notice is not None
    return hub.notice


def left(notice: Notice) -> float:
    assert notice.deadline is not None
    return notice.deadline - time.time()


def test_slurm_tells_cancelled_from_preempted(listening: Callable[..., NoticeHub], tmp_path: Path) -> None:
    """Proves that a SIGTERM is a preemption while the job is RUNNING, with its end as the deadline, and a cancellation
    when it is COMPLETING before its time; and that a controller that does not answer changes nothing."""
    job = SlurmRehearsal(tmp_path, limit=5000)
    hub = listening("slurm", job.environment)
    notice = noticed(hub, signal.SIGTERM)
    assert (notice.source, notice.cancelled) == ("signal", False)
    assert 4000 < left(notice) <= 5000
    hub.close()
    job.cancel()
    hub = listening("slurm", job.environment)
    assert noticed(hub, signal.SIGTERM).cancelled
    hub.close()
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    hub = listening("slurm", job.environment)
    assert not noticed(hub, signal.SIGUSR2).cancelled


def test_slurm_end_of_time_and_its_extension(
    listening: Callable[..., NoticeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that the job stops ahead of its limit as Slurm knows it now, not as it was at the start."""
    monkeypatch.setattr(clock, "LOOK", 0.02)
    monkeypatch.setattr(clock, "SHARE", 2.0)
    job = SlurmRehearsal(tmp_path, limit=500)
    leads, looks = [100.0], [0]

    def lead() -> float:
        looks[0] += 1
        return leads[-1]

    hub = listening("slurm", job.environment, lead=lead)
    until(lambda: looks[0] > 3, "some looks")
    job.extend(5000)
    leads.append(900.0)  # too late by what Slurm said at the start
    seen = looks[0]
    until(lambda: looks[0] > seen + 5, "more looks")
    assert hub.notice is None
    hub.close()
    job.extend(99)
    notice = noticed(listening("slurm", job.environment, lead=lambda: 100.0))
    assert notice.source == "slurm"
    assert "time ends in" in notice.reason
    assert 50 < left(notice) <= 100


def test_known_ends(listening: Callable[..., NoticeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves limit= and end=: the notice comes the lead ahead, with the end as deadline; that a short job is not stopped at its
    start; and what is no length of time."""
    monkeypatch.setattr(clock, "LOOK", 0.02)
    hub = listening("limit=3s", lead=lambda: 60.0)
    began = time.monotonic()
    assert left(noticed(hub)) <= 0.75
    assert time.monotonic() - began > 2.0  # three quarters of it; later on a loaded machine
    hub.close()
    monkeypatch.setattr(clock, "SHARE", 2.0)
    hub = listening("limit=1h", lead=lambda: 3599.8)
    assert 3000 < left(noticed(hub)) <= 3600
    hub.close()
    assert 50 < left(noticed(listening(f"end={int(time.time()) + 90}", lead=lambda: 100.0))) <= 90
    assert [clock.seconds(text) for text in ("90", "90s", "1.5m", "1h30m", "2d")] == [90, 90, 90, 5400, 172800]
    for wrong in ("", "soon", "1x", "h", "-5"):
        with pytest.raises(UsageError, match="length of time"):
            clock.seconds(wrong)


def test_kubernetes_pod_is_deleted(listening: Callable[..., NoticeHub], tmp_path: Path) -> None:
    """Proves that the API server says until when, with the service account's token; that without the right to ask, WBDIST_GRACE
    stands; and that an annotation is a notice by itself."""
    with KubernetesApi(tmp_path) as api:
        hub = listening("kubernetes", {**api.environment, "WBDIST_GRACE": "600"})
        api.delete(grace=100)
        assert 30 < left(noticed(hub, signal.SIGTERM)) <= 100
        assert api.requests[-1].path == "/api/v1/namespaces/training/pods/trainer-0"
        hub.close()
    with KubernetesApi(tmp_path, allowed=False) as api:
        hub = listening("kubernetes", {**api.environment, "WBDIST_GRACE": "600"})
        api.delete(grace=100)
        assert 300 < left(noticed(hub, signal.SIGTERM)) <= 600
        hub.close()
        hub = listening("kubernetes", api.environment)
        assert hub.notice is None
        api.annotate("drained tonight")
        notice = noticed(hub)
        assert (notice.source, notice.reason, notice.deadline) == ("kubernetes", "drained tonight", None)


@pytest.mark.parametrize(
    ("setting", "grace", "number", "seconds"),
    [
        ("lsf", "", signal.SIGINT, 20),
        ("lsf", "", signal.SIGTERM, 10),
        ("lsf", "", signal.SIGUSR2, None),
        ("lsf", "15", signal.SIGINT, 15),
        ("lsf", "60", signal.SIGUSR2, 60),
        ("pbs", "", signal.SIGTERM, 10),
        ("off", "30", signal.SIGTERM, 30),
    ],
)
def test_what_a_signal_leaves(
    setting: str, grace: str, number: int, seconds: float | None, listening: Callable[..., NoticeHub]
) -> None:
    """Proves the conventions of LSF and PBS, and that WBDIST_GRACE may only shorten them."""
    notice = noticed(listening(setting, {"WBDIST_GRACE": grace}), number)
    assert notice.deadline is None if seconds is None else seconds - 5 < left(notice) <= seconds


def test_schedulers_are_found_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves that `auto` knows that it is in a job of each, and adds nothing elsewhere."""
    monkeypatch.setattr(sources, "detect_cloud", lambda: None)

    def kinds(env: dict[str, str]) -> list[str]:
        return [type(source).__name__ for source in sources.choose("auto", for_host=True, env=env)]

    assert kinds(SlurmRehearsal(tmp_path, 10).environment) == ["SignalSource", "EndSource"]
    assert kinds({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == ["SignalSource", "AnnotationSource"]
    assert kinds({"LSB_JOBID": "1"}) == kinds({"PBS_JOBID": "1"}) == kinds({}) == ["SignalSource"]


def test_http_trigger() -> None:
    """Proves POST /stop with and without a body, what is refused, and that a door to other machines needs a token."""
    told: list[Notice] = []
    source = HttpSource("0")
    source.start(lambda notice: told.append(notice) is None)
    url = f"http://127.0.0.1:{source.port}"
    with requests.Session() as session:
        session.trust_env = False
        assert session.get(f"{url}/stop", timeout=30).status_code == 501
        assert session.post(f"{url}/other", timeout=30).status_code == 404
        assert session.post(f"{url}/stop", data='{"seconds": "soon"}', timeout=30).status_code == 400
        assert session.post(f"{url}/stop", data="x" * 20_000, timeout=30).status_code == 413
        assert told == []
        assert session.post(f"{url}/stop", timeout=30).status_code == 202
        assert session.post(f"{url}/stop", json={"reason": "at six", "seconds": 120}, timeout=30).status_code == 202
        assert [(notice.reason, notice.deadline is None) for notice in told] == [("POST /stop", True), ("at six", False)]
        source.close()
        source.close()
        with pytest.raises(UsageError, match="WBDIST_NOTICE_TOKEN"):
            HttpSource("0.0.0.0:0")
        guarded = HttpSource("0.0.0.0:0", token="secret")
        guarded.start(lambda notice: told.append(notice) is None)
        url = f"http://127.0.0.1:{guarded.port}/stop"
        assert session.post(url, timeout=30).status_code == 401
        assert session.post(url, headers={"Authorization": "Bearer secret"}, timeout=30).status_code == 202
        with pytest.raises(UsageError, match="cannot be listened on"):
            HttpSource(str(guarded.port)).start(lambda _: True)
        guarded.close()
    with pytest.raises(UsageError, match="no address"):
        HttpSource("here")
