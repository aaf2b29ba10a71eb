"""What a seed stands for: a job, and what is done to its processes, when. The same seed is the same plan, always.

Two kinds of moments. A *blow* falls at a phase of the job as seen from outside (a directory appears, a rank starts) and a
little later. An *aim* falls at a line of code: just before or just after the n-th call of one function in one kind of process,
which then kills itself (`tests/faults/aims/sitecustomize.py`; nothing of it is in the product).
"""

from __future__ import annotations

import random
from typing import Literal

import msgspec

Phase = Literal["time", "start", "attempt", "save", "commit", "finish"]
Target = Literal[
    "rank", "rank0", "ranks", "aggregator", "shipper", "server", "launcher", "sentinel", "notice", "some", "all", "stop"
]
Kind = Literal["torch", "light"]
"""`torch`: a job of the README's kind. `light`: the same ranks, runs, launcher, shipper and server, with checkpoints of a few
numbers and without torch, so that an attempt starts in half a second."""
Mode = Literal["online", "offline"]

WAITS: dict[Phase, tuple[float, float]] = {
    "time": (0.0, 1.5),  # from the blow before
    "start": (0.0, 2.5),  # from the start of the processes of an attempt: imports, meeting, claim
    "attempt": (0.0, 0.3),  # from the moment an attempt has its number: restore, opening the run
    "save": (0.0, 0.03),  # from the moment a checkpoint's temporary directory appears
    "commit": (0.0, 0.02),  # from its rename
    "finish": (0.0, 0.6),  # from the appearance of the last checkpoint
}
"""Phase -> seconds after it has begun, drawn evenly; a light job's `time` and `start` take a third."""


class Blow(msgspec.Struct, frozen=True):
    """One thing that is done to the job from outside."""

    phase: Phase
    wait: float
    target: Target
    rank: int = 0
    """For `rank`; and which helper `stop` stops."""
    chance: float = 0.5
    """For `some`: of each process to be among them."""
    away: float = 0.5
    """Seconds until the server is back, or a stopped process goes on."""
    at_once: bool = True
    """Whether a dead launcher is started again at once, or when nothing is left of its job."""


class Aim(msgspec.Struct, frozen=True):
    """One process of the job kills itself, once."""

    role: str
    """`rank`, `aggregator`, `shipper`, `server` or `launcher`: the first of them to get there."""
    function: str
    """`module:function` or `module:Class.method`."""
    call: int
    """Which call of it in that process, from 1."""
    after: bool
    """Whether the call is made first."""


class Plan(msgspec.Struct, frozen=True):
    """Everything that a seed decides."""

    seed: int
    job: Kind
    world_size: int
    strategy: str
    mode: Mode
    steps: int
    blows: tuple[Blow, ...] = ()
    aims: tuple[Aim, ...] = ()
    arguments: tuple[str, ...] = ()
    """More of the job's."""

    @property
    def kind(self) -> tuple[str, ...]:
        """Plans of one kind have the same uninterrupted job."""
        return (self.job, str(self.world_size), self.strategy, str(self.steps), *self.arguments)


AIMS: tuple[tuple[str, str, int], ...] = (
    ("rank", "wbdist.run.journal:JournalWriter.log", 90),
    ("rank", "wbdist.run.journal:JournalWriter.commit_row", 40),
    ("rank", "wbdist.run.journal:JournalWriter.sync", 4),
    ("rank", "wbdist.disk:sync_directory", 4),
    ("rank", "wbdist.run.lifecycle:_register", 1),
    ("rank", "wbdist.run.lifecycle:_make_directory", 1),
    ("rank", "wbdist.distributed.strategies:open_runs", 1),
    ("rank", "wbdist.checkpoint.claim:_write_durably", 2),
    ("rank", "os:fsync", 12),
    ("rank", "os:rename", 6),
    ("rank", "os:replace", 6),
    ("rank", "os:mkdir", 10),
    ("aggregator", "wbdist.distributed.aggregator:Aggregator._greet", 2),
    ("aggregator", "wbdist.distributed.aggregator:Aggregator._take_frames", 60),
    ("aggregator", "wbdist.distributed.merging:Merger._write_held", 60),
    ("aggregator", "wbdist.distributed.aggregator:Aggregator._answer_drains", 60),
    ("aggregator", "wbdist.run.journal:JournalWriter.sync", 5),
    ("aggregator", "os:fsync", 8),
    ("shipper", "wbdist.run.shipper.delivery:Delivery._open", 2),
    ("shipper", "wbdist.run.shipper.delivery:Delivery._send", 15),
    ("shipper", "wbdist.run.shipper.remote:Remote.post", 25),
    ("shipper", "wbdist.run.shipper.service:Service._become_the_one", 1),
    ("shipper", "wbdist.run.shipper.service:Service._answer", 4),
    ("server", "wbdist.server.store.sql:SqlStore.upsert_run", 3),
    ("server", "wbdist.server.store.sql:SqlStore.begin_attempt", 2),
    ("server", "wbdist.server.store.sql:SqlStore.append", 20),
    ("server", "wbdist.server.store.sql:SqlStore.set_summary", 10),
    ("server", "wbdist.server.store.sql:SqlStore.record_event", 2),
    ("server", "wbdist.server.store.appending:append", 20),
    ("launcher", "wbdist.launch.attempt:Attempt._look", 3),
    ("launcher", "wbdist.launch.attempt:Attempt._on_end", 2),
    ("launcher", "wbdist.launch.supervisor:environments", 2),
)
"""(role, function, greatest call drawn)."""
TORCH_AIMS: tuple[tuple[str, str, int], ...] = (
    ("rank", "wbdist.checkpoint.commit:run_save", 3),
    ("rank", "wbdist.checkpoint.commit:_open", 3),
    ("rank", "wbdist.checkpoint.commit:_write_parts", 3),
    ("rank", "wbdist.checkpoint.commit:_commit", 3),
    ("rank", "wbdist.checkpoint.retention:prune", 3),
    ("rank", "wbdist.checkpoint.restore:load_all", 1),
    ("rank", "wbdist.job.handle:Job._close_step", 40),
)


def make_plan(
    seed: int,
    *,
    job: Kind = "torch",
    blows: int | None = None,
    aims: int | None = None,
    world_size: int | None = None,
    strategy: str | None = None,
    mode: Mode | None = None,
) -> Plan:
    """The plan of `seed`; what is given is not drawn."""
    rng = random.Random(f"wbdist faults {seed}")
    size = rng.choice([1, 2, 2, 2, 4])
    how = rng.choice(["rank0", "rank0", "per_rank"])
    where: Mode = rng.choice(["online", "online", "online", "offline"])
    count = rng.randint(4, 10)
    aimed = rng.randint(1, 4)
    size, how, where = world_size or size, strategy or how, mode or where
    count, aimed = count if blows is None else blows, aimed if aims is None else aims
    shared = how == "rank0" and size > 1
    targets: dict[Target, int] = {
        "rank": 24,
        "rank0": 16,
        "ranks": 6,
        "launcher": 8,
        "sentinel": 2,
        "notice": 8,
        "some": 8,
        "all": 5,
        "stop": 6,
        "aggregator": 14 if shared else 0,
        "shipper": 10 if where == "online" else 0,
        "server": 10 if where == "online" else 0,
    }
    phases: dict[Phase, int] = {"time": 30, "start": 10, "attempt": 12, "save": 20, "commit": 8}
    planned = []
    for number in range(count):
        phase: Phase = rng.choices(list(phases), list(phases.values()))[0]
        if number == count - 1 and rng.random() < 0.6:
            phase = "finish"
        least, most = WAITS[phase]
        faster = 3 if job == "light" and phase in {"time", "start"} else 1
        planned.append(
            Blow(
                phase=phase,
                wait=round(rng.uniform(least, most) / faster, 4),
                target=rng.choices(list(targets), list(targets.values()))[0],
                rank=rng.randrange(size),
                chance=round(rng.uniform(0.2, 0.8), 2),
                away=round(rng.uniform(0.0, 2.0) / faster, 2),
                at_once=rng.random() < 0.5,
            )
        )
    absent = {"aggregator"} if not shared else set()
    absent |= {"shipper", "server"} if where == "offline" else set()
    possible = [aim for aim in AIMS + (TORCH_AIMS if job == "torch" else ()) if aim[0] not in absent]
    roles = sorted({role for role, _, _ in possible})
    drawn = []
    for _ in range(aimed):
        role = rng.choice(roles)
        _, function, most_calls = rng.choice([aim for aim in possible if aim[0] == role])
        drawn.append(Aim(role, function, rng.randint(1, most_calls), rng.random() < 0.5))
    steps = 60 if job == "light" else 120
    steps *= 1 if count <= 8 else 2 if count <= 16 else 4
    return Plan(seed, job, size, how, where, steps, tuple(planned), tuple(drawn))
