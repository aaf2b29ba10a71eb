"""What providers answer, as their documents print it, and what each source and each rehearsal makes of it.

`payloads/<provider>.json` is the table: an answer and its document beside what is heard (`notice`, its `deadline`, `advice`)
and, where the simulator can be brought to give the same answer, how. Times are unix seconds or `+seconds` from now.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.recorded import TABLES, body_of, read, records, shape
from support.waiting import until

from wbdist.preemption import aws, azure, gcp, metadata
from wbdist.preemption.hub import NoticeHub
from wbdist.preemption.metadata import MetadataSource
from wbdist.preemption.notice import Notice
from wbdist.preemption.rehearsal.aws import AwsMetadata
from wbdist.preemption.rehearsal.azure import AzureMetadata
from wbdist.preemption.rehearsal.gcp import GcpMetadata
from wbdist.preemption.rehearsal.service import Answer, Request, Service

FAST = 0.05
CLOUDS = ("aws", "gcp", "azure")


class Recordings(Service):
    """The answers of all records, each below a path of its own, in turn; the last one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.listening: list[Listening] = []

    def answer(self, request: Request) -> Answer | None:
        number, _, path = request.path.removeprefix("/").partition("/")
        with self.changed:
            answer = self.listening[int(number)].next_answer(f"/{path}")
            self.changed.notify_all()
            if answer is None:
                self.changed.wait_for(lambda: self.closing)
        return answer


def source_of(provider: str, url: str, options: dict[str, Any]) -> MetadataSource:
    if provider == "aws":
        return aws.AwsSource(url, FAST)
    return azure.AzureSource(url, FAST) if provider == "azure" else gcp.GcpSource(url, **{"gpu": False, **options})


class Listening:
    """A source that asks for one record's answers, and what was heard."""

    def __init__(self, recordings: Recordings, provider: str, record: dict[str, Any]) -> None:
        table = TABLES[provider]
        answers = {**table["always"], **record["answers"]}
        if "machine" in record:
            answers["/metadata/instance/compute/name"] = [{"status": 200, "body": record["machine"]}]
        self.began = time.time()
        self._answers = {
            path: [Answer(one["status"], body_of(one), "text/plain", one.get("headers", {})) for one in given]
            for path, given in answers.items()
        }
        self._recorded, self._main = list(record["answers"]), record.get("main", table["main"])
        self._asked: Counter[str] = Counter()
        self._enough: dict[str, int] = {}
        self.advice: list[Notice] = []
        self.asked_before: list[int] = []
        """How often the record's paths were asked, at most, when the notice came."""
        recordings.listening.append(self)
        self.source = source_of(provider, f"{recordings.url}/{len(recordings.listening) - 1}", record.get("source", {}))
        self.hub = NoticeHub([self.source])
        self.hub.on_advice(self.advice.append)
        self.hub.on_notice(lambda _: self.asked_before.append(max(self._asked[path] for path in self._recorded)))
        self.hub.start()

    def next_answer(self, path: str) -> Answer | None:
        """None when there is nothing more to prove: the request hangs."""
        if self.done:
            return None
        given = self._answers.get(path, [Answer(404)])
        found = given[min(self._asked[path], len(given) - 1)]
        self._asked[path] += 1
        if not self._enough and all(self._asked[path] >= len(self._answers[path]) for path in self._recorded):
            # The second request after an answer comes when the answer has been taken in.
            self._enough = {path: self._asked[path] + 2 for path in self._main}
        return found

    @property
    def done(self) -> bool:
        """Every answer was given and taken in."""
        return bool(self._enough) and all(self._asked[path] >= count for path, count in self._enough.items())


@pytest.fixture(scope="module")
def listening() -> Iterator[dict[str, Listening]]:
    """All records' sources at once, until each has taken in its answers."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (aws, "MAINTENANCE_INTERVAL"),
            (gcp, "INTERVAL"),
            (gcp, "HANG"),
            (gcp, "UPCOMING_INTERVAL"),
            (gcp, "UNSUPPORTED_INTERVAL"),
            (metadata, "LONGEST_PAUSE"),
        ):
            patch.setattr(module, name, FAST)
        boot = time.time() - 60
        for cloud in (aws, azure):
            patch.setattr(cloud, "booted", lambda: boot)
        with Recordings() as service:
            found = {str(case.id): Listening(service, *case.values) for case in records(*CLOUDS)}
            for name, one in found.items():
                until(lambda one=one: one.done, f"all answers of {name}")
        for one in found.values():
            one.hub.close()
        yield found


def is_time(found: float | None, wanted: float | str | None, began: float) -> bool:
    if isinstance(wanted, str):
        return found is not None and began - 2 <= found - float(wanted) <= time.time() + 1
    return found == wanted


@pytest.mark.parametrize(("provider", "record"), records(*CLOUDS))
def test_what_is_heard(provider: str, record: dict[str, Any], listening: dict[str, Listening]) -> None:
    """Proves the source's reading of each recorded answer: notice, deadline, advice, or nothing; and that it asks on after
    those that cannot be read."""
    one, heard = listening[f"{provider}: {record['name']}"], record["heard"]
    notice = one.hub.notice
    if "notice" in heard:
        assert notice is not None
        assert heard["notice"] in notice.reason
        assert is_time(notice.deadline, heard["deadline"], one.began), (notice.deadline, heard["deadline"])
        assert one.asked_before[0] >= heard.get("after", 0)
    else:
        assert notice is None
    assert len(one.source._postponed) == heard.get("postponed", 0)
    assert one.hub.approvable == heard.get("approvable", False)
    wanted = heard.get("advice", [])
    assert len(one.advice) == len(wanted), one.advice
    assert all(part in said.reason for part, said in zip(wanted, one.advice, strict=True))


def ask(service: Service, request: dict[str, Any]) -> Answer:
    made = Request(request.get("method", "GET"), request["path"], request.get("query", {}), request["headers"])
    found = service.answer(made)
    assert found is not None
    return found


@contextmanager
def simulator(provider: str, record: dict[str, Any]) -> Iterator[tuple[Service, dict[str, Any]]]:
    """It, asked without a network, and what its clients have to send along."""
    service: Service
    if provider == "aws":
        service = AwsMetadata()
        lifetime = {"x-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = ask(service, {"method": "PUT", "path": "/latest/api/token", "headers": lifetime}).body
        along: dict[str, Any] = {"headers": {"x-aws-ec2-metadata-token": token}}
    elif provider == "gcp":
        service, along = GcpMetadata(), {"headers": {"metadata-flavor": "Google"}}
    else:
        service = AzureMetadata(machine=record.get("machine", "WestNO_0"))
        along = {"headers": {"metadata": "true"}, "query": {"api-version": "2020-07-01"}}
    yield service, along
    service._server.server_close()


@pytest.mark.parametrize(
    ("provider", "record"),
    [case for case in records(*CLOUDS) if "rehearsed" in case.values[1]],  # type: ignore[index]
)
def test_what_is_rehearsed(provider: str, record: dict[str, Any]) -> None:
    """Proves that the simulator answers as the provider: status, headers, fields, types, and how times and ids are written."""
    rehearsed = record["rehearsed"]
    path = rehearsed.get("path", next(iter(record["answers"])))
    recorded = record["answers"][path][-1]
    with simulator(provider, record) as (service, request):
        for name, *arguments in [rehearsed["do"]] if rehearsed["do"] else []:
            getattr(service, name)(*arguments)
        found = ask(service, {**request, "path": path})
    free = rehearsed.get("any", [])
    assert found.status == recorded["status"]
    if found.status < 400 or provider != "aws":  # error pages are for people
        assert shape(read(found.body), free) == shape(read(body_of(recorded)), free)
    headers = shape(dict(found.headers), free)
    assert headers == {**headers, **shape(recorded.get("headers", {}), free)}


@pytest.mark.parametrize("provider", CLOUDS)
def test_what_is_refused(provider: str) -> None:
    """Proves that the simulators demand what the providers demand of a request."""
    with simulator(provider, {}) as (service, _):
        for request in TABLES[provider]["refused"]:
            assert ask(service, request).status == request["status"], request["document"]
