"""Ray: a job of a running cluster. Ray starts a job once, so the supervisor does all the restarting."""

from __future__ import annotations

from wbdist.launch.places.wanted import Submission, Wanted


def render(wanted: Wanted, *, address: str | None = None) -> Submission:
    """`address`: the cluster's, as in RAY_ADDRESS, which counts without it."""
    where = ("--address", address) if address else ()
    needs = ("--entrypoint-num-cpus", str(wanted.nproc), *(("--entrypoint-num-gpus", str(wanted.gpus)) if wanted.gpus else ()))
    command = ("ray", "job", "submit", *where, "--working-dir", ".", *needs, "--", *wanted.command(on_preempt="relaunch"))
    return Submission(text="", filename="ray.sh", commands=(command,))
