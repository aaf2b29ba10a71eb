"""torchrun agents, one for each of some hosts."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from support.jobs import JobProcess, Jobs


class Agents:
    """One torchrun agent a host, with one rank each; a host is a name, and may be a network namespace.

    The first that is started hosts the rendezvous: torchrun's job ends with it, so it is none to kill.
    """

    def __init__(self, jobs: Jobs, address: str, nnodes: str, script: Path, *args: str) -> None:
        self._jobs = jobs
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._endpoint = f"{address}:{probe.getsockname()[1]}"
        self._nnodes, self._script = nnodes, [str(script), *args]
        self.of_host: dict[str, JobProcess] = {}

    def start(self, host: str, *within: str, local: str = "127.0.0.1", **environment: str) -> JobProcess:
        command = [
            *within,
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", self._nnodes, "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", self._endpoint, "--rdzv-id", "slots", "--local-addr", local),
            *("--rdzv-conf", f"is_host={int(not self.of_host)},last_call_timeout=4,keep_alive_interval=1,join_timeout=100"),
            *("--max-restarts", "20", *self._script),
        ]
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
