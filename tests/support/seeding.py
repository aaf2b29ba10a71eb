"""The seed documents' snippets, run by either client against one server, and read back by the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Self

from support.lingering import kill_all, processes_of
from support.serving import Server

import wbdist

ROOT = Path(__file__).parents[2]
SNIPPETS = ROOT / "tests" / "seeds" / "snippets"

Client = Literal["wbdist", "wandb"]
CLIENTS: tuple[Client, ...] = ("wbdist", "wandb")

_IMPORTS = {"wbdist": "import wbdist as wandb\n", "wandb": "import wandb\n"}


def snippet(name: str, **placeholders: str) -> str:
    """The text of a seed's snippet; `placeholders` replaces what the documents leave to the reader, each found or it fails."""
    text = (SNIPPETS / f"{name}.txt").read_text()
    for given, value in placeholders.items():
        assert given in text, f"{given!r} is not in {name}"
        text = text.replace(given, value)
    return text


def other(client: Client) -> Client:
    return "wandb" if client == "wbdist" else "wbdist"


class Reader:
    """One process with a client's read API, asked again and again: importing a client takes longer than most questions."""

    _LOOP = (
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    api = wandb.Api()\n"
        "    try:\n"
        "        answer = {'value': eval(json.loads(line))}\n"
        "    except Exception as error:\n"
        "        answer = {'error': f'{type(error).__name__}: {error}'}\n"
        "    print('ANSWER', json.dumps(answer, default=str), flush=True)\n"
    )

    def __init__(self, client: Client, environment: dict[str, str], folder: Path) -> None:
        self._log = (folder / f"reader-{client}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IMPORTS[client] + self._LOOP],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, expression: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(expression), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                assert "error" not in answer, f"{expression}: {answer['error']}"
                return answer["value"]
        self._log.seek(0)
        raise AssertionError(f"the reader ended: {self._log.read()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)
        self._log.close()


class Seeds:
    """A server, processes that log to it with either client, and either client's read API. Use as a context manager."""

    def __init__(self, folder: Path, *server_arguments: str) -> None:
        self.folder = folder
        self.server = Server(folder / "server", *server_arguments)
        self._readers: dict[Client, Reader] = {}
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            for reader in self._readers.values():
                reader.close()
        finally:
            self.server.stop()
            kill_all(processes_of(self.folder))

    def environment(self, folder: Path, **more: str) -> dict[str, str]:
        """What a script needs to log to the server with either client, and to keep everything inside `folder`."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "WBDIST_"))}
        return {
            **own,
            "HOME": str(folder),
            "WANDB_BASE_URL": self.server.url,
            "WANDB_API_KEY": self.server.key,
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_DATA_DIR": str(folder / "staging"),
            "WANDB_CONFIG_DIR": str(folder / "config"),
            "WANDB_X_DISABLE_STATS": "true",
            "WANDB_X_DISABLE_MACHINE_INFO": "true",
            "WBDIST_DATA_DIR": str(folder / "wbdist-data"),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    def place(self, name: str) -> Path:
        """A directory of its own for scripts that share one."""
        path = self.folder / name
        path.mkdir()
        return path

    def start(self, client: Client, source: str, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts `source`, in which `import wandb` means `client`, as a script in `folder`."""
        assert _IMPORTS["wandb"] in source
        script = folder / f"script-{len(self._processes)}.py"
        script.write_text(source.replace(_IMPORTS["wandb"], _IMPORTS[client]))
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=folder,
            env=self.environment(folder, **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def run(self, client: Client, source: str, folder: Path, *arguments: str, **environment: str) -> str:
        """What the script said, once it ended with 0."""
        process = self.start(client, source, folder, *arguments, **environment)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, f"exit code {process.returncode}\n{said}"
        return said

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL to the script and everything in its session: W&B's core is, our shipper is in one of its own."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)

    def command(self, client: Client, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """The client's command line, `wandb ...` or `wbdist ...`."""
        module = "wandb" if client == "wandb" else "wbdist"
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=self.environment(folder, **environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )

    def read(self, client: Client, expression: str) -> Any:
        """The value of an expression over `api`, the `Api()` of `client`."""
        if client not in self._readers:
            folder = self.place(f"read-by-{client}")
            self._readers[client] = Reader(client, self.environment(folder), folder)
        return self._readers[client].ask(expression)

    def runs(self, client: Client, project: str) -> list[dict[str, Any]]:
        """Every run of the project, oldest first, with all of its history, as `client` reads it."""
        return list(
            self.read(
                client,
                "[{'id': r.id, 'name': r.name, 'state': r.state, 'config': dict(r.config), 'rows': list(r.scan_history()), "
                "'summary': {k: r.summary[k] for k in r.summary.keys()}, 'group': r.group, 'job_type': r.job_type} "
                f"for r in api.runs('local/{project}', order='+created_at')]",
            )
        )


def shown(path: str, key: str) -> list[tuple[int, Any]]:
    """Step and value, None where there is none, of every history row that our read API has of the run."""
    return [(row["_step"], row.get(key)) for row in wbdist.Api().run(path).scan_history()]
