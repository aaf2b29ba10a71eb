"""What both jobs of the trials share: their arguments, their notes of what they were promised, and how long a step takes.

`acks-<rank>` gets one line for each row whose `log` returned: attempt and step. Until a file `hurry` lies in the working
directory steps take --step-seconds, and the last --hold ones LONG, so that the job is there to be killed as long as wanted.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

HURRY = Path("hurry")
LONG = 0.5
"""Seconds."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--world", type=int, required=True, help="ranks, so that there are as many steps whatever their number")
    parser.add_argument("--checkpoint-dir", default="ckpt")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--save-every", default="7 steps")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--hold", type=int, default=30)
    parser.add_argument("--step-seconds", type=float, default=0.02)
    parser.add_argument("--padding", type=int, default=0, help="characters in each row, to fill a disk")
    parser.add_argument("--acks", type=Path, default=Path(), help="directory of the notes")
    return parser.parse_args()


def open_acks(args: argparse.Namespace, rank: int) -> int:
    return os.open(args.acks / f"acks-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def take_time(args: argparse.Namespace, step: int) -> None:
    if not HURRY.exists():
        time.sleep(args.step_seconds if step < args.steps - args.hold else LONG)
