"""What schedulers answer and what triggers are given, as documented, and what is made of it: the tables in `payloads/`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.recorded import TABLES, body_of, now_in, read, records, shape
from support.waiting import until

from wbdist.job.phases import _scheduler
from wbdist.preemption import lsf, pbs, sources
from wbdist.preemption.file import FileSource
from wbdist.preemption.http import HttpSource
from wbdist.preemption.kubernetes import AnnotationSource, Pod
from wbdist.preemption.notice import Notice
from wbdist.preemption.rehearsal import batch
from wbdist.preemption.rehearsal.kubernetes import KubernetesApi
from wbdist.preemption.rehearsal.service import Answer, Request, Service
from wbdist.preemption.slurm import SlurmJob


def local(text: str | None) -> float | None:
    return None if text is None else datetime.fromisoformat(text).timestamp()


def environment(directory: Path, program: str, record: dict[str, Any]) -> dict[str, str]:
    """With a stand-in for `program` on the PATH, which prints the record's answer and notes what it is asked."""
    (directory / "answer").write_text(record["answer"])
    tool = directory / program
    tool.write_text(f'#!/bin/sh\necho "$*" > {directory}/asked\ncat {directory}/answer\nexit {record.get("exit", 0)}\n')
    tool.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}", **now_in(record["env"])}


def words(line: str) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in line.split())


@pytest.mark.parametrize(("provider", "record"), records("slurm"))
def test_slurm(provider: str, record: dict[str, Any], tmp_path: Path) -> None:
    """Proves what is made of a job's record: its end, when it was submitted, cancelled or not; and that the rehearsed scontrol
    prints fields that the real one has, written as there."""
    env = environment(tmp_path, "scontrol", record)
    job, now = SlurmJob(env), time.time()
    assert job.end() == (float(env["SLURM_JOB_END_TIME"]) if record["end"] == "env" else local(record["end"]))
    assert job.submitted() == local(record["submitted"])
    told = job.explain(signal.SIGTERM)
    assert (None if told is None else told.cancelled) == record["cancelled"]
    if "deadline" in record:
        assert told is not None
        assert told.deadline is not None
        assert -2 < told.deadline - now - float(record["deadline"]) < 2
    if "asked" in record:
        assert (tmp_path / "asked").read_text().strip() == record["asked"]
    if "rehearsed" in record:
        rehearsed = batch.SlurmRehearsal(tmp_path, limit=60)
        for name in record["rehearsed"]:
            getattr(rehearsed, name)()
        printed, recorded = words((tmp_path / "job").read_text()), words(record["answer"])
        assert printed.keys() <= recorded.keys()
        assert printed["JobState"] == recorded["JobState"]
        assert local(printed["EndTime"])


@pytest.mark.parametrize(("provider", "record"), records("lsf", "pbs"))
def test_lsf_and_pbs(provider: str, record: dict[str, Any], tmp_path: Path) -> None:
    """Proves when a job was submitted, by what its scheduler's own tool prints; and that what cannot be read is not known."""
    wanted = local(record.get("submitted"))
    if "ago" in record:
        wanted = float(int(time.time()) - record["ago"])
        when = time.strftime("%a %b %d %H:%M:%S", time.localtime(wanted))
        record = {**record, "answer": record["answer"].replace("WHEN", when)}
    env = environment(tmp_path, TABLES[provider]["program"], record)
    ask = _scheduler(env)
    assert ask is not None
    assert ask() == wanted
    if "asked" in record:
        assert (tmp_path / "asked").read_text().strip() == record["asked"]
    assert {"lsf": lsf, "pbs": pbs}[provider].submitted({**env, "PATH": "/nowhere"}) is None


@pytest.mark.parametrize("provider", ["lsf", "pbs"])
def test_signals_of_lsf_and_pbs(provider: str) -> None:
    """Proves that the source gives each signal the time that the scheduler leaves, and that the rehearsal sends them so."""
    wanted = TABLES[provider]["signals"]
    left = {getattr(signal, name): wanted["killed"] - after for name, after in wanted["sent"]}
    environ, events, killed = batch.lsf(0.0) if provider == "lsf" else batch.pbs(0.0, pbs.KILL_DELAY)
    assert [event.what.rpartition(" ")[2] for event in events] == [name for name, _ in wanted["sent"]]
    assert [event.after for event in events] == [after for _, after in wanted["sent"]]
    assert killed == wanted["killed"]
    chosen = sources.choose("auto", for_host=True, env=environ)
    assert chosen[0]._graces == left  # type: ignore[attr-defined]


class OnePod(Service):
    """An API server that gives whatever it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.next = Answer(500)

    def answer(self, request: Request) -> Answer:
        del request
        return self.next


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OnePod, dict[str, str]]]:
    mounts = tmp_path_factory.mktemp("account")
    (mounts / "token").write_text("t")
    (mounts / "namespace").write_text("training")
    with OnePod() as service:
        yield (
            service,
            {
                "WBDIST_KUBERNETES_API": service.url,
                "WBDIST_SERVICE_ACCOUNT": str(mounts),
                "WBDIST_POD_NAME": "trainer-0",
            },
        )


def parts_of(found: Any, recorded: Any) -> bool:
    """Whether all of `found` is in `recorded`, fields that are no object's the same."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        return all(name in recorded and parts_of(inner, recorded[name]) for name, inner in found.items())
    if isinstance(found, list) and isinstance(recorded, list):
        return len(found) == len(recorded) and all(map(parts_of, found, recorded))
    return bool(found == recorded)


@pytest.mark.parametrize(("provider", "record"), records("kubernetes"))
def test_kubernetes(provider: str, record: dict[str, Any], api: tuple[OnePod, dict[str, str]], tmp_path: Path) -> None:
    """Proves what is made of the API server's answer about the pod: until when, why, since when; nothing of what is none; and
    that the rehearsed server answers in its fields."""
    service, env = api
    service.next = Answer(record["status"], body_of(record))
    told = Pod(env).explain(signal.SIGTERM)
    assert (told is not None) == ("reason" in record)
    if told is not None:
        assert told.reason.startswith(record["reason"])
        assert told.deadline == record["deadline"]
    assert Pod(env).created() == record["created"]
    if "rehearsed" in record:
        with KubernetesApi(tmp_path) as rehearsed:
            if record["rehearsed"]:
                name, *arguments = record["rehearsed"]
                getattr(rehearsed, name)(*arguments)
            headers = {"authorization": f"Bearer {(tmp_path / 'token').read_text()}"}
            found = rehearsed.answer(Request("GET", "/api/v1/namespaces/training/pods/trainer-0", {}, headers))
        assert found is not None
        free = record.get("any", [])
        assert parts_of(shape(read(found.body), free), shape(record["body"], free))


def test_annotations(tmp_path: Path) -> None:
    """Proves the reading of the downward API's file, quoted as it is there."""
    for case in TABLES["kubernetes"]["annotations"]:
        (tmp_path / "annotations").write_text(case["text"])
        assert AnnotationSource(tmp_path / "annotations")._reason() == case["reason"], case["document"]


def test_posts(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Proves what POST /stop takes and what it refuses, each of which it survives."""
    told: list[Notice] = []
    caplog.set_level(logging.INFO, "wbdist.preemption")
    source = HttpSource("0")
    source.start(lambda notice: told.append(notice) is None)
    for case in TABLES["triggers"]["http"]:
        body = case["body"].encode()
        headers = {"Host": "localhost", "Content-Length": str(len(body)), **case.get("headers", {})}
        lines = [f"POST {case.get('path', '/stop')} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        began = time.time()
        with socket.create_connection(("127.0.0.1", source.port), timeout=60) as line:
            line.sendall("\r\n".join(lines).encode("latin-1") + body)
            answer = line.makefile("rb").readline()
        assert answer.split()[1:2] == [str(case["status"]).encode()], (case, answer)
        assert len(told) == (case["status"] == 202), case
        for notice in told:
            assert notice.reason == case["reason"]
            seconds = None if notice.deadline is None else notice.deadline - began
            assert seconds is None if "seconds" not in case else -1 < (seconds or 0) - case["seconds"] < 60
        told.clear()
    with socket.create_connection(("127.0.0.1", source.port), timeout=60) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed with a reset
        line.sendall(b"POST /stop HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
    until(lambda: "went away" in caplog.text, "the lost client to be said")
    assert told == []
    assert capfd.readouterr().err == ""
    source.close()


def test_posts_to_an_ipv6_address() -> None:
    """Proves that loopback may be given as IPv6 writes it, and needs no token."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    told: list[Notice] = []
    source = HttpSource("[::1]:0")
    source.start(lambda notice: told.append(notice) is None)
    with socket.create_connection(("::1", source.port), timeout=60) as line:
        line.sendall(b"POST /stop HTTP/1.1\r\n\r\n")
        assert line.makefile("rb").readline().split()[1] == b"202"
    source.close()
    assert len(told) == 1


def test_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Proves that a file counts whatever is in it, with what can be read of its first line as the reason; and that one which
    cannot be looked for is none, and is said."""
    for number, case in enumerate(TABLES["triggers"]["file"]):
        path = tmp_path / (str(number) if "name_too_long" not in case else "x" * 300)
        if "content" in case or "bytes" in case:
            path.write_bytes(bytes.fromhex(case["bytes"]) if "bytes" in case else case["content"].encode())
        elif "directory" in case:
            path.mkdir()
        told: list[Notice] = []
        source = FileSource(path, interval=0.01)
        source.start(lambda notice, told=told: told.append(notice) is None)
        if "reason" in case:
            until(lambda told=told: told, "the notice")
            assert case["reason"] in told[0].reason
        if "name_too_long" in case:
            until(lambda: "cannot be seen" in caplog.text, "the warning")
        source.close()
        assert len(told) == ("reason" in case)
