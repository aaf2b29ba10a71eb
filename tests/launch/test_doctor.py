"""`wbdist doctor` on machines and scripts with each of the traps, and without."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from wbdist.cli import main
from wbdist.launch import doctor


@pytest.mark.parametrize(
    ("name", "text", "checks"),
    [
        ("job.sbatch", "#SBATCH --signal=B:USR1@120\nsrun python train.py\n", {"SIGUSR1": "problem"}),
        ("t.py", "import signal\nsignal.signal(signal.SIGUSR1, print)\n", {"SIGUSR1": "problem"}),
        ("job.sh", "torchrun --nproc-per-node 2 train.py\n", {"torchrun": "warning"}),
        ("job.sh", "torchrun --shutdown-timeout 110 train.py\n", {"script": "ok"}),
        ("job.sh", "torchrun --shutdown-timeout 110 --nnodes 3:4 train.py\n", {"elastic": "problem"}),
        (
            "job.sh",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\ntorchrun --shutdown-timeout 110 --nnodes=3:4 train.py\n",
            {"script": "ok"},
        ),
        ("job.sh", "#SBATCH --signal=USR2@170\nexec srun wbdist launch train.py\n", {"script": "ok"}),
        ("t.py", "import wbdist\ndef f(): pass\nwbdist.launch(f, nprocs=2)\n", {"guard": "problem"}),
        ("t.py", "from multiprocessing import Pool\nwith Pool(2) as p:\n    p.map(abs, [1])\n", {"guard": "problem"}),
        (
            "t.py",
            "import wbdist\ndef f(): wbdist.launch(f)\nif __name__ == '__main__':\n    f()\n    wbdist.launch(f)\n",
            {"script": "ok"},
        ),
        ("t.py", "def f(:\n", {"script": "problem"}),
    ],
)
def test_scripts(tmp_path: Path, name: str, text: str, checks: dict[str, str]) -> None:
    """Proves that each trap of a script is found, that its repair is given, and that repaired ones pass."""
    path = tmp_path / name
    path.write_text(text)
    found = doctor.script(path)
    assert {finding.check: finding.level for finding in found} == checks
    assert all(finding.fix for finding in found if finding.level != "ok")


@pytest.mark.parametrize(("name", "level"), [("bash", "problem"), ("python3", "ok")])
def test_shell_as_first_process(tmp_path: Path, name: str, level: str) -> None:
    """Proves that a shell which is PID 1 of a container is found, and that outside of one it is nobody's business."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "comm").write_text(f"{name}\n")
    assert [finding.level for finding in doctor.first_process(tmp_path, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})] == [level]


def test_file_systems(tmp_path: Path) -> None:
    """Proves that the deepest mount decides, also for a directory that is not there yet."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n/dev/vdb {tmp_path}/local xfs rw 0 0\n")
    (tmp_path / "local").mkdir()
    (shared,) = doctor.directory(tmp_path / "not" / "there", mounts)
    (local,) = doctor.directory(tmp_path / "local" / "ckpt", mounts)
    assert (shared.level, "nfs4" in shared.says, "local disk" in shared.fix, local.level) == ("warning", True, True, "ok")


CONFIG = "PreemptMode = REQUEUE\nPreemptParameters = (null)\nJobRequeue = 1\n"


@pytest.mark.parametrize(("grace", "level"), [("0", "problem"), ("60", "ok")])
def test_slurm_configuration(tmp_path: Path, grace: str, level: str) -> None:
    """Proves, with a stand-in for scontrol, that a preemption without time to save is found, and unsent signals are."""
    scontrol = tmp_path / "scontrol"
    partition = f"PartitionName=low GraceTime={grace} PreemptMode=REQUEUE"
    scontrol.write_text(f'#!/bin/sh\nif [ "$2" = config ]; then printf "{CONFIG}"; else echo "{partition}"; fi\n')
    scontrol.chmod(0o755)
    found = {finding.check: finding for finding in doctor.slurm({"PATH": f"{tmp_path}:/usr/bin:/bin"})}
    assert (found["GraceTime"].level, found["PreemptParameters"].level) == (level, "warning")
    assert doctor.slurm({"PATH": "/nowhere"}) == []


class Service(BaseHTTPRequestHandler):
    """Stands for the metadata service and for a server whose clock is an hour off."""

    def do_PUT(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.send_response_only(200)
        self.send_header("Date", "Sat, 21 Nov 2020 10:00:00 GMT")
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"t")

    def log_message(self, *_: object) -> None:
        pass


def test_metadata_service_clock_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that EC2's service is asked for a token (and its silence explained by the hop limit), that a wrong clock is told,
    and that the command prints a fix for each, and its code says whether there is a problem."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert doctor.aws({"AWS_EC2_METADATA_SERVICE_ENDPOINT": url})[0].level == "ok"
        (clock,) = doctor.clock(url)
        assert (clock.level, "ahead of the server's" in clock.says) == ("warning", True)
    finally:
        server.shutdown()
        server.server_close()
    (silent,) = doctor.aws({"AWS_EC2_METADATA_SERVICE_ENDPOINT": url})
    assert (silent.level, "hop-limit 2" in silent.fix) == ("problem", True)
    assert doctor.aws({}, vendor=tmp_path / "none") == []

    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text("print(1)\n")
    (tmp_path / "bad.py").write_text("import wbdist\nwbdist.launch(print)\n")
    good = CliRunner().invoke(main, ["doctor", "good.py", "--json"])
    assert (good.exit_code, json.loads(good.output)[0]["level"]) == (0, "ok")
    bad = CliRunner().invoke(main, ["doctor", "bad.py"])
    assert bad.exit_code == 1
    assert "PROBLEM guard: bad.py line 2 calls launch()" in bad.output
    assert '-> put it under: if __name__ == "__main__":' in bad.output


def test_slow_names_are_found_without_waiting_for_them() -> None:
    """Proves that a resolver which never answers is told, with the fix, after SECONDS at most, and a quick one is not."""
    answered = threading.Event()
    try:
        (stuck,) = doctor.names(lambda _: answered.wait(60))
        assert (stuck.level, "'::ffff:127.0.0.1 localhost' >> /etc/hosts" in stuck.fix) == ("warning", True)
    finally:
        answered.set()
    assert [finding.level for finding in doctor.names(lambda _: None)] == ["ok"]
