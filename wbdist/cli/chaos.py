"""`wbdist chaos`: preemptions, rehearsed on this machine."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from wbdist.preemption.rehearsal.runner import Event, rehearse

if TYPE_CHECKING:
    from wbdist.preemption.rehearsal.batch import Ending


class Duration(click.ParamType[float]):
    """`10`, `10s`, `1.5m`, `2h` as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no duration; give seconds, or a number with s, m or h: 10s", param, ctx)
        return float(match[1]) * {"m": 60.0, "h": 3600.0}.get(match[2] or "s", 1.0)


class Plan(msgspec.Struct, frozen=True):
    """What all rehearsals have."""

    after: float
    lead: float
    no_end: bool
    command_line: tuple[str, ...]

    def run(self, events: Sequence[Event], environment: dict[str, str] | None = None) -> NoReturn:
        """Leaves with the command's exit code."""
        end = None if self.no_end else self.after + self.lead
        sys.exit(rehearse(self.command_line, environment or {}, events, end))


def _planned(lead: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives the function a Plan of the options that all rehearsals have, `lead` being the default."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def planned(*, after: float, lead: float, no_end: bool, command_line: tuple[str, ...], **rest: Any) -> None:
            function(Plan(after, lead, no_end, command_line), **rest)

        decorated: Callable[..., None] = planned
        for option in (
            click.argument("command_line", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED),
            click.option("--no-end", is_flag=True, help="Only the notice: the machine stays."),
            click.option(
                "--lead", default=lead, show_default=True, type=Duration(), help="From the notice until the machine is gone."
            ),
            click.option(
                "--after", default="10s", show_default=True, type=Duration(), help="From the command's start to the notice."
            ),
        ):
            decorated = option(decorated)
        return decorated

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Rehearse preemptions: run a job here as if on a machine that is being taken away.

    \b
    Example:
        wbdist chaos aws --after 10s -- wbdist launch --nproc 2 train.py
        wbdist chaos signal --signal TERM --lead 30s -- torchrun --nproc-per-node 2 train.py

    A metadata service on loopback gives the notice as the cloud would (paths, tokens, headers, requests that hang), and when
    the lead is over everything that the command has started is killed. The exit code is the command's: 75 when it has
    saved and can be continued, 137 when it was still there at the end.
    """


_CONTEXT: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@command.command(context_settings=_CONTEXT)
@click.option("--action", default="terminate", show_default=True, type=click.Choice(["terminate", "stop", "hibernate"]))
@click.option("--rebalance-after", type=Duration(), help="Also a rebalance recommendation, this long after the start.")
@click.option(
    "--maintenance",
    type=click.Choice(["instance-stop", "instance-reboot", "system-reboot", "system-maintenance", "instance-retirement"]),
    help="A scheduled event at the end of --lead, instead of a spot interruption.",
)
@click.option("--lost-tokens", is_flag=True, help="The token never arrives: a container behind hop limit 1.")
@_planned("120s")
def aws(plan: Plan, action: str, rebalance_after: float | None, maintenance: str | None, lost_tokens: bool) -> None:
    """An EC2 spot interruption, or scheduled maintenance."""
    from wbdist.preemption.rehearsal.aws import AwsMetadata

    with AwsMetadata(lost_tokens=lost_tokens) as service:
        what = f"EC2: {maintenance or action} in {plan.lead:g} s"

        def happen(_pid: int) -> None:
            if maintenance is None:
                service.interrupt(action, plan.lead)
            else:
                service.schedule_maintenance(maintenance, plan.lead)

        events = [Event(plan.after, what, happen)]
        if rebalance_after is not None:
            events.append(Event(rebalance_after, "EC2: rebalance recommendation", lambda _: service.recommend_rebalance()))
        plan.run(events, {"WBDIST_NOTICES": "aws", "WBDIST_AWS_METADATA": service.url})


@command.command(context_settings=_CONTEXT)
@click.option("--maintenance", is_flag=True, help="Terminated for host maintenance, instead of preempted.")
@click.option(
    "--window-after", type=Duration(), help="Also a window of maintenance days ahead, known this long after the start."
)
@_planned("30s")
def gcp(plan: Plan, maintenance: bool, window_after: float | None) -> None:
    """A preempted Google Compute Engine instance."""
    from wbdist.preemption.rehearsal.gcp import GcpMetadata

    with GcpMetadata() as service:
        what = "host maintenance" if maintenance else "preempted"
        happen = service.announce_maintenance if maintenance else service.preempt
        events = [Event(plan.after, f"GCE: {what}, {plan.lead:g} s left", lambda _: happen())]
        if window_after is not None:
            events.append(Event(window_after, "GCE: a window of maintenance in 3 days", lambda _: service.plan_maintenance()))
        plan.run(events, {"WBDIST_NOTICES": f"gcp={plan.lead:g}", "WBDIST_GCP_METADATA": service.url})


@command.command(context_settings=_CONTEXT)
@click.option(
    "--event", default="Preempt", show_default=True, type=click.Choice(["Freeze", "Reboot", "Redeploy", "Preempt", "Terminate"])
)
@_planned("30s")
def azure(plan: Plan, event: str) -> None:
    """An Azure scheduled event."""
    from wbdist.preemption.rehearsal.azure import AzureMetadata

    with AzureMetadata() as service:
        events = [Event(plan.after, f"Azure: {event} in {plan.lead:g} s", lambda _: service.schedule(event, plan.lead))]
        plan.run(events, {"WBDIST_NOTICES": "azure", "WBDIST_AZURE_METADATA": service.url})


@command.command("signal", context_settings=_CONTEXT)
@click.option(
    "--signal", "name", default="TERM", show_default=True, type=click.Choice(["TERM", "USR1", "USR2", "INT", "HUP", "KILL"])
)
@_planned("30s")
def send_signal(plan: Plan, name: str) -> None:
    """A signal to the command, as schedulers and container runtimes send it."""
    number = signal.Signals[f"SIG{name}"]
    plan.run([Event(plan.after, f"{number.name} to the command", lambda pid: os.kill(pid, number))])


@command.command(context_settings=_CONTEXT)
@click.option(
    "--ending",
    default="preempt",
    show_default=True,
    type=click.Choice(["preempt", "cancel", "timeout"]),
    help="Preempted within GraceTime, scancel, or the time limit with --signal=USR2.",
)
@_planned("30s")
def slurm(plan: Plan, ending: Ending) -> None:
    """A Slurm job's end; `scontrol` is replaced by one that says what the real one would."""
    from wbdist.preemption.rehearsal.batch import SlurmRehearsal

    # A time limit ends with the rehearsal; otherwise it is far away.
    limit = plan.after + plan.lead + (0.0 if ending == "timeout" else 86400.0)
    with tempfile.TemporaryDirectory(prefix="wbdist-chaos-") as directory:
        job = SlurmRehearsal(Path(directory), limit)
        plan.run(job.events(ending, plan.after), {"WBDIST_NOTICES": "slurm", **job.environment})


@command.command(context_settings=_CONTEXT)
@click.option("--reason", default="PreemptionByScheduler", show_default=True, help="Of the pod's DisruptionTarget condition.")
@click.option("--forbidden", is_flag=True, help="The service account may not ask for the pod.")
@_planned("30s")
def kubernetes(plan: Plan, reason: str, forbidden: bool) -> None:
    """A deleted pod: SIGTERM, its grace (--lead), SIGKILL; the API server says when."""
    from wbdist.preemption.rehearsal.kubernetes import KubernetesApi

    with (
        tempfile.TemporaryDirectory(prefix="wbdist-chaos-") as mounts,
        KubernetesApi(Path(mounts), allowed=not forbidden) as api,
    ):

        def happen(pid: int) -> None:
            api.delete(plan.lead, reason)
            os.kill(pid, signal.SIGTERM)

        event = Event(plan.after, f"Kubernetes: pod deleted, SIGTERM, {plan.lead:g} s of grace", happen)
        plan.run([event], {"WBDIST_NOTICES": "kubernetes", **api.environment})


@command.command(context_settings=_CONTEXT)
@_planned("20s")
def lsf(plan: Plan) -> None:
    """LSF's bkill: SIGINT, 10 s later SIGTERM, 10 s later SIGKILL (--lead is not looked at)."""
    from wbdist.preemption.rehearsal import batch

    environment, events, end = batch.lsf(plan.after)
    msgspec.structs.replace(plan, lead=end - plan.after).run(events, {"WBDIST_NOTICES": "lsf", **environment})


@command.command(context_settings=_CONTEXT)
@_planned("10s")
def pbs(plan: Plan) -> None:
    """PBS's qdel or qrerun: SIGTERM, kill_delay (--lead) later SIGKILL."""
    from wbdist.preemption.rehearsal import batch

    environment, events, _ = batch.pbs(plan.after, plan.lead)
    plan.run(events, {"WBDIST_NOTICES": "pbs", **environment})
