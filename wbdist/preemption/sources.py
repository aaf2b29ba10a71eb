"""Which sources of notices this process listens to, from one setting: `notices`.

    auto                the cloud and the scheduler that this machine is found to be on (default)
    off                 none but signals
    aws, gcp, azure     that cloud, wherever we are; gcp=120: with 120 s between notice and end
    slurm, kubernetes   what stands behind their signals, and Slurm's end of time; a pod's annotation
    lsf, pbs            how long their signals leave
    file=PATH           the file's appearance
    http=PORT           POST /stop there; http=HOST:PORT with WBDIST_NOTICE_TOKEN
    limit=1h30m         that long after the job's start
    end=UNIXTIME        that time

in any combination, with commas between: `auto,file=/shared/stop`. Signals are always watched, by every process. The rest is
listened to by one process a host, on behalf of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from wbdist.errors import UsageError
from wbdist.preemption import aws, azure, clock, gcp, http, kubernetes, lsf, pbs, slurm
from wbdist.preemption.budget import MIN_LEAD
from wbdist.preemption.file import FileSource
from wbdist.preemption.hub import NoticeSource
from wbdist.preemption.machine import detect_cloud
from wbdist.preemption.notice import Notice
from wbdist.preemption.signals import DEFAULT_SIGNALS, SignalSource

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


def choose(
    text: str, *, for_host: bool, lead: Callable[[], float] = lambda: MIN_LEAD, env: Mapping[str, str] | None = None
) -> list[NoticeSource]:
    """The sources of this process, not started. `for_host`: it listens on behalf of its host. `lead`: how many seconds before
    a known end the notice has to come. Reads a few small files at most; asks nothing over the network. Raises UsageError."""
    env = os.environ if env is None else env
    words = dict(parse(text))
    if words.pop(AUTO, None) is not None:
        for found in _detected(env):
            words.setdefault(found, "")
    words.pop(OFF, None)
    signals = SignalSource(grace=_grace(words, env), explain=_explain(words, env) if for_host else None)
    if not for_host:
        return [signals]
    made = (_MAKERS[name](value, env, lead) for name, value in words.items())
    return [signals, *(source for source in made if source is not None)]


def _detected(env: Mapping[str, str]) -> list[str]:
    cloud = detect_cloud()
    disabled = cloud == "aws" and env.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    found = [] if cloud is None or disabled else [str(cloud)]
    return found + [name for name, variable in _SCHEDULERS.items() if env.get(variable)]


def _grace(words: Words, env: Mapping[str, str]) -> dict[int, float]:
    """Seconds that each signal leaves: what the scheduler's convention says, and no more than WBDIST_GRACE."""
    said = env.get("WBDIST_GRACE")
    graces = dict.fromkeys((int(number) for number in DEFAULT_SIGNALS), float(said)) if said else {}
    for name, table in (("lsf", lsf.GRACE), ("pbs", pbs.GRACE)):
        if name in words:
            for number, seconds in table.items():
                graces[number] = min(seconds, graces.get(number, seconds))
    return graces


def _explain(words: Words, env: Mapping[str, str]) -> Callable[[int], Notice | None] | None:
    if "slurm" in words:
        return slurm.SlurmJob(env).explain
    return kubernetes.Pod(env).explain if "kubernetes" in words else None


Lead = Callable[[], float]


def _aws(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del value, lead
    return aws.AwsSource(env.get("WBDIST_AWS_METADATA") or env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or aws.BASE_URL)


def _gcp(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del lead
    host = env.get("GCE_METADATA_HOST")
    url = env.get("WBDIST_GCP_METADATA") or (f"http://{host}" if host else gcp.BASE_URL)
    return gcp.GcpSource(url, lead=clock.seconds(value) if value else gcp.LEAD)


def _azure(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del value, lead
    return azure.AzureSource(env.get("WBDIST_AZURE_METADATA") or azure.BASE_URL)


def _slurm(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del value
    return clock.EndSource("slurm", slurm.SlurmJob(env).end, lead, "the job's time ends")


def _kubernetes(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del value, lead
    return kubernetes.AnnotationSource(env.get("WBDIST_PODINFO") or kubernetes.ANNOTATIONS)


def _signals_only(value: str, env: Mapping[str, str], lead: Lead) -> None:
    del value, env, lead


def _file(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del env, lead
    return FileSource(value)


def _http(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del lead
    return http.HttpSource(value, env.get("WBDIST_NOTICE_TOKEN", ""))


def _limit(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del env
    end = time.time() + clock.seconds(value)
    return clock.EndSource("limit", lambda: end, lead, f"the limit of {value} is reached")


def _end(value: str, env: Mapping[str, str], lead: Lead) -> NoticeSource:
    del env
    end = clock.seconds(value)
    return clock.EndSource("limit", lambda: end, lead, "the time given for the end comes")


_MAKERS: dict[str, Callable[[str, Mapping[str, str], Lead], NoticeSource | None]] = {
    "aws": _aws,
    "gcp": _gcp,
    "azure": _azure,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "lsf": _signals_only,
    "pbs": _signals_only,
    "file": _file,
    "http": _http,
    "limit": _limit,
    "end": _end,
}
_SCHEDULERS = {"slurm": "SLURM_JOB_ID", "kubernetes": "KUBERNETES_SERVICE_HOST", "lsf": lsf.JOB, "pbs": pbs.JOB}
"""And the variable that says that we are in a job of theirs."""
_NEED_VALUE = {
    "file": "the path of a file: file=/shared/stop",
    "http": "a port: http=8000",
    "limit": "a length of time: limit=1h30m",
    "end": "a unix time: end=1767225600",
}
