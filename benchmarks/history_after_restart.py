"""What a tracker shows after a preemption: the script "log 0-9, be killed, restart from the checkpoint of step 5, log 5-11".

    python benchmarks/history_after_restart.py [--peers DIR]

Each contender runs the script as its documentation says to continue a run, in two processes; the first is SIGKILLed. A value
names the attempt that logged it, so that a row tells where it comes from. Right are steps 0-4 of the first attempt and 5-11
of the second, once each: 12 rows.

The peers live in a virtual environment of their own (DIR, default: .peers), which is made when it is missing: about 300 MB.
W&B's client runs against wbdist's server, since its own service cannot run here. What its client does is the same there (it
drops steps that the server has); what an offline run that is sent after another of the same id becomes is the server's.

As measured (doubled, missing and stale rows; 12 are right):

    wbdist.job                     0  0  0
    wandb resume="allow"           0  4  4     the replay is dropped: two branches spliced, and nothing says where
    wandb offline, both synced     0  5  0     the second replaces the first
    trackio resume="allow"         5  0  5
    mlflow, same run id            5  0  5
    tensorboard                    5  0  5
    tensorboard, purge by hand     0  0  0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path

from common.serving import Server

ROOT = Path(__file__).resolve().parents[1]
PINS = [
    "trackio==0.43.0",
    "mlflow-skinny==3.17.2",
    "sqlalchemy==2.1.9",
    "alembic==1.20.1",
    "tensorboard==2.21.0",
    "setuptools==65.5.0",
]
CUT, KILLED, END = 5, 10, 12
Row = tuple[int, int]
"""Step, and the attempt whose value it shows."""
RIGHT = [(step, 1 if step < CUT else 2) for step in range(END)]

COMMON = f"""
import os, signal, sys, time
attempt, place = int(sys.argv[1]), sys.argv[2]
first, last = (0, {KILLED}) if attempt == 1 else ({CUT}, {END})
def value(step): return attempt * 1000 + step
def end():
    if attempt == 1:
        time.sleep(PAUSE)  # for whatever is sent in the background
        os.kill(os.getpid(), signal.SIGKILL)
"""

SCRIPTS = {
    "wbdist": """
import torch, wbdist
from torch.utils.data import TensorDataset
with wbdist.job(project="bench", name="wbdist", checkpoint_dir=place + "/ckpt", save_every=5) as job:
    data = job.loader(TensorDataset(torch.zeros(12, 1)), batch_size=1)
    job.track(data=data)
    for _ in job.steps(data, epochs=1):
        job.log({"v": value(job.step)})
        time.sleep(0.2)
        if job.step == 9:
            end()
""",
    "wandb resume": """
import wandb
run = wandb.init(project="bench", id="resumed", resume="allow", dir=place)
for step in range(first, last):
    run.log({"v": value(step)}, step=step)
end()
run.finish()
""",
    "wandb offline": """
import wandb
run = wandb.init(project="bench", id="offline", mode="offline", resume="allow", dir=place)
for step in range(first, last):
    run.log({"v": value(step)}, step=step)
end()
run.finish()
""",
    "trackio": """
import trackio
run = trackio.init(project="bench", name="one", resume="allow", embed=False)
for step in range(first, last):
    trackio.log({"v": value(step)}, step=step)
end()
trackio.finish()
""",
    "mlflow": """
import mlflow, pathlib
mlflow.set_tracking_uri("sqlite:///" + place + "/mlflow.db")
known = pathlib.Path(place, "run_id")
run = mlflow.start_run(run_id=known.read_text() if known.exists() else None)
known.write_text(run.info.run_id)
for step in range(first, last):
    mlflow.log_metric("v", value(step), step=step)
end()
mlflow.end_run()
""",
    "tensorboard": """
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter
writer = EventFileWriter(place)
if PURGE and attempt == 2:
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=first, session_log=start))
for step in range(first, last):
    summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag="v", simple_value=value(step))])
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
writer.flush()
end()
writer.close()
""",
}

READERS = {
    "trackio": """
import json
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("bench", "one")
print("\\n" + json.dumps([[row["step"], row["v"]] for row in rows]))
""",
    "mlflow": """
import json, mlflow, pathlib, sys
place = sys.argv[2]
client = mlflow.MlflowClient("sqlite:///" + place + "/mlflow.db")
found = client.get_metric_history(pathlib.Path(place, "run_id").read_text(), "v")
print("\\n" + json.dumps([[metric.step, metric.value] for metric in found]))
""",
    "tensorboard": """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[2], size_guidance={"scalars": 0})
found.Reload()
tensors = found.Scalars("v")
print("\\n" + json.dumps([[event.step, event.value] for event in tensors]))
""",
}

CONTENDERS = {
    "wbdist.job": ("wbdist", ""),
    'wandb resume="allow"': ("wandb resume", "PAUSE = 20"),  # it sends every 15 s; what it has not sent by then is gone
    "wandb offline, both synced": ("wandb offline", ""),
    'trackio resume="allow"': ("trackio", ""),
    "mlflow, same run id": ("mlflow", ""),
    "tensorboard": ("tensorboard", "PURGE = False"),
    "tensorboard, purge by hand": ("tensorboard", "PURGE = True"),
}
"""Name in the table -> its script, and a line before it."""


def run(python: Path | str, code: str, attempt: int, place: Path, environment: dict[str, str]) -> str:
    """Its standard output."""
    command = [str(python), "-c", code, str(attempt), str(place)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != (-signal.SIGKILL if attempt == 1 else 0):
        raise SystemExit(f"a contender ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def shown_by_server(project_run: str, server: Server) -> list[Row]:
    """Rows of the one run whose name or id is given, as the server shows them."""
    os.environ.update(WANDB_BASE_URL=server.url, WANDB_API_KEY=server.key)
    sys.path.insert(0, str(ROOT))
    import wbdist

    (found,) = [each for each in wbdist.Api().runs("bench") if project_run in {each.id, each.name}]
    return [(row["_step"], int(row["v"]) // 1000) for row in found.scan_history() if "v" in row]


def measure(name: str, python: Path, place: Path, server: Server) -> list[Row]:
    script, line = CONTENDERS[name]
    place.mkdir()
    ours = script == "wbdist" or script.startswith("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "WBDIST_"))}
    environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": server.key, "WANDB_SILENT": "true"}
    environment |= {"WANDB_ERROR_REPORTING": "false", "TRACKIO_DIR": str(place / "trackio"), "HF_HUB_OFFLINE": "1"}
    if ours:
        environment["PYTHONPATH"] = str(ROOT)
    interpreter = sys.executable if ours else python
    for attempt in (1, 2):
        run(interpreter, f"PAUSE = 2\n{line}\n{COMMON}\n{SCRIPTS[script]}", attempt, place, environment)
    if script == "wandb offline":
        for directory in sorted((place / "wandb").glob("offline-run-*")):
            command = [sys.executable, "-m", "wandb", "sync", str(directory)]
            subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=180, check=True)
    if ours:
        return shown_by_server({"wbdist": "wbdist", "wandb resume": "resumed", "wandb offline": "offline"}[script], server)
    told = run(interpreter, READERS[script], 0, place, environment)
    return [(int(step), int(value) // 1000) for step, value in json.loads(told.splitlines()[-1])]


def peers(directory: Path) -> Path:
    """Their interpreter."""
    python = directory / "bin" / "python"
    if not python.exists():
        print(f"making {directory} with {', '.join(PINS)}")
        venv.create(directory, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", metavar="DIR")
    python = peers(parser.parse_args().peers.absolute())
    directory = Path(tempfile.mkdtemp(prefix="wbdist-bench-"))
    try:
        with Server(directory) as server:
            print(f"{'':28} {'rows':>5} {'doubled':>8} {'missing':>8} {'stale':>6}   shown, as step:attempt")
            for number, name in enumerate(CONTENDERS):
                rows = measure(name, python, directory / str(number), server)
                doubled = sum(count - 1 for count in Counter(step for step, _ in rows).values())
                missing = len(set(RIGHT) - set(rows))
                stale = sum(row not in RIGHT for row in rows)
                text = " ".join(f"{step}:{attempt}" for step, attempt in rows)
                print(f"{name:28} {len(rows):>5} {doubled:>8} {missing:>8} {stale:>6}   {text}", flush=True)
            print(f"{'right':28} {END:>5} {0:>8} {0:>8} {0:>6}   {' '.join(f'{step}:{attempt}' for step, attempt in RIGHT)}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
