"""Clouds' notices against their simulators on loopback: what is asked, what is understood, what passes."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.waiting import until

from wbdist.errors import UsageError
from wbdist.preemption import aws, azure, gcp, sources
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.machine import AZURE_ASSET_TAG, detect_cloud
from wbdist.preemption.notice import Notice
from wbdist.preemption.rehearsal.aws import AwsMetadata
from wbdist.preemption.rehearsal.azure import AzureMetadata
from wbdist.preemption.rehearsal.gcp import GcpMetadata
from wbdist.preemption.rehearsal.service import Answer, Request, Service

FAST = 0.02


class Heard:
    """A hub with one source, and what it says."""

    def __init__(self, source: object) -> None:
        self.advice: list[Notice] = []
        self.hub = NoticeHub([source])  # type: ignore[list-item]
        self.hub.on_advice(self.advice.append)
        self.hub.start()

    def notice(self) -> Notice:
        found = until(lambda: self.hub.notice, "the notice")
        assert isinstance(found, Notice)
        return found


@pytest.fixture
def hear() -> Iterator[Callable[[object], Heard]]:
    made: list[Heard] = []

    def make(source: object) -> Heard:
        made.append(Heard(source))
        return made[-1]

    yield make
    for heard in made:
        heard.hub.close()


class Recorded(Service):
    """Answers what was recorded, by path, in turn; the last answer stays."""

    def __init__(self, answers: dict[str, list[Answer]]) -> None:
        super().__init__()
        self._answers = {path: itertools.chain(given, itertools.repeat(given[-1])) for path, given in answers.items()}

    def answer(self, request: Request) -> Answer:
        time.sleep(FAST)
        return next(self._answers[request.path]) if request.path in self._answers else Answer(404)


def paths_of(service: Service) -> set[tuple[str, str]]:
    return {(request.method, request.path) for request in service.requests}


def in_seconds(notice: Notice) -> float:
    assert notice.deadline is not None
    return notice.deadline - time.time()


# AWS ---------------------------------------------------------------------------------------------------------


def test_ec2_spot_interruption_with_a_token(hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the IMDSv2 conversation: token, then both documents with it and nothing through a proxy; advice from the rebalance
    recommendation, once; the notice with its time; a refused token is renewed."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with AwsMetadata() as service:
        heard = hear(aws.AwsSource(service.url, FAST))
        until(lambda: len(service.requests) > 8, "some looks")
        assert heard.hub.notice is None
        service.recommend_rebalance()
        until(lambda: heard.advice, "the advice")
        service.forget_tokens()
        count = len(service.requests)
        until(lambda: len(service.requests) > count + 6, "more looks")
        service.interrupt("terminate", 120)
        notice = heard.notice()
        assert (notice.source, notice.advice) == ("aws", False)
        assert "terminate" in notice.reason
        assert 60 < in_seconds(notice) <= 120
        assert len(heard.advice) == 1
        assert "rebalance" in heard.advice[0].reason
        assert paths_of(service) == {
            ("PUT", "/latest/api/token"),
            ("GET", "/latest/meta-data/spot/instance-action"),
            ("GET", "/latest/meta-data/events/recommendations/rebalance"),
            ("GET", "/latest/meta-data/events/maintenance/scheduled"),
        }
        puts = [request for request in service.requests if request.method == "PUT"]
        assert len(puts) == 2
        assert puts[0].headers["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"


def test_ec2_token_lost_on_the_way(
    hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Proves the diagnosis of hop limit 1 with its fix, and that notices are heard where version 1 is allowed."""
    monkeypatch.setattr(aws, "TIMEOUT", 0.3)
    with AwsMetadata(lost_tokens=True, tokens_required=False) as service, caplog.at_level(logging.WARNING, "wbdist.preemption"):
        service.interrupt("stop", 120)
        assert "stop" in hear(aws.AwsSource(service.url, FAST)).notice().reason
    assert "--http-put-response-hop-limit 2" in caplog.text
    assert "notices are heard" in caplog.text
    caplog.clear()
    with AwsMetadata(lost_tokens=True) as service, caplog.at_level(logging.WARNING, "wbdist.preemption"):
        heard = hear(aws.AwsSource(service.url, FAST))
        until(lambda: "no spot notice can be heard" in caplog.text, "the diagnosis")
        assert heard.hub.notice is None


def test_ec2_recorded_payloads(hear: Callable[..., Heard]) -> None:
    """Proves what AWS documents: the payloads as printed in its guide."""
    token = {"/latest/api/token": [Answer(200, "AQAEAL==")]}
    action = "/latest/meta-data/spot/instance-action"
    for body, deadline in (
        ('{"action": "stop", "time": "2017-09-18T08:22:00Z"}', 1505722920.0),
        ('{"action": "terminate", "time": "2017-09-18T08:22:00Z"}', 1505722920.0),
        ('{"action": "hibernate", "time": "2017-09-18T08:22:00Z"}', None),
    ):
        with Recorded(token | {action: [Answer(404), Answer(200, body)]}) as service:
            notice = hear(aws.AwsSource(service.url, FAST)).notice()
            assert notice.deadline == deadline or (deadline is None and abs(in_seconds(notice)) < 60)


def test_ec2_scheduled_maintenance(hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a reboot far ahead is advice, once; that one which was cancelled is nothing, one that is near a notice with
    its time, and network maintenance no notice at all; and the payload as printed in AWS's guide."""
    monkeypatch.setattr(aws, "MAINTENANCE_INTERVAL", FAST)
    looked = lambda: [r for r in service.requests if r.path.endswith("/maintenance/scheduled")]  # noqa: E731
    with AwsMetadata() as service:
        heard = hear(aws.AwsSource(service.url, FAST))
        service.schedule_maintenance("system-reboot", 3600)
        until(lambda: heard.advice, "the advice")
        for code, lead, state in (("system-reboot", 60, "canceled"), ("system-maintenance", 60, "active")):
            service.schedule_maintenance(code, lead, state)
            count = len(looked())
            until(lambda count=count: len(looked()) > count + 2, "more looks")
        assert (len(heard.advice), heard.hub.notice) == (1, None)
        service.schedule_maintenance("instance-stop", 170)
        notice = heard.notice()
        assert "instance-stop" in notice.reason
        assert 100 < in_seconds(notice) <= 170
    printed = (
        '[{"NotBefore": "21 Jan 2019 09:00:43 GMT", "Code": "system-reboot", "Description": "scheduled reboot", '
        '"EventId": "instance-event-0d59937288b749b32", "NotAfter": "21 Jan 2019 09:17:23 GMT", "State": "active"}]'
    )
    answers = {
        "/latest/api/token": [Answer(200, "AQAEAL==")],
        "/latest/meta-data/events/maintenance/scheduled": [Answer(200, printed)],
    }
    monkeypatch.setattr(aws, "booted", lambda: 1548000000.0)
    with Recorded(answers) as recorded:
        assert hear(aws.AwsSource(recorded.url, FAST)).notice().deadline == 1548061243.0


# Google ------------------------------------------------------------------------------------------------------


def test_gce_preemption_by_a_hanging_request(hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the notice comes from the request that was already waiting, with the last etag, and that a 503 passes."""
    monkeypatch.setattr(gcp, "INTERVAL", FAST)
    with GcpMetadata() as service:
        heard = hear(gcp.GcpSource(service.url, lead=120.0))
        hanging = lambda: [r for r in service.requests if r.query.get("wait_for_change") == "true"]  # noqa: E731
        until(lambda: len(hanging()) == 2, "both hanging requests")
        assert {request.query["last_etag"] for request in hanging()} == set(service._etags.values())
        assert {request.query["timeout_sec"] for request in hanging()} == {"60"}
        service.be_unavailable()
        until(lambda: len(hanging()) > 3, "another try")
        service.be_unavailable(False)
        assert heard.hub.notice is None
        service.preempt()
        notice = heard.notice()
        assert (notice.source, notice.reason) == ("gcp", "the instance is preempted")
        assert 60 < in_seconds(notice) <= 120
        prefix = "/computeMetadata/v1/instance/"
        keys = ("preempted", "maintenance-event", "upcoming-maintenance")
        assert paths_of(service) == {("GET", prefix + key) for key in keys}
        assert {request.headers["metadata-flavor"] for request in service.requests} == {"Google"}


def test_gce_maintenance(hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a live migration is no notice, that a termination is, and that on a GPU machine, told an hour ahead, it is
    advice first and a notice in the last minutes."""
    with GcpMetadata() as service:
        service.announce_maintenance("MIGRATE_ON_HOST_MAINTENANCE")
        heard = hear(gcp.GcpSource(service.url, gpu=False))
        until(lambda: len(service.requests) >= 4, "both answers")
        assert heard.hub.notice is None
        service.announce_maintenance()
        assert 0 < in_seconds(heard.notice()) <= gcp.MAINTENANCE
    with GcpMetadata() as service:
        service.announce_maintenance()
        heard = hear(gcp.GcpSource(service.url, gpu=True))
        until(lambda: heard.advice, "the advice")
        assert heard.hub.notice is None
    monkeypatch.setattr(gcp, "LAST_MINUTES", gcp.GPU_MAINTENANCE)
    with GcpMetadata() as service:
        service.announce_maintenance()
        heard = hear(gcp.GcpSource(service.url, gpu=True))
        assert in_seconds(heard.notice()) > 60
        assert len(heard.advice) <= 1


# Azure -------------------------------------------------------------------------------------------------------


def test_azure_event_of_this_machine_is_approved_when_asked(hear: Callable[..., Heard]) -> None:
    """Proves that events of other machines of the set say nothing, that ours does, with its time, and that it is approved when
    the hub is told to and not before, once."""
    with AzureMetadata(machine="set_1") as service:
        heard = hear(azure.AzureSource(service.url, FAST))
        service.schedule("Preempt", 30, machines=["set_0", "set_2"])
        count = len(service.requests)
        until(lambda: len(service.requests) > count + 5, "some looks")
        assert heard.hub.notice is None
        assert not heard.hub.approvable
        ours = service.schedule("Preempt", 30, machines=["set_0", "set_1"])
        notice = heard.notice()
        assert (notice.source, notice.reason) == ("azure", "scheduled event Preempt")
        assert 0 < in_seconds(notice) <= 30
        count = len(service.requests)
        until(lambda: len(service.requests) > count + 5, "more looks")
        assert service.approved == []
        assert heard.hub.approvable
        heard.hub.approve()
        heard.hub.approve()
        assert service.approved == [ours]


def test_azure_long_announced_events_are_advice_first(hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a freeze is advice alone, and that a redeployment is advice and, in the last minutes, a notice."""
    with AzureMetadata() as service:
        heard = hear(azure.AzureSource(service.url, FAST))
        service.schedule("Freeze", 900)
        until(lambda: heard.advice, "advice before the freeze")
        service.schedule("Redeploy", 600)
        until(lambda: len(heard.advice) == 2, "advice before the redeployment")
        assert heard.hub.notice is None
    monkeypatch.setattr(azure, "LAST_MINUTES", 599.8)
    with AzureMetadata() as service:
        heard = hear(azure.AzureSource(service.url, FAST))
        service.schedule("Redeploy", 601)
        assert in_seconds(heard.notice()) > 300


def test_azure_recorded_payloads(hear: Callable[..., Heard]) -> None:
    """Proves what Azure documents: an event as printed in its guide, and one that has started, whose time is blank."""
    event = (
        '{{"DocumentIncarnation": 2, "Events": [{{"EventId": "C7061BAC-AFDC-4513-B24B-AA5F13A16123", "EventStatus": "{}", '
        '"EventType": "Preempt", "ResourceType": "VirtualMachine", "Resources": ["WestNO_0", "WestNO_1"], "NotBefore": "{}", '
        '"Description": "Virtual machine is being evicted.", "EventSource": "Platform", "DurationInSeconds": -1}}]}}'
    )
    for status, when in (("Scheduled", "Mon, 11 Apr 2022 22:26:58 GMT"), ("Started", "")):
        with Recorded(
            {
                "/metadata/instance/compute/name": [Answer(200, "WestNO_0")],
                "/metadata/scheduledevents": [
                    Answer(200, '{"DocumentIncarnation":1,"Events":[]}'),
                    Answer(200, event.format(status, when)),
                ],
            }
        ) as service:
            heard = hear(azure.AzureSource(service.url, FAST))
            notice = heard.notice()
            assert "Virtual machine is being evicted." in notice.reason
            assert notice.deadline == 1649716018.0 if when else abs(in_seconds(notice)) < 60
            assert heard.hub.approvable == (status == "Scheduled")


# Whatever the cloud ------------------------------------------------------------------------------------------


def test_first_notice_wins_and_later_ones_shorten_the_time() -> None:
    """Proves the merge of several sources: reason of the first, the earliest deadline, cancelled when any says so; advice after
    a notice is dropped."""
    hub = NoticeHub([])
    advice: list[Notice] = []
    hub.on_advice(advice.append)
    hub.tell(Notice("aws", "spot", 1.0, 1000.0))
    hub.tell(Notice("signal", "SIGTERM", 2.0, 400.0))
    hub.tell(Notice("azure", "late", 3.0, 900.0, cancelled=True))
    hub.tell(Notice("aws", "rebalance", 3.0, advice=True))
    assert hub.notice == Notice("aws", "spot", 1.0, 400.0, cancelled=True)
    assert advice == []


def test_closing_is_quick_while_a_request_hangs() -> None:
    """Proves that a hub can be closed at once in the middle of a hanging request, and that what comes later tells nobody."""
    with GcpMetadata() as service:
        hub = NoticeHub([gcp.GcpSource(service.url)])
        hub.start()
        until(lambda: len(service.requests) >= 4, "hanging requests")
        began = time.monotonic()
        hub.close()
        assert time.monotonic() - began < 10
        service.preempt()
        service.announce_maintenance()
        until(lambda: not [t for t in threading.enumerate() if t.name == "wbdist-gcp"], "the threads to end")
        assert hub.notice is None


def test_silent_service_is_said_once_and_tried_again(hear: Callable[..., Heard], caplog: pytest.LogCaptureFixture) -> None:
    """Proves that a service that fails is named in one warning, and that a notice after it is heard all the same."""
    with caplog.at_level(logging.INFO, "wbdist.preemption"), AzureMetadata() as service:
        real, service.answer = service.answer, lambda _: Answer(500)  # type: ignore[method-assign]
        heard = hear(azure.AzureSource(service.url, FAST))
        until(lambda: len(service.requests) > 4, "several failures")
        service.answer = real  # type: ignore[method-assign]
        service.schedule("Terminate", 300)
        heard.notice()
    warnings = [record for record in caplog.records if "does not answer properly" in record.message]
    assert len(warnings) == 1
    assert "500" in warnings[0].getMessage()


@pytest.mark.parametrize(
    ("files", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2\n", "bios_vendor": "Amazon EC2\n"}, "aws"),
        ({"sys_vendor": "Xen\n", "bios_version": "4.11.amazon\n"}, "aws"),
        ({"sys_vendor": "Google\n", "product_name": "Google Compute Engine\n"}, "gcp"),
        ({"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": f"{AZURE_ASSET_TAG}\n"}, "azure"),
        ({"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": "1234\n"}, None),
        ({"sys_vendor": "LENOVO\n", "bios_vendor": "LENOVO\n", "product_name": "20XW\n"}, None),
        ({}, None),
    ],
)
def test_cloud_is_told_by_its_firmware(files: dict[str, str], cloud: str | None, tmp_path: Path) -> None:
    """Proves the detection on each cloud's firmware strings, and that other machines ask nobody."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert detect_cloud(tmp_path) == cloud


def test_the_setting_chooses_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves what `notices` means: detection, its switch, names, one process a host; and that what cannot be is refused."""

    def kinds(text: str, *, for_host: bool = True, **env: str) -> list[str]:
        return [type(source).__name__ for source in sources.choose(text, for_host=for_host, env=env)]

    monkeypatch.setattr(sources, "detect_cloud", lambda: "aws")
    assert kinds("auto") == ["SignalSource", "AwsSource"]
    assert kinds("auto", for_host=False) == ["SignalSource"]
    assert kinds("auto", AWS_EC2_METADATA_DISABLED="true") == ["SignalSource"]
    assert kinds("off") == ["SignalSource"]
    assert kinds("gcp=120, azure") == ["SignalSource", "GcpSource", "AzureSource"]
    assert kinds(f"auto,file={tmp_path}/stop") == ["SignalSource", "FileSource", "AwsSource"]
    monkeypatch.setattr(sources, "detect_cloud", lambda: None)
    assert kinds("auto") == ["SignalSource"]
    for wrong, says in (("asw", "known are: auto, off, aws"), ("file", "path of a file"), ("off,aws", "alone")):
        with pytest.raises(UsageError, match=says):
            sources.parse(wrong)
    with pytest.raises(UsageError, match="length of time"):
        sources.choose("gcp=soon", for_host=True, env={})
