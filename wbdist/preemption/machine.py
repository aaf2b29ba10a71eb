"""On which cloud this machine is, from what its firmware says (a few small files, no request), and since when it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

Cloud = Literal["aws", "gcp", "azure"]

DMI = Path("/sys/class/dmi/id")
AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
"""Of every Azure machine; the vendor alone, Microsoft, is also that of any Hyper-V guest."""


def detect_cloud(dmi: Path = DMI) -> Cloud | None:
    """The cloud whose metadata service is worth asking, None elsewhere. Any process; under a millisecond."""
    vendor, bios, product = (_read(dmi / name) for name in ("sys_vendor", "bios_vendor", "product_name"))
    if "amazon ec2" in (vendor.lower(), bios.lower()) or "amazon" in _read(dmi / "bios_version").lower():
        return "aws"  # the version is that of older instances, on Xen
    if vendor == "Google" or product == "Google Compute Engine":
        return "gcp"
    if _read(dmi / "chassis_asset_tag") == AZURE_ASSET_TAG:
        return "azure"
    return None


def booted() -> float:
    """Unix time at which this machine, or the host of this container, was started."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""  # no such machine, or a container that hides it
