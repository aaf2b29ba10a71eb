"""What `wbdist submit` renders for each place: the files of `launchers/` are that, and what they start does what they say."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from support.launching import SCRIPT
from support.ports import free_port

from wbdist.cli import main
from wbdist.cli.submit import submit
from wbdist.launch.places.wanted import Submission

LAUNCHERS = Path(__file__).parents[2] / "launchers"
RENDERED = re.findall(r"^ {4}wbdist (submit .*)$", (LAUNCHERS / "README.md").read_text(), re.MULTILINE)


def dry_run(place: str, *arguments: str) -> str:
    done = CliRunner().invoke(main, ["submit", place, "--dry-run", "--name", "t", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def tool(directory: Path, name: str, script: str) -> None:
    """An executable `name` for PATH that stands for a tool of the place; it notes its arguments in <name>.log."""
    path = directory / name
    path.write_text(f'#!/bin/bash\necho "$@" >> {directory}/{name}.log\n{script}\n')
    path.chmod(0o755)


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{cwd}:{os.environ['PATH']}", **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", RENDERED, ids=lambda command: "-".join(command.split()[1:6:2]))
def test_files_to_copy_are_what_submit_renders(command: str) -> None:
    """Proves that the files of launchers/ are up to date, and the README's commands right."""
    done = CliRunner().invoke(main, shlex.split(command))
    assert done.exit_code == 0, done.output
    names = {"slurm": "slurm.sbatch", "ec2": "ec2-user-data.sh", "gce": "gce-startup.sh", "ray": "ray.sh"}
    place = command.split()[1]
    if "--nodes" in command:
        names |= {"slurm": "slurm-nodes.sbatch", "kubernetes": "kubernetes-nodes.yaml"}
    assert done.output == (LAUNCHERS / names.get(place, f"{place}.yaml")).read_text()


def test_every_file_is_in_the_readme() -> None:
    """Proves that there is a command and a row for each file."""
    files = {path.name for path in LAUNCHERS.iterdir()} - {"README.md"}
    assert files == set(re.findall(r"\]\((\S+)\)", (LAUNCHERS / "README.md").read_text()))
    assert len(files) == len(RENDERED)


SHOW = 'if [ "$1" = show ]; then echo JobId=7 JobState={state} Restarts={restarts} Requeue=1; fi'


@pytest.mark.parametrize(
    ("code", "state", "restarts", "asked", "said"),
    [
        ("75,75", "RUNNING", 1, True, "Slurm job 7 is queued again"),
        ("75,75", "COMPLETING", 1, False, "Slurm job 7 was cancelled: not queued again"),
        ("75,75", "COMPLETING", 2, False, "Slurm job 7 is queued again"),
        ("65,0", "RUNNING", 1, False, "not started again"),
    ],
)
def test_slurm_script_requeues_what_was_preempted_and_only_that(
    tmp_path: Path, code: str, state: str, restarts: int, asked: bool, said: str
) -> None:
    """Proves, by running the batch script with stand-ins for srun and scontrol, each row of requeue.py's table."""
    script = tmp_path / "job.sh"
    script.write_text(dry_run("slurm", "--nproc", "2", "--python", sys.executable, str(SCRIPT), "codes", code))
    tool(tmp_path, "srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    tool(tmp_path, "scontrol", SHOW.format(state=state, restarts=restarts))
    done = run(["bash", str(script)], tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert (done.returncode, said in done.stderr) == (int(code[:2]), True), done.stderr
    log = tmp_path / "scontrol.log"
    assert ("requeue 7" in (log.read_text() if log.exists() else "")) == asked


def test_slurm_that_does_not_answer_is_said(tmp_path: Path) -> None:
    """Proves that a failed requeue is told with the command to do it by hand, that an array's task is named as Slurm does, and
    that outside of Slurm the option is refused."""
    tool(tmp_path, "scontrol", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    command = [sys.executable, "-m", "wbdist", "launch", "--on-preempt", "requeue", str(SCRIPT), "codes", "75"]
    done = run(command, tmp_path, SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 75
    assert "Unable to contact slurm controller); do it by hand: scontrol requeue 7_3" in done.stderr
    refused = run(command, tmp_path)
    assert refused.returncode == 2
    assert "SLURM_JOB_ID is not set" in refused.stderr


def test_kubernetes_policy_and_our_exit_codes(tmp_path: Path) -> None:
    """Proves with the container's own command, run here, what the Job controller does after each code of the contract."""

    def action(code: int) -> str:
        """As the controller: the first rule that matches; a failure without one counts."""
        for rule in spec["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", []):
                return str(rule["action"])
        return "Count"

    expected = {"75": "Ignore", "65": "FailJob", "69": "FailJob"}
    for code in ("75", "65", "69"):
        common = ("--image", "i", "--claim", "c", "--python", sys.executable)
        job: dict[str, Any] = yaml.safe_load(dry_run("kubernetes", *common, str(SCRIPT), "codes", code))
        spec = job["spec"]
        container = spec["template"]["spec"]["containers"][0]
        assert action(run(container["command"], tmp_path).returncode) == expected[code]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the API refuses a policy with another
    assert action(70) == "Count"
    assert {"type": "DisruptionTarget", "status": "True"} in spec["podFailurePolicy"]["rules"][2]["onPodConditions"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    grace = float(container["command"][container["command"].index("--grace") + 1])
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > grace


def test_kubernetes_pods_of_several_nodes_are_one_job(tmp_path: Path) -> None:
    """Proves with the containers' own commands, run here with what the kubelet fills in, that the pods meet at pod 0's name,
    number their ranks by the pods' indices and leave with one code, which the policy lets go; and that the Service gives the
    name."""
    options = ("--nodes", "2", "--image", "i", "--claim", "c", "--retries", "3", "--python", sys.executable)
    service, job = yaml.safe_load_all(dry_run("kubernetes", *options, str(SCRIPT), "codes", "75,0"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == ("Indexed", 2, 2, 6)
    assert (service["kind"], service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == (
        "Service",
        "None",
        True,
    )
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    command = pod["containers"][0]["command"]
    host, _, port = command[command.index("--rdzv-endpoint") + 1].partition(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    here = f"localhost:{free_port()}"
    started = []
    for index in ("0", "1"):
        filled = [word.replace("$(JOB_COMPLETION_INDEX)", index).replace(f"{host}:{port}", here) for word in command]
        env = {**os.environ, "JOB_COMPLETION_INDEX": index}
        started.append(subprocess.Popen(filled, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=60)[1] for process in started]
    for number, process in enumerate(started):
        assert process.returncode in spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"], told
        assert f"on 2 rank(s), here rank {number}" in told[number]
    assert spec["podFailurePolicy"]["rules"][1]["action"] == "Ignore"


def test_machine_installs_its_unit_once_and_the_unit_runs_the_job(tmp_path: Path) -> None:
    """Proves that the boot script (run with a stand-in for systemctl) enables the unit at the first boot only, that systemd
    accepts it, and that its command is the job with its arguments as they were."""
    options = ("--image", "i", "--machine", "m", "--directory", str(tmp_path), "--python", sys.executable)
    text = dry_run("ec2", *options, str(SCRIPT), "codes", "75", "100% $HOME", "it's")
    assert (
        text.split("# submitted")[0]
        == dry_run("gce", *options, "--zone", "z", str(SCRIPT), "codes", "75", "100% $HOME", "it's").split("# submitted")[0]
    )
    script = tmp_path / "boot.sh"
    script.write_text(text.replace("/etc/systemd/system", str(tmp_path)))
    tool(tmp_path, "systemctl", "")
    for _ in range(2):
        assert run(["bash", str(script)], tmp_path).returncode == 0
    assert (tmp_path / "systemctl.log").read_text() == "daemon-reload\nenable --now wbdist-t.service\n"
    unit = tmp_path / "wbdist-t.service"
    if shutil.which("systemd-analyze"):
        verified = run(["systemd-analyze", "verify", "--man=no", str(unit)], tmp_path)
        assert str(unit) not in verified.stderr, verified.stderr
    facts = configparser.ConfigParser(strict=False, interpolation=None)
    facts.optionxform = str  # type: ignore[assignment,method-assign]
    facts.read(unit)
    command = shlex.split(facts["Service"]["ExecStart"].replace("%%", "%").replace("$$", "$"))
    assert command[-2:] == ["100% $HOME", "it's"]
    assert run(command, tmp_path).returncode == 75
    final = facts["Service"]["RestartPreventExitStatus"].split()
    assert ("75" in final, "65" in final, "69" in final) == (False, True, True)


def test_skypilot_recovers_after_our_code_and_ray_job_restarts_itself(tmp_path: Path) -> None:
    """Proves with the tasks' own commands, run here, that SkyPilot is told of the code that asks for another start, and that a
    Ray job, which is started once, goes on in place."""
    task = yaml.safe_load(dry_run("skypilot", "--python", sys.executable, str(SCRIPT), "codes", "75"))
    done = run(["bash", "-c", task["run"]], tmp_path)
    assert done.returncode in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    words = shlex.split(dry_run("ray", "--python", sys.executable, "--nproc", "2", str(SCRIPT), "preempted-once"))
    assert words[:3] == ["ray", "job", "submit"]
    done = run(words[words.index("--") + 1 :], tmp_path)
    assert (done.returncode, done.stderr.count("starting rank_script.py")) == (0, 2), done.stderr


def test_submit_runs_the_commands_in_order_and_stops_at_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Proves phase two: the file is there while the tools run, a failure's code is ours, a missing tool is said."""
    tool(tmp_path, "first", "cat $1; exit 3")
    tool(tmp_path, "second", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    wish = Submission(text="the job\n", filename="f.yaml", commands=(("first", "{file}"), ("second", "{file}")))
    assert submit(wish) == 3
    assert capfd.readouterr().out == "the job\n"
    assert not (tmp_path / "second.log").exists()
    assert submit(Submission(text="", filename="f", commands=(("no-such-tool",),))) == 65
    assert "--dry-run prints" in capfd.readouterr().err


@pytest.mark.parametrize("bad", [["--name", "My Job", "t.py"], ["--tim", "1", "t.py"], ["--nproc", "0", "t.py"]])
def test_what_cannot_be_submitted_is_refused(bad: list[str]) -> None:
    """Proves that a wrong name, option or number ends with a usage message and submits nothing."""
    assert CliRunner().invoke(main, ["submit", "slurm", *bad]).exit_code == 2
