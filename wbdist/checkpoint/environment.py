"""What a checkpoint says of the surroundings it was made in: the script's switches, and the machine."""

from __future__ import annotations

import platform
import sys

import torch


def facts() -> dict[str, str]:
    """Name -> value, on this rank, now. Starts no device.

    `accelerator`, `default_dtype`, `deterministic` and `float32_matmul_precision` are the script's choice, the rest the
    machine's (`changes.MACHINE`).
    """
    accelerator = _accelerator()
    found = {
        "accelerator": accelerator,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        found["numpy"] = numpy.__version__
    if accelerator == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["devices"] = ", ".join(torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count()))
    return found


def _accelerator() -> str:
    """The kind of device whose random generators belong to the state: one that the process uses by now."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"  # type: ignore[no-untyped-call]
