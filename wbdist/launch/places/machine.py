"""A spot machine of its own, at EC2 or GCE: a systemd unit that keeps the supervisor running, written at first boot.

The unit is enabled, so a machine that is stopped by a preemption and started again when there is room goes on with the job.
"""

from __future__ import annotations

import json
import shlex

from wbdist.launch.places.wanted import FINAL, Submission, Wanted

UNIT = """\
[Unit]
Description=wbdist job {name}
Wants=network-online.target
After=network-online.target
# Finished: a machine that has nothing to do should not be paid for.
SuccessAction=poweroff
StartLimitIntervalSec=3600
StartLimitBurst=10

[Service]
Type=exec
WorkingDirectory={directory}
ExecStart=/usr/bin/env {command}
# The launcher alone is asked; it gives the ranks the whole grace. What is left in the end is killed.
KillMode=mixed
TimeoutStopSec={stop}
# After a notice the machine goes away within two minutes. One that is still there then goes on.
Restart=on-failure
RestartSec=150
RestartPreventExitStatus={final}

[Install]
WantedBy=multi-user.target
"""
BOOT = """\
#!/bin/bash
set -eu
unit=/etc/systemd/system/wbdist-{name}.service
if [ ! -e "$unit" ]; then
cat > "$unit" <<'UNIT'
{unit}UNIT
systemctl daemon-reload
systemctl enable --now "wbdist-{name}.service"
fi
"""


def unit(wanted: Wanted, directory: str) -> str:
    """The systemd unit. `directory`: where the script lies on the machine."""
    # In a unit % and $ mean something, and quotes are not the shell's.
    words = (word.replace("%", "%%").replace("$", "$$") for word in wanted.command(on_preempt="exit"))
    command = " ".join(word if shlex.quote(word) == word else json.dumps(word) for word in words)
    final = " ".join(map(str, FINAL))
    return UNIT.format(name=wanted.name, directory=directory, command=command, stop=int(wanted.grace) + 10, final=final)


def boot_script(wanted: Wanted, directory: str) -> str:
    """What runs as root at boot: it writes the unit the first time, and nothing afterwards."""
    return BOOT.format(name=wanted.name, unit=unit(wanted, directory))


def render_ec2(wanted: Wanted, *, image: str, machine: str, directory: str) -> Submission:
    """A persistent spot request that stops the machine: its disk, and so the checkpoints on it, stay."""
    spot = {"SpotInstanceType": "persistent", "InstanceInterruptionBehavior": "stop"}
    market = json.dumps({"MarketType": "spot", "SpotOptions": spot})
    where = ("--image-id", image, "--instance-type", machine, "--instance-market-options", market)
    # Hop limit 2: with 1, a container on the machine does not hear the notice.
    metadata = ("--metadata-options", "HttpTokens=required,HttpPutResponseHopLimit=2", "--user-data", "file://{file}")
    command = ("aws", "ec2", "run-instances", *where, *metadata)
    return Submission(text=boot_script(wanted, directory), filename="ec2-user-data.sh", commands=(command,))


def render_gce(wanted: Wanted, *, image: str, machine: str, directory: str, zone: str) -> Submission:
    """A managed group of one spot machine: GCE starts it again when there is room."""
    template = (
        "gcloud",
        "compute",
        "instance-templates",
        "create",
        wanted.name,
        f"--image={image}",
        f"--machine-type={machine}",
    )
    spot = ("--provisioning-model=SPOT", "--instance-termination-action=STOP", "--metadata-from-file=startup-script={file}")
    group = ("gcloud", "compute", "instance-groups", "managed", "create", wanted.name, f"--template={wanted.name}")
    return Submission(
        text=boot_script(wanted, directory),
        filename="gce-startup.sh",
        commands=((*template, *spot), (*group, "--size=1", f"--zone={zone}")),
    )
