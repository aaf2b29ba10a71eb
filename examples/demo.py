"""The whole promise in a minute: a DDP job is preempted, killed and resumed, and nobody could tell from its results.

    python examples/demo.py [--out DIR] [--epochs N]

1. Starts a server on loopback, with its own data directory.
2. Trains digits_ddp.py on 2 ranks under `wbdist launch`; half-way sends SIGTERM to the launcher (a preemption notice),
   then SIGKILL to one rank of the next attempt. Each time the job comes back by itself.
3. Trains the same job once, uninterrupted, in another directory.
4. Reads both runs back through the server's API and compares them row by row.

Exits 1 when anything differs or the held-out accuracy is below 0.97.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import wbdist

HERE = Path(__file__).resolve().parent
PROJECT = "digits-demo"
STEPS_PER_EPOCH = 22  # 1,437 training images, 2 ranks x 32 a step, ragged tail dropped
WALL_CLOCK_KEYS = {"_timestamp", "_runtime"}
"""The only columns that two runs of the same job may differ in."""


class DemoFailedError(Exception):
    """Something did not hold; the message says what."""


class Job:
    """One supervised training job, followed through the server's API alone."""

    def __init__(self, label: str, out: Path, epochs: int, env: dict[str, str]) -> None:
        self.label = label
        self.name = f"{label}-{time.strftime('%H%M%S')}"
        self.log_path = out / f"{label}.log"
        self._env = env
        self._command = [
            *(sys.executable, "-m", "wbdist", "launch", "--nproc", "2", "--on-preempt", "relaunch"),
            *(str(HERE / "digits_ddp.py"), "--project", PROJECT, "--name", self.name),
            *("--checkpoint-dir", str(out / label / "checkpoints"), "--save-every", "50 steps", "--epochs", str(epochs)),
        ]
        self._cwd = out / label
        self._cwd.mkdir(parents=True)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The launcher; only inside `running`."""
        assert self._process is not None
        return self._process

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Starts the launcher; leaves no process behind, whatever happens in the block."""
        with self.log_path.open("wb") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT, env=self._env, cwd=self._cwd)
        self._process = process
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()

    def run(self) -> Any | None:
        """The run as the server has it now, None before the job has registered it."""
        found = list(wbdist.Api().runs(PROJECT, filters={"display_name": self.name}))
        return found[0] if found else None

    def steps_done(self) -> int:
        run = self.run()
        return 0 if run is None else run.lastHistoryStep + 1

    def attempt(self) -> int:
        run = self.run()
        return 0 if run is None else len(run.attempts())

    def rank_process(self, rank: int) -> psutil.Process:
        """The live process of one rank, found by its environment."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank) and child.status() != psutil.STATUS_ZOMBIE and _is_worker(child):
                    return child
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        raise DemoFailedError(f"no live process of rank {rank} below the launcher; see {self.log_path}")


def _is_worker(process: psutil.Process) -> bool:
    """A rank itself, not a helper that inherited its environment (aggregator, shipper)."""
    return any("digits_ddp.py" in part for part in process.cmdline())


def start_server(data_dir: Path) -> tuple[str, str]:
    """Starts the embedded server, or finds the one already running on `data_dir`: (url, admin key)."""
    base = [sys.executable, "-m", "wbdist", "server"]
    port_file = data_dir / "url"
    status = subprocess.run([*base, "status", "--data-dir", str(data_dir)], capture_output=True, check=False)
    if status.returncode != 0:
        data_dir.mkdir(parents=True, exist_ok=True)
        port_file.unlink(missing_ok=True)
        with (data_dir / "server.log").open("ab") as log:
            subprocess.Popen(
                [*base, "--data-dir", str(data_dir), "--port", "0", "--port-file", str(port_file)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
    wait_for(port_file.exists, 30, f"the server to write {port_file}")
    key = subprocess.run([*base, "key", "--data-dir", str(data_dir)], capture_output=True, text=True, check=True).stdout.strip()
    return port_file.read_text().strip(), key


def login_url(base_url: str, key: str, page: str) -> str:
    """An address that logs one browser in, once, and shows `page`."""
    answer = requests.post(f"{base_url}/api/ui/login-url", auth=("api", key), json={"page": urlsplit(page).path}, timeout=10)
    answer.raise_for_status()
    return str(answer.json()["url"])


def wait_for(condition: Callable[[], bool], timeout: float, what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Polls until `condition` holds; fails early when `process` has ended."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process is not None and process.poll() is not None:
            raise DemoFailedError(f"the job ended (exit code {process.returncode}) while the demo waited for {what}")
        if time.monotonic() > deadline:
            raise DemoFailedError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.1)


class Screen:
    """What the person sees: one bar a job, and a line for everything done to it."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("steps  attempt {task.fields[attempt]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._total = total

    def bar(self, label: str) -> TaskID:
        return self.progress.add_task(label, total=self._total, attempt=1)

    def say(self, text: str) -> None:
        self.progress.console.print(f"  {text}")


def follow(job: Job, screen: Screen, task: TaskID, until: Callable[[int, int], bool], what: str) -> tuple[int, int]:
    """Moves the bar with what the server has, until `until(steps, attempt)` holds; at most 90 s."""
    seen = (0, 0)

    def reached() -> bool:
        nonlocal seen
        seen = (job.steps_done(), job.attempt())
        screen.progress.update(task, completed=seen[0], attempt=max(seen[1], 1))
        return until(*seen)

    wait_for(reached, 90, what, job.process)
    return seen


def finish(job: Job, screen: Screen, task: TaskID, total: int) -> None:
    """Moves the bar until the job has ended by itself, with exit code 0; at most 150 s."""

    def ended() -> bool:
        screen.progress.update(task, completed=min(job.steps_done(), total), attempt=max(job.attempt(), 1))
        return job.process.poll() is not None

    wait_for(ended, 150, f"job {job.label!r} to finish")
    if job.process.returncode != 0:
        raise DemoFailedError(f"job {job.label!r} ended with exit code {job.process.returncode}; see {job.log_path}")
    screen.progress.update(task, completed=total)


def interrupted(job: Job, screen: Screen, total: int) -> None:
    task = screen.bar("interrupted")
    with job.running() as launcher:
        steps, _ = follow(job, screen, task, lambda steps, _: steps >= total // 2, "half of the steps")
        screen.say(f"[yellow]SIGTERM[/] to the launcher at step {steps}: a preemption notice")
        launcher.send_signal(signal.SIGTERM)
        late = total * 3 // 4
        steps, attempt = follow(
            job, screen, task, lambda steps, attempt: attempt >= 2 and steps >= late, "attempt 2 to do three quarters"
        )
        victim = job.rank_process(1)
        screen.say(f"[red]SIGKILL[/] to rank 1 of attempt {attempt} at step {steps}: no warning at all")
        victim.kill()
        finish(job, screen, task, total)
        if job.attempt() < 3:
            raise DemoFailedError(f"the job was killed twice but has {job.attempt()} attempt(s): a fault was not delivered")


def uninterrupted(job: Job, screen: Screen, total: int) -> None:
    task = screen.bar("uninterrupted")
    with job.running():
        finish(job, screen, task, total)


class Findings:
    """Both runs as read back through the API, and what the comparison says."""

    def __init__(self, tested: Any, reference: Any, total: int) -> None:
        self.tested, self.reference, self.total = tested, reference, total
        self.rows = list(tested.scan_history())
        self.reference_rows = list(reference.scan_history())
        steps = [row["_step"] for row in self.rows]
        wanted = [row["_step"] for row in self.reference_rows]
        self.doubled = len(steps) - len(set(steps))
        self.missing = len(set(wanted) - set(steps))
        self.stale = len(set(steps) - set(wanted))
        self.same_history = self._comparable(self.rows) == self._comparable(self.reference_rows)
        self.same_order = self._column(self.rows, "_samples") == self._column(self.reference_rows, "_samples")
        self.same_weights = tested.summary.get("weights_xxh3") == reference.summary.get("weights_xxh3") is not None
        self.accuracy = float(tested.summary.get("accuracy", 0.0))

    @staticmethod
    def _comparable(rows: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
        # repr tells 1 from 1.0 and shows every bit of a float; == would call NaN a difference.
        return [sorted((k, repr(v)) for k, v in row.items() if k not in WALL_CLOCK_KEYS) for row in rows]

    @staticmethod
    def _column(rows: list[dict[str, Any]], key: str) -> list[tuple[int, Any]]:
        return [(row["_step"], row[key]) for row in rows if key in row]

    def problems(self) -> list[str]:
        order = self._column(self.rows, "_samples")
        checks = {
            f"{len(order)} of {self.total} steps carry a sample fingerprint": len(order) == self.total,
            f"{self.doubled} rows doubled": self.doubled == 0,
            f"{self.missing} rows missing": self.missing == 0,
            f"{self.stale} rows stale": self.stale == 0,
            "history differs": self.same_history,
            "sample order differs": self.same_order,
            "final weights differ": self.same_weights,
            f"accuracy {self.accuracy:.4f} is below 0.97": self.accuracy >= 0.97,
            f"run state is {self.tested.state!r}": self.tested.state == "finished",
        }
        return [what for what, holds in checks.items() if not holds]

    def table(self) -> Table:
        table = Table(title="Read back through the server's API", title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("")
        table.add_column("interrupted", justify="right")
        table.add_column("uninterrupted", justify="right")
        pair = (self.tested, self.reference)
        table.add_row("attempts", *(str(len(run.attempts())) for run in pair))
        both = (self.rows, self.reference_rows)
        table.add_row("training steps", *(str(len(self._column(rows, "_samples"))) for rows in both))
        table.add_row("rows", str(len(self.rows)), str(len(self.reference_rows)))
        table.add_row("doubled / missing / stale", f"{self.doubled} / {self.missing} / {self.stale}", "")
        table.add_row("accuracy, held-out images", *(f"{float(run.summary.get('accuracy', 0)):.4f}" for run in pair))
        table.add_row("weights", *(str(run.summary.get("weights_xxh3"))[:12] for run in pair))
        table.add_section()
        for what, same in (
            ("history", self.same_history),
            ("sample order", self.same_order),
            ("final weights", self.same_weights),
        ):
            table.add_row(what, "[green]bit-identical[/]" if same else "[red]DIFFERENT[/]", "")
        return table


def attempts_table(run: Any) -> Table:
    table = Table(title="Attempts of the interrupted job", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("attempt", "began", "from step", "rows live", "rows archived", "ended"):
        table.add_column(column, justify="left" if column in {"began", "ended"} else "right")
    for a in run.attempts():
        table.add_row(
            str(a.attempt), a.cause, str(a.base_step + 1), str(a.rows_live), str(a.rows - a.rows_live), a.end or "running"
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the server's data, checkpoints and logs go")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    console = Console()
    began = time.monotonic()
    total = args.epochs * STEPS_PER_EPOCH
    out = (args.out / time.strftime("%Y%m%d-%H%M%S")).resolve()
    out.mkdir(parents=True)

    try:
        url, key = start_server((args.out / "server").resolve())
        console.print(f"server [cyan]{url}[/]  data {args.out}/server")
        os.environ.update(WANDB_BASE_URL=url, WANDB_API_KEY=key)
        screen = Screen(console, total)
        tested, reference = (Job(label, out, args.epochs, dict(os.environ)) for label in ("interrupted", "uninterrupted"))
        with Live(screen.progress, console=console, refresh_per_second=8):
            interrupted(tested, screen, total)
            uninterrupted(reference, screen, total)
        found = Findings(tested.run(), reference.run(), total)
    except DemoFailedError as error:
        console.print(f"\n[red]failed:[/] {error}\nlogs: {out}")
        return 1

    console.print()
    console.print(attempts_table(found.tested))
    console.print()
    console.print(found.table())
    problems = found.problems()
    console.print()
    if problems:
        console.print("[red]failed:[/] " + "; ".join(problems) + f"\nlogs: {out}")
        return 1
    console.print(f"Killed twice, and nobody could tell. {time.monotonic() - began:.0f} s.\n")
    console.print(f"Run page: {found.tested.url}", soft_wrap=True)
    console.print(f"  log in: {login_url(url, key, found.tested.url)}", soft_wrap=True)
    console.print(f"  server: keeps running; stop it with: wbdist server stop --data-dir {args.out}/server", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
