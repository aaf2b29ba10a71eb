"""Which sources of notices this process listens to, from one setting: `notices`.

    auto                the cloud and the scheduler that this machine is found to be on (default)
    off                 none but signals
    aws, gcp, azure     that cloud, wherever we are; gcp=120: with 120 s between notice and end
    file=PATH           the file's appearance

in any combination, with commas between: `auto,file=/shared/stop`. Signals are always watched, by every process. The rest is
listened to by one process a host, on behalf of all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from wbdist.errors import UsageError
from wbdist.preemption import aws, azure, gcp
from wbdist.preemption.file import FileSource
from wbdist.preemption.hub import NoticeSource
from wbdist.preemption.machine import detect_cloud
from wbdist.preemption.signals import SignalSource

AUTO, OFF = "auto", "off"
Words = Mapping[str, str]
"""Source -> what stands behind its `=`, '' for nothing."""


def parse(text: str) -> Words:
    """The words of a setting. Raises UsageError naming the word that is not understood, and what is."""
    words: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in (AUTO, OFF, *_MAKERS):
            raise UsageError(
                f"notices={text!r}: {name!r} is no source of notices; known are: {', '.join((AUTO, OFF, *_MAKERS))}"
            )
        if name in _NEED_VALUE and not value:
            raise UsageError(f"notices={text!r}: {name} needs {_NEED_VALUE[name]}")
        words[name] = value.strip()
    if OFF in words and len(words) > 1:
        raise UsageError(f"notices={text!r}: 'off' stands alone, or leave it out")
    return words


def choose(text: str, *, for_host: bool, env: Mapping[str, str] | None = None) -> list[NoticeSource]:
    """The sources of this process, not started. `for_host`: it listens on behalf of its host. Reads a few small files at
    most; asks nothing over the network. Raises UsageError."""
    env = os.environ if env is None else env
    words = dict(parse(text))
    grace = env.get("WBDIST_GRACE")
    sources: list[NoticeSource] = [SignalSource(grace=float(grace) if grace else None)]
    if not for_host:
        return sources
    if words.pop(AUTO, None) is not None:
        for found in _detected(env):
            words.setdefault(found, "")
    words.pop(OFF, None)
    return sources + [_MAKERS[name](value, env) for name, value in words.items()]


def _detected(env: Mapping[str, str]) -> list[str]:
    cloud = detect_cloud()
    disabled = cloud == "aws" and env.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    return [] if cloud is None or disabled else [cloud]


def _aws(value: str, env: Mapping[str, str]) -> NoticeSource:
    del value
    return aws.AwsSource(env.get("WBDIST_AWS_METADATA") or env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or aws.BASE_URL)


def _gcp(value: str, env: Mapping[str, str]) -> NoticeSource:
    host = env.get("GCE_METADATA_HOST")
    url = env.get("WBDIST_GCP_METADATA") or (f"http://{host}" if host else gcp.BASE_URL)
    return gcp.GcpSource(url, lead=_seconds("gcp", value) if value else gcp.LEAD)


def _azure(value: str, env: Mapping[str, str]) -> NoticeSource:
    del value
    return azure.AzureSource(env.get("WBDIST_AZURE_METADATA") or azure.BASE_URL)


def _file(value: str, env: Mapping[str, str]) -> NoticeSource:
    del env
    return FileSource(value)


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"notices: {name}={value!r} is not a number of seconds, 0 or more")
    return seconds


_MAKERS: dict[str, Callable[[str, Mapping[str, str]], NoticeSource]] = {
    "aws": _aws,
    "gcp": _gcp,
    "azure": _azure,
    "file": _file,
}
_NEED_VALUE = {"file": "the path of a file: file=/shared/stop"}
