"""Elastic launchers, one for each of some hosts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from support.jobs import JobProcess, Jobs
from support.ports import free_port
from support.waiting import until


class Agents:
    """One torchrun agent (or `wbdist launch`) a host, with one rank each; a host is a name, and may be a network namespace.

    The first that is started hosts the rendezvous: torchrun's job ends with it, so it is none to kill.
    """

    def __init__(self, jobs: Jobs, address: str, nnodes: str, script: Path, *args: str, launcher: str = "torchrun") -> None:
        self._jobs = jobs
        self._endpoint = f"{address}:{free_port()}"
        self._launcher = launcher
        self._nnodes, self._script = nnodes, [str(script), *args]
        self.of_host: dict[str, JobProcess] = {}

    def start(self, host: str, *within: str, local: str = "127.0.0.1", **environment: str) -> JobProcess:
        place = ("--nnodes", self._nnodes, "--nproc-per-node", "1", "--rdzv-endpoint", self._endpoint)
        if self._launcher == "wbdist":
            first = not self.of_host
            agent = self._started(
                host,
                [*within, sys.executable, "-m", "wbdist", "launch", *place, "--keep-alive", "5", *self._script],
                environment,
            )
            if first:
                until(lambda: "the rendezvous is here" in agent.output(), "the rendezvous")
            return agent
        command = [
            *within,
            *(sys.executable, "-m", "torch.distributed.run", *place),
            *("--rdzv-backend", "c10d", "--rdzv-id", "slots", "--local-addr", local),
            *("--rdzv-conf", f"is_host={int(not self.of_host)},last_call_timeout=4,keep_alive_interval=1,join_timeout=100"),
            *("--max-restarts", "20", *self._script),
        ]
        return self._started(host, command, environment)

    def _started(self, host: str, command: list[str], environment: dict[str, str]) -> JobProcess:
        env = {
            **os.environ,
            "WANDB_HOST": host,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        agent = JobProcess(command, self._jobs.cwd, env)
        self._jobs.started.append(agent)
        self.of_host[host] = agent
        return agent

    def kill(self, host: str) -> None:
        """The host is gone: agent and rank, by SIGKILL."""
        self.of_host.pop(host).end()

    def output(self) -> str:
        return "".join(f"--- {host}\n{agent.output()[-1500:]}\n" for host, agent in self.of_host.items())
