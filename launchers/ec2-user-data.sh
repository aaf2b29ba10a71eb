#!/bin/bash
set -eu
unit=/etc/systemd/system/wbdist-train.service
if [ ! -e "$unit" ]; then
cat > "$unit" <<'UNIT'
[Unit]
Description=wbdist job train
Wants=network-online.target
After=network-online.target
# Finished: a machine that has nothing to do should not be paid for.
SuccessAction=poweroff
StartLimitIntervalSec=3600
StartLimitBurst=10

[Service]
Type=exec
WorkingDirectory=/opt/job
ExecStart=/usr/bin/env python3 -m wbdist launch --nproc 4 --grace 110 --on-preempt exit train.py
# The launcher alone is asked; it gives the ranks the whole grace. What is left in the end is killed.
KillMode=mixed
TimeoutStopSec=120
# After a notice the machine goes away within two minutes. One that is still there then goes on.
Restart=on-failure
RestartSec=150
RestartPreventExitStatus=65 69

[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable --now "wbdist-train.service"
fi
# submitted with: aws ec2 run-instances --image-id ami-0123456789abcdef0 --instance-type g5.12xlarge --instance-market-options '{"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "persistent", "InstanceInterruptionBehavior": "stop"}}' --metadata-options HttpTokens=required,HttpPutResponseHopLimit=2 --user-data file://ec2-user-data.sh
