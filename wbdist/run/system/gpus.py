"""NVIDIA's GPUs, through NVML, when `nvidia-ml-py` is installed and there is a driver; otherwise nothing, without a word."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from wbdist.run.system.readings import Metrics


class Gpus:
    """The machine's GPUs under W&B's names, `gpu.<index>.*`; those this process computes on also as `gpu.process.<index>.*`."""

    def __init__(self, nvml: Any, only: tuple[int, ...] | None = None) -> None:
        """`nvml`: the module, initialised. `only`: indices to read; None: all."""
        self._nvml = nvml
        every = range(nvml.nvmlDeviceGetCount())
        self._devices = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in every if only is None or index in only}

    @classmethod
    def found(cls, only: tuple[int, ...] | None = None) -> Gpus | None:
        """None on machines without a usable driver or library."""
        if not os.path.exists("/dev/nvidiactl"):  # before the import, which costs 3 MiB  # noqa: PTH110
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml, only)
        except Exception:  # noqa: BLE001  (whatever a driver says: training goes on without these numbers)
            return None

    def read(self) -> Metrics:
        found: Metrics = {}
        for index, device in self._devices.items():
            one = self._of(device)
            found |= {f"gpu.{index}.{name}": value for name, value in one.items()}
            if self._is_ours(device):
                found |= {f"gpu.process.{index}.{name}": value for name, value in one.items()}
        return found

    def _of(self, device: Any) -> Metrics:
        nvml = self._nvml
        found: Metrics = {}

        def read(into: Callable[[], Metrics]) -> None:
            with suppress(nvml.NVMLError):  # each model of card lacks something else
                found.update(into())

        def use() -> Metrics:
            rates = nvml.nvmlDeviceGetUtilizationRates(device)
            return {"gpu": float(rates.gpu), "memory": float(rates.memory)}

        def memory() -> Metrics:
            info = nvml.nvmlDeviceGetMemoryInfo(device)
            return {"memoryAllocated": 100 * info.used / info.total, "memoryAllocatedBytes": float(info.used)}

        def power() -> Metrics:
            watts = nvml.nvmlDeviceGetPowerUsage(device) / 1000
            limit = nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000
            return {"powerWatts": watts, "enforcedPowerLimitWatts": limit, "powerPercent": 100 * watts / limit}

        def clocks() -> Metrics:
            return {
                "smClock": float(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
                "memoryClock": float(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM)),
            }

        read(use)
        read(memory)
        read(power)
        read(clocks)
        read(lambda: {"temp": float(nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))})
        return found

    def _is_ours(self, device: Any) -> bool:
        with suppress(self._nvml.NVMLError):
            return any(process.pid == os.getpid() for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device))
        return False
