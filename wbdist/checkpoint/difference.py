"""What differs between two checkpoints, value by value: tensors bit by bit, and the config they were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wbdist.checkpoint.manifest import Manifest

CONFIG = "config"


def values(manifest: Manifest, directory: Path) -> dict[str, str]:
    """Every value of the checkpoint in `directory` by its place: JSON of a plain value; type, shape and digest of a tensor."""
    import torch
    import xxhash

    from wbdist.checkpoint import tree
    from wbdist.checkpoint.commit import STATE
    from wbdist.checkpoint.storage import read_tensors

    found = config_values(manifest.config)
    for file in manifest.files:
        if not file.endswith("/" + STATE):
            continue
        part = directory / file.removesuffix("/" + STATE)
        structures = tree.decode((part / STATE).read_bytes())
        for name, tensor in read_tensors(part, tree.template(structures)).items():
            bits = xxhash.xxh3_64_hexdigest(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            found[f"{part.name}/{name}"] = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {bits}"
        for name, structure in structures.items():
            _flatten(f"{part.name}/{name}", structure, found)
    return found


def config_values(config: dict[str, Any], place: str = CONFIG) -> dict[str, str]:
    """Every value of a config by its path: `config.model.depth`; without the first word when `place` is empty."""
    found: dict[str, str] = {}
    for key, value in config.items():
        path = f"{place}.{key}" if place else key
        if isinstance(value, dict) and value:
            found |= config_values(value, path)
        else:
            found[path] = json.dumps(value)
    return found


def differing(left: dict[str, str], right: dict[str, str]) -> list[str]:
    """The places whose values differ, or that one of the two does not have; sorted."""
    return [part for part in sorted({*left, *right}) if left.get(part) != right.get(part)]


def _flatten(place: str, structure: Any, found: dict[str, str]) -> None:
    items = structure.get("d", structure.get("o")) if isinstance(structure, dict) else None
    if items is not None:
        for key, value in items:
            _flatten(f"{place}.{key}", value, found)
    elif not (isinstance(structure, dict) and "T" in structure):
        found.setdefault(place, json.dumps(structure))
