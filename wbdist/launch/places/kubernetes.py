"""Kubernetes: a Job whose pod failure policy knows our exit codes; on several nodes an Indexed Job, whose pods have lasting
names by a headless Service.
"""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from wbdist.launch.places.wanted import FINAL, RESUMABLE, Submission, Wanted

LEAVING = 10
"""Seconds between the ranks' grace and the kubelet's SIGKILL, for the launcher to end what is left."""
PORT = 29400
"""Where the launchers meet, in the pod of index 0."""


def render(
    wanted: Wanted, *, image: str, claim: str, mount: str = "/checkpoints", retries: int = 6, nodes: int = 1
) -> Submission:
    """`claim`: the PersistentVolumeClaim with the checkpoints, mounted at `mount`; `retries`: failed pods in all, without
    preempted ones. With several `nodes`, one pod each; ranks and GPUs are each node's, and `retries` counts failures of all."""
    several = nodes > 1
    # The index is the kubelet's to fill in. Pod 0 has the same name when it comes back, and with it the rendezvous.
    meeting = ["--rdzv-endpoint", f"{wanted.name}-0.{wanted.name}:{PORT}", "--node-rank", "$(JOB_COMPLETION_INDEX)"]
    where = ["--nnodes", str(nodes), *meeting, "--rdzv-id", wanted.name] if several else []
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        # No shell: as PID 1 it would not pass the signal on.
        "command": wanted.command(*where, on_preempt="exit"),
        "volumeMounts": [{"name": "checkpoints", "mountPath": mount}, {"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    if wanted.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": wanted.gpus}}

    def on_codes(action: str, codes: tuple[int, ...]) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"containerName": "train", "operator": "In", "values": list(codes)}}

    job: dict[str, Any] = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": wanted.name},
        "spec": {
            **({"completionMode": "Indexed", "completions": nodes, "parallelism": nodes} if several else {}),
            # All pods of a job leave with its code, and each counts.
            "backoffLimit": retries * nodes,
            "podFailurePolicy": {
                "rules": [
                    on_codes("FailJob", FINAL),
                    on_codes("Ignore", (RESUMABLE,)),
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {
                "spec": {
                    **({"subdomain": wanted.name} if several else {}),
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
    documents = [_names(wanted.name), job] if several else [job]
    text = yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=None, width=120)
    name = "kubernetes-nodes.yaml" if several else "kubernetes.yaml"
    return Submission(text=text, filename=name, commands=(("kubectl", "create", "-f", "{file}"),))


def _names(name: str) -> dict[str, Any]:
    """The Service that gives pod `name`-0 of job `name` the host name `name`-0.`name`."""
    # Launchers look for each other before any of them could be called ready.
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"batch.kubernetes.io/job-name": name}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}
