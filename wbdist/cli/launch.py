"""`wbdist launch`: supervised ranks of one script on this host, or on several."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Literal

import click

from wbdist.errors import UsageError
from wbdist.launch.nodes.node import Meeting, endpoint, supervise_node
from wbdist.launch.output import CommandRanks
from wbdist.launch.requeue import job_of
from wbdist.launch.supervisor import LaunchSpec, environments, supervise

PER_START = ("MASTER_PORT", "WBDIST_CAUSE", "WBDIST_INCARNATION", "WBDIST_INTENT_DIR", "WBDIST_LAUNCHER_PID", "WBDIST_RESTART")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--nproc", "--nproc-per-node", default=1, show_default=True, type=click.IntRange(1), help="Ranks to start on this host."
)
@click.option("--nnodes", default="1", show_default=True, help="Hosts of the job, or MIN:MAX; the same command on each.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the hosts meet: one of them, and a free port there.")
@click.option(
    "--node-rank", type=click.IntRange(0), help="Number of this host; 0 has the rendezvous. [default: srun's, else by arrival]"
)
@click.option("--rdzv-id", envvar="SLURM_JOB_ID", default="wbdist", help="Tells jobs apart. [default: the Slurm job's id]")
@click.option(
    "--join-timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds to wait for all hosts, at the start and after one was lost.",
)
@click.option(
    "--keep-alive",
    default=15.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds of silence after which a host is lost.",
)
@click.option(
    "--max-restarts", default=3, show_default=True, type=click.IntRange(0), help="Restarts in a row without a new checkpoint."
)
@click.option(
    "--grace", default=30.0, show_default=True, type=click.FloatRange(0), help="Seconds the ranks have after a signal."
)
@click.option(
    "--on-preempt",
    default="exit",
    show_default=True,
    type=click.Choice(["exit", "relaunch", "requeue"]),
    help="After a preemption: leave with code 75 for the scheduler to requeue, start again here, or ask Slurm to requeue.",
)
@click.option(
    "--log-dir", type=click.Path(path_type=Path, file_okay=False), help="Also write each rank's output to files here."
)
@click.option(
    "--standby-after",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Then keep a process that has torch imported (0.2 GB); restarted ranks are forked from it. [default: none]",
)
@click.option("--dry-run", is_flag=True, help="Print what each rank would run, and stop.")
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is a module's name, as in python -m.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(  # noqa: PLR0917  (click passes by name)
    nproc: int,
    nnodes: str,
    rdzv_endpoint: str | None,
    node_rank: int | None,
    rdzv_id: str,
    join_timeout: float,
    keep_alive: float,
    max_restarts: int,
    grace: float,
    on_preempt: Literal["exit", "relaunch", "requeue"],
    log_dir: Path | None,
    standby_after: float | None,
    dry_run: bool,
    as_module: bool,
    script: str,
    args: tuple[str, ...],
) -> None:
    """Run SCRIPT on several ranks of this host, or of several, keep it alive, and leave nothing behind.

    \b
    Example:
        wbdist launch --nproc 2 train.py --lr 0.1
        wbdist launch --nproc 8 --on-preempt relaunch --log-dir logs train.py
        wbdist launch --nnodes 2 --rdzv-endpoint node0:29400 --nproc-per-node 4 train.py      # on each host

    A crash restarts all ranks from the last committed checkpoint, after a pause that grows while nothing new is committed. Only
    attempts in a row that committed nothing count against --max-restarts: a job that moves on may crash as often as it likes.
    SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGUSR2 and SIGHUP reach every rank, which has the whole grace to save; a second Ctrl-C
    kills. With --on-preempt relaunch, Ctrl-C and SIGHUP still end the job.

    With --nnodes the ranks of all hosts are one job: one that fails, or a host that is lost, restarts all once all hosts are
    there again (with MIN:MAX, enough of them); a signal to one launcher stops all; all leave with the same code. Where
    strangers reach the port, set WBDIST_RDZV_SECRET to the same on all hosts.

    \b
    Exit codes: 0 finished; 75 preempted and saved, run the same command to continue; 70 failed, a retry may help;
    65 failed for good; 69 another job owns the run; 128+signal stopped before anything could be saved.
    """
    meeting = _meeting(nnodes, rdzv_endpoint, node_rank, rdzv_id, join_timeout, keep_alive)
    if not as_module and not Path(script).is_file():
        raise click.UsageError(f"there is no script {script!r}; give the path of a Python file, or -m and a module's name")
    if on_preempt == "requeue" and not dry_run:
        try:
            job_of()
        except UsageError as error:
            raise click.UsageError(f"--on-preempt requeue: {error}") from error
    spec = LaunchSpec(nprocs=nproc, name=Path(script).name, max_restarts=max_restarts, grace=grace, on_preempt=on_preempt)
    ranks = CommandRanks([script, *args], module=as_module, log_dir=log_dir, standby_after=standby_after)
    if dry_run:
        for extra in environments(spec, number=0, cause="", intents="DIRECTORY", port=0):
            known = {name: value for name, value in extra.items() if name not in PER_START}
            click.echo(shlex.join([*(f"{name}={value}" for name, value in sorted(known.items())), *ranks.command]))
        click.echo(f"# and, new for each start: {', '.join(PER_START)}")
        return
    try:
        if meeting is None:
            code = supervise(spec, ranks.start, last_lines=ranks.last_lines)
        else:
            code = supervise_node(spec, meeting, ranks.start, last_lines=ranks.last_lines)
    except UsageError as error:
        click.echo(f"wbdist launch: {error}", err=True)
        code = error.exit_code
    finally:
        ranks.close()
    sys.exit(code)


def _meeting(  # noqa: PLR0917  (as click names them)
    nnodes: str,
    place: str | None,
    node_rank: int | None,
    job: str,
    join_timeout: float,
    keep_alive: float,
) -> Meeting | None:
    """None for one host. Raises click.UsageError."""
    if nnodes == "1":
        return None
    fewest, _, most = nnodes.rpartition(":")
    if not (most.isdigit() and (fewest or most).isdigit()):
        raise click.UsageError(f"--nnodes {nnodes}: give a number of hosts, or MIN:MAX where hosts may come and go")
    if place is None:
        raise click.UsageError(f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT: one of the hosts, and a free port there")
    step = [os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NUM_NODES", "STEP_NUM_TASKS", "NODEID")]
    if node_rank is None and step[:2] == [nnodes, nnodes]:  # srun has started one of us on each node, and numbers them
        node_rank = int(step[2])
    try:
        host, port = endpoint(place)
        return Meeting(
            nnodes=(int(fewest or most), int(most)),
            host=host,
            port=port,
            job=job,
            secret=os.environ.get("WBDIST_RDZV_SECRET", ""),
            node_rank=node_rank,
            join_timeout=join_timeout,
            keep_alive=keep_alive,
        )
    except UsageError as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    command()
