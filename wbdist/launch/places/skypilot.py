"""SkyPilot: a managed job, which finds another machine after a preemption, and after our exit code that asks for it."""

from __future__ import annotations

import shlex
from typing import Any

import yaml  # type: ignore[import-untyped]

from wbdist.launch.places.wanted import RESUMABLE, Submission, Wanted


def render(
    wanted: Wanted, *, accelerators: str | None = None, bucket: str | None = None, mount: str = "/checkpoints"
) -> Submission:
    """`accelerators` as SkyPilot names them (`A100:8`); `bucket`: where the checkpoints are, mounted at `mount`."""
    recovery = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [RESUMABLE]}
    resources = {**({"accelerators": accelerators} if accelerators else {}), "use_spot": True, "job_recovery": recovery}
    task: dict[str, Any] = {"name": wanted.name, "resources": resources, "workdir": "."}
    if bucket:
        task["file_mounts"] = {mount: {"name": bucket, "mode": "MOUNT"}}
    task["run"] = f"exec {shlex.join(wanted.command(on_preempt='exit'))}\n"
    text = yaml.safe_dump(task, sort_keys=False, width=1000)
    command = ("sky", "jobs", "launch", "--yes", "-n", wanted.name, "{file}")
    return Submission(text=text, filename="skypilot.yaml", commands=(command,))
