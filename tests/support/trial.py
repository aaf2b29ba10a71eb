"""A job, and what a plan does to it until it has ended.

    with Trial(directory, make_plan(seed)) as trial:
        trial.run()
        verify(trial, reference)       of `aftermath`: reads everything back and compares with the job that nobody killed

When a blow falls depends on the machine's speed, so a replay of a seed is alike, not equal: what is replayed is the plan.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from support.plans import Blow, Plan
from support.ports import free_port
from support.processes import Family, family_of, is_sentinel, kill, marked, scan
from support.serving import Server

REPOSITORY = Path(__file__).parents[2]
FAULTS = REPOSITORY / "tests" / "faults"
SCRIPTS = {"torch": FAULTS / "torch_job.py", "light": FAULTS / "light_job.py"}
PYTHON = sys.executable
PROJECT = "faults"
PATIENCE = float(os.environ.get("WBDIST_FAULTS_PATIENCE", "1"))
"""Factor on all deadlines, for machines that are busy with other things."""
PHASE_TIMEOUT = 6.0
"""A phase that does not come is not waited for any longer than this: the blow then falls wherever the job is."""
SERVER_AWAY = 0.3
"""Seconds until a server that killed itself is started again."""


class FaultError(AssertionError):
    """What was promised did not hold; the message says what, and where everything lies."""


class Trial:
    """One job in `directory`, with a server of its own, and what a plan does to it. A context manager: ends everything."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = directory
        self.plan = plan
        self.script = SCRIPTS[plan.job]
        self.checkpoints = directory / "ckpt"
        self.mark = f"wbdist-trial-{os.getpid()}-{time.monotonic_ns()}"
        self.codes: list[int] = []
        """Exit codes of launchers, in order."""
        self.environment_extra: dict[str, str] = {}
        self.more: list[str] = []
        """More arguments of the job, that change nothing of what it logs."""
        self.acks = directory
        self.max_restarts = 1000
        self.sync_needed = False
        """Whether the last shipper was killed, so that `wbdist sync` has to bring the rest."""
        self.server = Server(directory / "server")
        self.server.environment = self._aims()
        self.server.port = free_port()
        self._blows = 0
        self._events: list[str] = []
        self._began = time.monotonic()
        self._deadline = self._began + (60 + 15 * (len(plan.blows) + len(plan.aims))) * PATIENCE
        self._launcher: subprocess.Popen[bytes] | None = None
        self._sentinels: set[int] = set()
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._wait_for_end = self._server_comes_back = False
        self._attempts_seen = self._starts_seen = 0
        self._names_seen: set[str] = set()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "plan.json").write_bytes(msgspec.json.format(msgspec.json.encode(self.plan)))
        aims = [{"id": number, **msgspec.to_builtins(aim)} for number, aim in enumerate(self.plan.aims)]
        (self.directory / "aims.json").write_bytes(msgspec.json.encode(aims))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write_events()
        for pid in [*marked(self.mark), *filter(is_sentinel, self._sentinels)]:
            kill(pid)
        if self._launcher is not None:
            self._launcher.wait(10)
        if self.server.process is not None:
            kill(self.server.process.pid)
            self.server.process.wait(10)

    # What there is --------------------------------------------------------------------------------------

    @property
    def kills(self) -> int:
        """Processes that were killed so far, or told to stop."""
        return self._blows + len(self.hits())

    def hits(self) -> list[str]:
        """The aims that hit."""
        return sorted(filter(None, (path.read_text() for path in self.directory.glob("aim-*.hit"))))

    @property
    def environment(self) -> dict[str, str]:
        """Of the job's processes."""
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("WANDB_", "WBDIST_", "TORCHELASTIC_", "SLURM_"))
            and key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        }
        ours = {
            "WBDIST_DATA_DIR": str(self.directory / "data"),
            "WANDB_CONFIG_DIR": str(self.directory / "config"),
            "WBDIST_FINISH_TIMEOUT": "5",
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "WBDIST_TRIAL": self.mark,
            **self._aims(),
        }
        if self.plan.mode == "offline":
            ours["WANDB_MODE"] = "offline"
        else:
            ours |= {"WANDB_BASE_URL": self.server.url, "WANDB_API_KEY": self.server.key}
        return clean | ours | self.environment_extra

    def _aims(self) -> dict[str, str]:
        """What makes processes kill themselves; the light job finds its coordinator beside it."""
        programs = REPOSITORY / "tests" / "distributed" / "programs"
        path = os.pathsep.join(map(str, [FAULTS / "aims", REPOSITORY, programs]))
        return {"PYTHONPATH": path, "WBDIST_TRIAL_AIMS": str(self.directory)}

    def family(self) -> Family:
        launcher = self._launcher.pid if self._launcher is not None else None
        return family_of(self.mark, self.script.name, launcher, self._sentinels)

    def survivors(self) -> list[str]:
        """What is left of the job, sentinels included; a shipper may stay."""
        processes = scan()
        left = [*self.family().job(), *filter(is_sentinel, self._sentinels)]
        return [f"{pid}: {' '.join(processes[pid][0])}" for pid in left if pid in processes]

    def note(self, text: str) -> None:
        self._events.append(f"{time.monotonic() - self._began:7.3f} {text}")

    def _write_events(self) -> None:
        (self.directory / "events.log").write_text("\n".join(self._events) + "\n")

    def fail(self, what: str) -> FaultError:
        """To be raised."""
        self._write_events()
        plan = self.plan
        given = f"--seed {plan.seed} --job {plan.job} --blows {len(plan.blows)} --aims {len(plan.aims)} "
        given += f"--world {plan.world_size} --strategy {plan.strategy} --mode {plan.mode}"
        tail = "\n".join(self._events[-12:])
        said = [line for line in self.output().splitlines() if "] at step" not in line and not line.startswith("at step")]
        return FaultError(
            f"{what}\nseed {plan.seed}; journals, checkpoints, server data and logs are kept in {self.directory}\n"
            f"replay: python tests/faults/hunt.py {given}\naims that hit: {self.hits()}\nlast events:\n{tail}\nlast output:\n"
            + "\n".join(said)[-3000:]
        )

    def output(self) -> str:
        """Of all launchers, in order."""
        logs = sorted(self.directory.glob("launch-*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def reached(self, step: int, attempt: int = 1, rank: int = 0) -> bool:
        """Whether a rank has logged `step` in this attempt or a later one."""
        path = self.acks / f"acks-{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        return any(int(at) >= attempt and int(number) >= step for at, _, number in (line.partition(" ") for line in lines))

    @property
    def ended(self) -> bool:
        """Whether the job has ended well."""
        return bool(self.codes) and self.codes[-1] == 0

    # Doing it -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Starts the job, strikes as planned, and returns when it has ended with 0. Raises FaultError."""
        if self.plan.mode == "online":
            self.server.start()
            self._server_comes_back = True
        self.launch()
        for number, blow in enumerate(self.plan.blows):
            if blow.phase == "finish":
                self.hurry()
            self._reach(blow)
            if self.ended:
                self.note(f"the job ended before blow {number}")
                break
            self._strike(number, blow)
        self.finish()

    def finish(self) -> None:
        """Lets the job run to its end. Raises FaultError."""
        self.hurry()
        self.until(lambda: self.ended, "the job to end with 0")
        for number in range(len(self.plan.aims)):  # what is judged now must not be shot at
            with suppress(FileExistsError), (self.directory / f"aim-{number}.hit").open("x"):
                pass
        self._tick()
        while self._later:
            self._tick()
            time.sleep(0.02)

    def hurry(self) -> None:
        (self.directory / "hurry").touch()

    def command(self) -> list[str]:
        plan = self.plan
        launch = ["--nproc", str(plan.world_size), "--on-preempt", "relaunch", "--grace", "10"]
        launch += ["--max-restarts", str(self.max_restarts)]
        job = ["--name", "job", "--world", str(plan.world_size), "--strategy", plan.strategy, "--steps", str(plan.steps)]
        return [PYTHON, "-m", "wbdist", "launch", *launch, str(self.script), *job, *self.more, *plan.arguments]

    def start_command(self) -> subprocess.Popen[bytes]:
        """The command, started once more; nobody looks after it."""
        path = self.directory / f"launch-{len(list(self.directory.glob('launch-*.log'))):03d}.log"
        with path.open("wb") as log:
            return subprocess.Popen(
                self.command(), cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def launch(self) -> None:
        """Runs the command, as a scheduler does: again when it ends with another code than 0."""
        self._launcher = self.start_command()
        self._wait_for_end = False
        self.note(f"launcher {self._launcher.pid} started")

    def until(self, condition: Callable[[], bool], what: str, timeout: float | None = None) -> bool:
        """Waits, while looking after launcher and server. False after `timeout` seconds; FaultError at the trial's end."""
        end = None if timeout is None else time.monotonic() + timeout
        while not condition():
            self._tick()
            now = time.monotonic()
            if end is not None and now > end:
                return False
            if now > self._deadline:
                for pid in self.family().ranks.values():
                    kill(pid, signal.SIGABRT)  # faulthandler shows where each thread stands
                time.sleep(1.0)
                raise self.fail(f"a hang: waited for {what}; alive: {self.survivors()}")
            time.sleep(0.001)
        return True

    def _tick(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._later if entry[0] <= now]:
            self._later.remove(entry)
            entry[1]()
        self._look_after_server(now)
        if self._launcher is None:
            return
        code = self._launcher.poll()
        if code is None:
            return
        if not self._wait_for_end:
            self.codes.append(code)
            self.note(f"launcher {self._launcher.pid} ended with {code}")
            if code in {65, 69, 70}:
                raise self.fail(f"the launcher gave up with exit code {code}")
            if code == 0:
                self._launcher = None
                return
        if self._wait_for_end and self.survivors():
            if now > self._gone_by:
                raise self.fail(f"5 s after the launcher these still live: {self.survivors()}")
            return
        self._launcher = None
        self.launch()

    def _look_after_server(self, now: float) -> None:
        """Starts one again that an aim hit; what a blow killed comes back as the blow says."""
        server = self.server.process
        if self._server_comes_back and server is not None and server.poll() is not None:
            self._server_comes_back = False
            self._later.append((now + SERVER_AWAY, self._revive))

    def _reach(self, blow: Blow) -> None:
        """The moment of a blow."""

        def begun() -> bool:
            if blow.phase == "start":
                return self.output().count(f"starting {self.script.name}") > self._starts_seen
            if blow.phase == "attempt":
                return self._attempts() > self._attempts_seen
            if blow.phase == "save":
                return any(name.endswith(".tmp") for name in self._fresh())
            if blow.phase == "commit":
                return any(name.startswith("step-") and "." in name and not name.endswith(".tmp") for name in self._fresh())
            if blow.phase == "finish":
                return any(name.startswith(f"step-{self.plan.steps}.") for name in self._names())
            return True

        timeout = None if blow.phase == "finish" else PHASE_TIMEOUT * PATIENCE
        self.until(lambda: begun() or self.ended, f"phase {blow.phase}", timeout)
        strike_at = time.monotonic() + blow.wait
        self.until(lambda: time.monotonic() >= strike_at or self.ended, "the moment of a blow")

    def _strike(self, number: int, blow: Blow) -> None:
        there = self._victims()
        chosen = self._choose(number, blow, there)
        word = {"stop": "stop", "notice": "tell"}.get(blow.target, "kill")
        self.note(f"blow {number} {blow.phase}+{blow.wait}: {word} {', '.join(chosen) or 'nothing'} of {len(there)}")
        self._attempts_seen, self._starts_seen = self._attempts(), self.output().count(f"starting {self.script.name}")
        self._names_seen = self._names()
        for name in chosen:
            pid = there[name]
            if word == "stop":
                if kill(pid, signal.SIGSTOP):
                    self._later.append((time.monotonic() + blow.away, lambda pid=pid: self._go_on(pid)))
                continue
            if name == "server":
                self._server_comes_back = False
                self._later.append((time.monotonic() + blow.away, self._revive))
            self._blows += kill(pid, signal.SIGTERM if word == "tell" else signal.SIGKILL)
        if "launcher" in chosen and word == "kill" and not blow.at_once and self._launcher is not None:
            code = self._launcher.wait(10)
            self.codes.append(code)
            self.note(f"launcher {self._launcher.pid} ended with {code}; it is started again when nothing is left")
            self._wait_for_end = True
            self._gone_by = time.monotonic() + 5.5 * PATIENCE

    def _victims(self) -> dict[str, int]:
        """What can be struck now: name -> pid."""
        family = self.family()
        there = {f"rank {rank}": pid for rank, pid in sorted(family.ranks.items())}
        there |= {f"aggregator {pid}": pid for pid in family.aggregators}
        there |= {f"shipper {pid}": pid for pid in family.shippers}
        there |= {f"other {pid}": pid for pid in family.others}
        there |= {f"sentinel {pid}": pid for pid in sorted(self._sentinels) if is_sentinel(pid)}
        if family.launcher is not None:
            there["launcher"] = family.launcher
        server = self.server.process
        if self.plan.mode == "online" and server is not None and server.poll() is None:
            there["server"] = server.pid
        return there

    def _choose(self, number: int, blow: Blow, there: dict[str, int]) -> list[str]:
        # A sentinel is a guard against the launcher's death: killed with its launcher, nobody is left to guard.
        unguarded = [name for name in there if not name.startswith("sentinel")]
        if blow.target == "all":
            return unguarded
        if blow.target == "some":
            choice = random.Random(f"{self.plan.seed} {number}")
            return [name for name in unguarded if choice.random() < blow.chance]
        if blow.target == "stop":
            helpers = sorted(name for name in unguarded if name != "launcher")
            return helpers[blow.rank % len(helpers) :][:1] if helpers else []
        wanted = {"ranks": "rank", "rank": f"rank {blow.rank}", "rank0": "rank 0", "notice": "launcher"}
        return [name for name in there if name.startswith(wanted.get(blow.target, blow.target))]

    def _go_on(self, pid: int) -> None:
        self.note(f"{pid} goes on")
        kill(pid, signal.SIGCONT)

    def _revive(self) -> None:
        assert self.server.process is not None
        self.server.process.wait(10)
        self.server.start()
        self._server_comes_back = True
        self.note("server is back")

    def _attempts(self) -> int:
        directory = self.checkpoints / "attempts"
        return len(list(directory.glob("[0-9]*.json"))) if directory.is_dir() else 0

    def _names(self) -> set[str]:
        return {path.name for path in self.checkpoints.iterdir()} if self.checkpoints.is_dir() else set()

    def _fresh(self) -> set[str]:
        return self._names() - self._names_seen
