"""How long it takes from a provider's notice until the job's flag is up, for each source with the intervals that users have.

    python benchmarks/notices.py [--count 100]

Every source listens to its simulator on loopback; the notice is given at a random moment of its interval, and counts from the
moment at which the provider has it to tell. Goals: p99 under 1 s where the provider answers when something happens (Google's
hanging requests, signals, HTTP), within the interval elsewhere.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import requests

from wbdist.preemption import aws, azure, kubernetes
from wbdist.preemption.aws import AwsSource
from wbdist.preemption.azure import AzureSource
from wbdist.preemption.file import FileSource
from wbdist.preemption.gcp import GcpSource
from wbdist.preemption.http import HttpSource
from wbdist.preemption.hub import NoticeHub, NoticeSource
from wbdist.preemption.rehearsal.aws import AwsMetadata
from wbdist.preemption.rehearsal.azure import AzureMetadata
from wbdist.preemption.rehearsal.gcp import GcpMetadata
from wbdist.preemption.rehearsal.kubernetes import KubernetesApi
from wbdist.preemption.signals import SignalSource

SETTLING = 0.5
"""Seconds until a source has asked for the first time."""
AT_ONCE = 10
"""Sources that wait for their notices together: they sleep, or hang, most of the time."""


def heard_after(source: NoticeSource, give: Callable[[], object], phase: float) -> float:
    """Seconds from `give` to the hub's flag."""
    hub = NoticeHub([source])
    heard = threading.Event()
    at: list[float] = []

    def note(_: object) -> None:
        at.append(time.monotonic())
        heard.set()

    hub.on_notice(note)
    hub.start()
    time.sleep(SETTLING + random.random() * phase)
    began = time.monotonic()
    give()
    if not heard.wait(60.0):
        raise SystemExit(f"{type(source).__name__} heard nothing for 60 s")
    hub.close()
    return at[0] - began


def one_aws() -> float:
    with AwsMetadata() as service:
        return heard_after(AwsSource(service.url), service.interrupt, aws.INTERVAL)


def one_gcp() -> float:
    with GcpMetadata() as service:
        return heard_after(GcpSource(service.url), service.preempt, 0.5)


def one_azure() -> float:
    with AzureMetadata() as service:
        return heard_after(AzureSource(service.url), service.schedule, azure.INTERVAL)


def one_file() -> float:
    with tempfile.TemporaryDirectory() as directory:
        return heard_after(FileSource(f"{directory}/stop"), Path(directory, "stop").touch, 1.0)


def one_annotation() -> float:
    with tempfile.TemporaryDirectory() as directory, KubernetesApi(Path(directory)) as api:
        source = kubernetes.AnnotationSource(api.environment["WBDIST_PODINFO"])
        return heard_after(source, lambda: api.annotate("drained"), kubernetes.INTERVAL)


def one_http() -> float:
    source = HttpSource("0")
    return heard_after(source, lambda: requests.post(f"http://127.0.0.1:{source.port}/stop", timeout=30), 0.1)


def one_signal() -> float:
    return heard_after(SignalSource(), lambda: os.kill(os.getpid(), signal.SIGTERM), 0.01)


def many(one: Callable[[], float], count: int, at_once: int) -> list[float]:
    found: list[float] = []

    def some() -> None:
        while len(found) < count:
            found.append(one())

    if at_once == 1:
        some()
        return found
    with ExitStack() as stack:
        for _ in range(at_once):
            thread = threading.Thread(target=some)
            thread.start()
            stack.callback(thread.join)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    logging.getLogger("wbdist").setLevel(logging.ERROR)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {AT_ONCE} sources of a kind at a time")
    missed = []
    for name, one, bound, at_once in (
        ("signal", one_signal, 1.0, 1),
        ("Google, hanging request", one_gcp, 1.0, AT_ONCE),
        ("HTTP trigger", one_http, 1.0, AT_ONCE),
        ("AWS, asked every 2 s", one_aws, aws.INTERVAL, AT_ONCE),
        ("Azure, asked every 1 s", one_azure, azure.INTERVAL, AT_ONCE),
        ("file, looked at every 1 s", one_file, 1.0, AT_ONCE),
        ("annotation, looked at every 1 s", one_annotation, kubernetes.INTERVAL, AT_ONCE),
    ):
        values = sorted(many(one, min(args.count, 20) if at_once == 1 else args.count, at_once))
        worst = values[min(len(values) - 1, int(len(values) * 0.99))]
        print(
            f"{name:<32} p50 {values[len(values) // 2] * 1000:7.1f} ms   p99 {worst * 1000:7.1f} ms   ({len(values)} notices)"
        )
        if worst > bound:
            missed.append(f"{name}: p99 {worst:.2f} s, the goal is {bound:g} s")
    print("\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
