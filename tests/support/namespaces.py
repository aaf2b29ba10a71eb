"""Two hosts on one machine: network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest


def ip(*args: str) -> None:
    """Runs the command of this name."""
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=20)


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, str, str]]]:
    """(namespace, address, interface) of two network namespaces joined by a cable: two hosts and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and iproute2")
    mark = f"wb{os.getpid() % 10000}"
    hosts = [(f"{mark}n{n}", f"10.231.{os.getpid() % 250}.{n + 1}", f"{mark}v{n}") for n in (0, 1)]

    try:
        for namespace, _, _ in hosts:
            ip("netns", "add", namespace)
        ip("link", "add", hosts[0][2], "netns", hosts[0][0], "type", "veth", "peer", hosts[1][2], "netns", hosts[1][0])
        for namespace, address, interface in hosts:
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", namespace, "link", "set", interface, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield hosts
    finally:
        for namespace, _, _ in hosts:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True, timeout=20)
