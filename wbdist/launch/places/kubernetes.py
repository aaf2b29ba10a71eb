"""Kubernetes: a Job whose pod failure policy knows our exit codes."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from wbdist.launch.places.wanted import FINAL, RESUMABLE, Submission, Wanted

LEAVING = 10
"""Seconds between the ranks' grace and the kubelet's SIGKILL, for the launcher to end what is left."""


def render(wanted: Wanted, *, image: str, claim: str, mount: str = "/checkpoints", retries: int = 6) -> Submission:
    """`claim`: the PersistentVolumeClaim with the checkpoints, mounted at `mount`; `retries`: failed pods in all, without
    preempted ones."""
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        # No shell: as PID 1 it would not pass the signal on.
        "command": wanted.command(on_preempt="exit"),
        "volumeMounts": [{"name": "checkpoints", "mountPath": mount}, {"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    if wanted.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": wanted.gpus}}

    def on_codes(action: str, codes: tuple[int, ...]) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"containerName": "train", "operator": "In", "values": list(codes)}}

    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": wanted.name},
        "spec": {
            "backoffLimit": retries,
            "podFailurePolicy": {
                "rules": [
                    on_codes("FailJob", FINAL),
                    on_codes("Ignore", (RESUMABLE,)),
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": int(wanted.grace) + LEAVING,
                    "containers": [container],
                    "volumes": [
                        {"name": "checkpoints", "persistentVolumeClaim": {"claimName": claim}},
                        {"name": "shm", "emptyDir": {"medium": "Memory"}},
                    ],
                }
            },
        },
    }
    text = yaml.safe_dump(job, sort_keys=False, default_flow_style=None, width=120)
    return Submission(text=text, filename="kubernetes.yaml", commands=(("kubectl", "create", "-f", "{file}"),))
