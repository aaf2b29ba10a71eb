"""`wbdist submit`: a job to a scheduler or a cloud, which starts it again after a preemption."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from wbdist.errors import UsageError
from wbdist.launch.places import kubernetes, machine, ray, skypilot, slurm
from wbdist.launch.places.wanted import Submission, Wanted


@click.group()
def command() -> None:
    """Submit a supervised job to where it is to run; `wbdist submit PLACE --help` has an example of each.

    \b
    Example:
        wbdist submit slurm --dry-run --nproc 2 train.py      # print the batch script
        wbdist submit slurm --nproc 2 --time 8:00:00 train.py

    \b
    The same command starts again and continues the same run, from the checkpoints of the script:
        slurm        after a preemption or at the end of the time limit; never after scancel
        kubernetes   after an eviction, a drain or exit code 75; not after 65 or 69
        ec2, gce     a spot machine of its own, started again by the cloud when there is room
        skypilot     on another machine, wherever there is one
        ray          in place: Ray starts a job only once
    """


def place(name: str, *, python: str | None = None) -> Callable[[Callable[..., Submission]], click.Command]:
    """Makes a command of a function from options to a submission, with the options that all places have before its own.
    `python`: the interpreter by default."""

    def decorate(render: Callable[..., Submission]) -> click.Command:
        def run(dry_run: bool, script: str, args: tuple[str, ...], as_module: bool, **options: Any) -> None:
            shared = {field: options.pop(field) for field in ("nproc", "gpus", "name", "grace", "python")}
            named = script.rpartition(".")[2] if as_module else Path(script).stem
            shared["name"] = shared["name"] or named.lower().replace("_", "-")
            try:
                submission = render(Wanted(script=script, arguments=args, module=as_module, **shared), **options)
            except UsageError as error:
                raise click.UsageError(str(error)) from error
            if dry_run:
                click.echo(submission.render(), nl=False)
            else:
                sys.exit(submit(submission))

        decorated: Callable[..., Any] = run
        for option in reversed(
            [
                click.option("--nproc", default=1, show_default=True, type=click.IntRange(1), help="Ranks."),
                click.option("--gpus", default=0, show_default=True, type=click.IntRange(0), help="GPUs for the whole job."),
                click.option("--name", help="The job's name. [default: from SCRIPT]"),
                click.option(
                    "--grace",
                    default=110.0,
                    show_default=True,
                    type=click.FloatRange(0),
                    help="Seconds the ranks have to save.",
                ),
                click.option("--python", default=python or "python3", help="The interpreter, where the job runs."),
            ]
        ):
            decorated = option(decorated)
        decorated = click.argument("args", nargs=-1, type=click.UNPROCESSED)(decorated)
        decorated = click.argument("script")(decorated)
        decorated = click.option("-m", "as_module", is_flag=True, help="SCRIPT is a module's name.")(decorated)
        decorated = click.option("--dry-run", is_flag=True, help="Print what would be submitted, and how.")(decorated)
        made = command.command(name, help=render.__doc__, context_settings={"allow_interspersed_args": False})(decorated)
        made.params += reversed(getattr(render, "__click_params__", []))
        return made

    return decorate


def submit(submission: Submission) -> int:
    """Carries it out; the exit code of the first command that failed, else 0."""
    with tempfile.TemporaryDirectory(prefix="wbdist-submit-") as directory:
        file = Path(directory, submission.filename)
        file.write_text(submission.text)
        for words in submission.commands:
            if shutil.which(words[0]) is None:
                click.echo(f"wbdist submit: there is no {words[0]!r} here; --dry-run prints what to submit elsewhere", err=True)
                return 65
            code = subprocess.run([word.replace("{file}", str(file)) for word in words], check=False).returncode
            if code:
                return code
    return 0


def _nodes(meaning: str) -> Callable[[Any], Any]:
    return click.option("--nodes", default=1, show_default=True, type=click.IntRange(1), help=meaning)


@click.option("--time", help="Time limit, as for sbatch.")
@click.option("--partition", help="Partition.")
@click.option("--cpus", type=click.IntRange(1), help="CPUs for the whole job. [default: one a rank]")
@_nodes("Nodes; --nproc, --cpus, --gpus are then each node's.")
@click.option("--extra", multiple=True, metavar="OPTION", help="Another option for sbatch, such as --extra=--account=a.")
def _slurm(wanted: Wanted, **options: Any) -> Submission:
    """A Slurm batch job on one node or several, queued again by the job itself after a preemption.

    \b
    Example:
        wbdist submit slurm --nproc 4 --gpus 4 --time 8:00:00 --partition spot train.py --lr 0.1
        wbdist submit slurm --nodes 2 --nproc 8 --gpus 8 train.py
    """
    return slurm.render(wanted, **options)


@click.option("--image", required=True, help="Container image with wbdist and the script.")
@click.option("--claim", required=True, help="PersistentVolumeClaim for the checkpoints.")
@click.option("--mount", default="/checkpoints", show_default=True, help="Where the claim is mounted.")
@click.option("--retries", default=6, show_default=True, type=click.IntRange(0), help="Failures in all.")
@_nodes("Pods of one job; --nproc, --gpus are then each one's.")
def _kubernetes(wanted: Wanted, **options: Any) -> Submission:
    """A Kubernetes Job (1.31 or newer) whose pod failure policy knows wbdist's exit codes.

    \b
    Example:
        wbdist submit kubernetes --image registry/train:1 --claim checkpoints --gpus 1 /app/train.py
        wbdist submit kubernetes --nodes 2 --nproc 8 --gpus 8 --image registry/train:1 --claim shared /app/train.py
    """
    return kubernetes.render(wanted, **options)


@click.option("--image", required=True, help="Machine image (AMI) with wbdist and the script.")
@click.option("--machine", required=True, help="Instance type, such as g5.xlarge.")
@click.option("--directory", default="/opt/job", show_default=True, help="Where the job runs on the machine.")
def _ec2(wanted: Wanted, **options: Any) -> Submission:
    """An EC2 spot machine of its own; stopped by an interruption and started again by EC2 with its disk.

    \b
    Example:
        wbdist submit ec2 --image ami-0abc --machine g5.xlarge --python /opt/venv/bin/python train.py
    """
    return machine.render_ec2(wanted, **options)


@click.option("--image", required=True, help="Machine image with wbdist and the script.")
@click.option("--machine", required=True, help="Machine type, such as g2-standard-4.")
@click.option("--zone", required=True, help="Zone.")
@click.option("--directory", default="/opt/job", show_default=True, help="Where the job runs on the machine.")
def _gce(wanted: Wanted, **options: Any) -> Submission:
    """A managed group of one GCE spot machine, which GCE starts again after a preemption.

    \b
    Example:
        wbdist submit gce --image my-image --machine g2-standard-4 --zone us-central1-a train.py
    """
    return machine.render_gce(wanted, **options)


@click.option("--accelerators", help="As SkyPilot names them: A100:8.")
@click.option("--bucket", help="Bucket for the checkpoints.")
@click.option("--mount", default="/checkpoints", show_default=True, help="Where the bucket is mounted.")
def _skypilot(wanted: Wanted, **options: Any) -> Submission:
    """A SkyPilot managed job on spot machines.

    \b
    Example:
        wbdist submit skypilot --accelerators A100:1 --bucket my-checkpoints train.py
    """
    return skypilot.render(wanted, **options)


@click.option("--address", help="The cluster's. [default: RAY_ADDRESS]")
def _ray(wanted: Wanted, **options: Any) -> Submission:
    """A job of a running Ray cluster, supervised in place.

    \b
    Example:
        wbdist submit ray --nproc 2 --gpus 2 train.py
    """
    return ray.render(wanted, **options)


place("slurm", python=sys.executable)(_slurm)
place("kubernetes")(_kubernetes)
place("ec2")(_ec2)
place("gce")(_gce)
place("skypilot")(_skypilot)
place("ray")(_ray)
