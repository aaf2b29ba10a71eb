"""System metrics: their values, names and times, what they cost a run that ends, forks and disks that fail."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.journals import read_all
from support.waiting import until

import wbdist
from wbdist.core.position import EVENTS
from wbdist.run.journal import Kind, Record
from wbdist.run.system import sampler
from wbdist.run.system.gpus import Gpus
from wbdist.run.system.readings import HostReadings, ProcessReadings

pytestmark = pytest.mark.usefixtures("offline")


def samples(run: wbdist.Run) -> list[Record]:
    assert run.journal_path is not None
    return [record for record in read_all(run.journal_path) if record.kind is Kind.STATS]


def sampling(**settings: Any) -> wbdist.Run:
    return wbdist.init(project="p", settings={"quiet": True, "x_stats_sampling_interval": 0.1, **settings})


def test_a_run_is_sampled_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Proves samples under W&B's names from the first second on, and that after the end there is neither line nor thread."""
    run = sampling()
    until(lambda: len(samples(run)) >= 3, "three samples")
    run.finish()
    taken = samples(run)
    assert run.position().watermark.counts[EVENTS] == {"rank0": len(taken)}, "a resumed run keeps these lines"
    names = set(taken[-1].data)
    assert {
        "system.cpu", "system.cpu.0.cpu_percent", "system.proc.memory.rssMB", "system.proc.memory.percent",
        "system.proc.cpu.threads", "system.memory_percent", "system.proc.memory.availableMB", "system.disk./.usagePercent",
        "system.disk./.usageGB", "system.network.recv", "system.network.sent",
    } <= names  # fmt: skip
    assert all(record.time >= run.start_time for record in taken)
    until(lambda: not any(t.name == "wbdist-system-metrics" for t in threading.enumerate()), "the thread to end")
    assert len(samples(run)) == len(taken)
    assert not caplog.records


def test_the_numbers_are_right() -> None:
    """Proves process and machine against psutil, which reads the same kernel by other code."""
    process, host = ProcessReadings(), HostReadings()
    me = psutil.Process()
    began, before = time.monotonic(), me.cpu_times()
    while time.monotonic() < began + 0.3:
        sum(range(1000))
    mine, machine = process.read(), host.read()
    used, elapsed = me.cpu_times(), time.monotonic() - began
    cpu = 100 * (used.user + used.system - before.user - before.system) / elapsed / (os.cpu_count() or 1)
    assert mine["cpu"] == pytest.approx(cpu, rel=0.5)
    assert mine["proc.memory.rssMB"] == pytest.approx(me.memory_info().rss / 2**20, rel=0.1)
    assert mine["proc.cpu.threads"] == me.num_threads()
    assert machine["memory_percent"] == pytest.approx(psutil.virtual_memory().percent, abs=5)
    assert machine["disk./.usagePercent"] == pytest.approx(psutil.disk_usage("/").percent, abs=1)
    assert all(0 <= machine[f"cpu.{n}.cpu_percent"] <= 100 for n in range(os.cpu_count() or 1))


def test_what_a_kernel_does_not_tell_is_left_out(tmp_path: Path) -> None:
    """Proves that missing and odd files are gaps, not errors."""
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 25 kB\n")
    (tmp_path / "net").mkdir()
    (tmp_path / "net/dev").write_text("head\nhead\n  eth0: garbage\n")
    with pytest.raises(ValueError, match="garbage"):
        HostReadings((), tmp_path)  # odd at once: the sampler then has no machine
    (tmp_path / "net/dev").unlink()
    found = HostReadings(("/nowhere",), tmp_path).read()
    assert found == {"memory_percent": 75.0, "proc.memory.availableMB": 25 / 1024, "network.recv": 0.0, "network.sent": 0.0}


def test_off_and_labels() -> None:
    """Proves the settings, W&B's environment names among them."""
    off = sampling(x_disable_stats=True)
    labelled = wbdist.init(
        project="p", reinit="create_new", settings={"quiet": True, "x_stats_sampling_interval": 0.1, "x_label": "r1"}
    )
    until(lambda: samples(labelled), "a sample")
    assert {name.partition("/l:")[2] for name in samples(labelled)[0].data} == {"r1"}
    assert samples(off) == []
    with pytest.raises(wbdist.UsageError, match=r"at least 0\.1"):
        sampling(x_stats_sampling_interval=0.01)


def test_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves both of W&B's forms of its x_ variables."""
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.5")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    monkeypatch.setenv("WANDB_X_STATS_DISK_PATHS", "/tmp,/")
    run = wbdist.init(project="p", settings={"quiet": True})
    assert (run.settings.x_stats_sampling_interval, run.settings.x_disable_stats) == (0.5, True)
    assert run.settings.x_stats_disk_paths == ("/tmp", "/")


def test_a_forked_child_does_not_sample() -> None:
    """Proves that the parent's thread and runs are not the child's, and that a run of the child's own is sampled there."""
    run = sampling()
    until(lambda: samples(run), "a sample")
    pid = os.fork()
    if pid == 0:
        try:
            own = sampling()
            until(lambda: samples(own), "a sample")
            own.finish()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    count = len(samples(run))
    until(lambda: len(samples(run)) > count, "another sample")


def test_a_failing_sink_ends_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """Proves that one run's trouble is said, and leaves the others sampled."""
    run = sampling()

    def fail(metrics: dict[str, float]) -> None:
        raise OSError("no")

    bad = sampler.Subscription(fail, 0.1)
    sampler.subscribe(bad)
    count = len(samples(run))
    until(lambda: len(samples(run)) > count + 2, "more samples")
    sampler.unsubscribe(bad)
    assert caplog.text.count("not sampled any more: OSError: no") == 1


class NvmlError(Exception):
    pass


def test_gpus() -> None:
    """Proves names and units against NVML's interface: two cards, one of which tells no power and is not ours."""

    def power(device: int) -> int:
        if device == 1:
            raise NvmlError
        return 150_000

    nvml = SimpleNamespace(
        NVMLError=NvmlError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda device: SimpleNamespace(gpu=50 + device, memory=10),
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=1 << 30, total=4 << 30),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetEnforcedPowerLimit=lambda device: 300_000,
        nvmlDeviceGetClockInfo=lambda device, clock: 1000 * clock,
        nvmlDeviceGetTemperature=lambda device, sensor: 40,
        nvmlDeviceGetComputeRunningProcesses=lambda device: [SimpleNamespace(pid=os.getpid() if device == 0 else 1)],
    )  # fmt: skip
    found = Gpus(nvml).read()
    assert {name: found[f"gpu.0.{name}"] for name in ("gpu", "memoryAllocated", "powerWatts", "powerPercent", "temp")} == {
        "gpu": 50.0, "memoryAllocated": 25.0, "powerWatts": 150.0, "powerPercent": 50.0, "temp": 40.0,
    }  # fmt: skip
    assert found["gpu.process.0.memoryAllocatedBytes"] == 1 << 30
    assert found["gpu.1.gpu"] == 51.0
    assert not any(name.startswith(("gpu.1.power", "gpu.process.1")) for name in found)
    assert set(Gpus(nvml, only=(1,)).read()) == {name for name in found if name.startswith("gpu.1.")}
