"""A state as two parts: its tensors, flat and named, and everything else as JSON.

The tensors go into data files (`image.py`); the rest (hyper-parameters, counters, RNG words, the structure
itself) into one readable file. Splitting before DCP rather than letting DCP flatten keeps empty containers, tuples and
integer keys as they were, writes one small file instead of one pickled record per number, and leaves nothing to unpickle.
"""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable
from functools import cache
from typing import Any

import msgspec
import torch

from wbdist.checkpoint.sharded import is_sharded
from wbdist.errors import CheckpointCorruptError, UsageError

Tensors = dict[str, torch.Tensor]
_PLAIN = frozenset({type(None), bool, str, int, float})
"""What JSON holds as it is."""
_DENSE = frozenset({torch.Tensor, torch.nn.Parameter})


class Spec(msgspec.Struct, frozen=True):
    """What a stored tensor is, as a whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def split(name: str, state: Any) -> tuple[Any, Tensors]:
    """(JSON-able structure, tensors by dotted name) of the state of the object tracked as `name`.

    The tensors are the live ones, detached, not copied. Raises UsageError naming the place of a value that a checkpoint
    cannot hold.
    """
    tensors: Tensors = {}
    return _split(name, state, tensors), tensors


def _split(path: str, value: Any, tensors: Tensors) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return {"T": _place(path, value, tensors), **_facts(path, value)}
    if isinstance(value, dict):
        # Plain values are most of a state, and this is the training thread: no call for each of them.
        items = [
            [
                key if type(key) in _PLAIN else _split(path, key, {}),
                item if type(item) in _PLAIN else _split(f"{path}.{key}", item, tensors),
            ]
            for key, item in value.items()
        ]
        if isinstance(value, Counter):
            return {"counter": items}
        if isinstance(value, OrderedDict):
            # nn.Module hangs its modules' versions on the dict as an attribute; loading old layouts needs them.
            return {"o": items, "meta": _split(f"{path}._metadata", getattr(value, "_metadata", None), tensors)}
        if kind is dict:
            return {"d": items}
    if kind is list:
        return _split_each(path, value, tensors)
    if kind is tuple or isinstance(value, torch.Size):
        return {"t": _split_each(path, value, tensors)}
    if isinstance(value, str):  # of a class of its own
        return value
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    numpy = sys.modules.get("numpy")  # a value can only be numpy's when numpy is loaded
    if numpy is not None and isinstance(value, numpy.generic):
        return _split(path, value.item(), tensors)
    if numpy is not None and isinstance(value, numpy.ndarray):
        return {"N": _split(path, torch.from_numpy(value), tensors)}
    raise UsageError(
        f"state {path!r} holds a {kind.__module__}.{kind.__qualname__}, which cannot be stored without pickle. "
        "Stored are tensors, numpy arrays, numbers, strings, bytes, None, and dicts, lists and tuples of them."
    )


def _split_each(path: str, values: Iterable[Any], tensors: Tensors) -> list[Any]:
    return [item if type(item) in _PLAIN else _split(f"{path}.{i}", item, tensors) for i, item in enumerate(values)]


def _place(path: str, tensor: torch.Tensor, tensors: Tensors) -> str:
    name, n = path, 2
    while name in tensors:  # {"a": {"b": t}, "a.b": u} names two tensors alike
        name, n = f"{path}#{n}", n + 1
    tensors[name] = tensor.detach() if tensor.requires_grad else tensor
    return name


def _facts(path: str, tensor: torch.Tensor) -> dict[str, Any]:
    plain = type(tensor) in _DENSE or is_sharded(tensor)
    if not plain or tensor.layout is not torch.strided or tensor.is_quantized:
        raise UsageError(
            f"state {path!r} is a {type(tensor).__name__} of layout {tensor.layout}; only dense tensors and DTensors can be "
            "saved (sparse and quantised ones cannot)"
        )
    if tensor.device.type == "meta":
        raise UsageError(f"state {path!r} is on the meta device: it has no values to save; materialise it first")
    return {"dtype": _name(tensor.dtype), "shape": list(tensor.shape)}


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def join(structure: Any, tensors: Tensors) -> Any:
    """The state that `split` took apart."""
    if isinstance(structure, list):
        return [join(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    match structure:
        case {"T": name}:
            return tensors[name]
        case {"N": inner}:
            return join(inner, tensors).numpy()
        case {"d": items}:
            return {join(key, tensors): join(item, tensors) for key, item in items}
        case {"o": items, "meta": meta}:
            ordered = OrderedDict((join(key, tensors), join(item, tensors)) for key, item in items)
            if meta is not None:
                ordered._metadata = join(meta, tensors)  # type: ignore[attr-defined]  # noqa: SLF001  (nn.Module's own convention)
            return ordered
        case {"counter": items}:
            return Counter({join(key, tensors): join(item, tensors) for key, item in items})
        case {"t": items}:
            return tuple(join(item, tensors) for item in items)
        case {"b": text}:
            return base64.b64decode(text)
        case {"dtype": text}:
            return _dtype(text)
        case {"device": text}:
            return torch.device(text)
    raise CheckpointCorruptError(f"a stored state has a part of unknown kind: {sorted(structure)}")


def template(structure: Any) -> dict[str, Spec]:
    """The tensors that `structure` refers to, by name."""
    found: dict[str, Spec] = {}
    stack = [structure]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            if "T" in part:
                found[part["T"]] = Spec(_dtype(part["dtype"]), tuple(part["shape"]))
            else:
                stack.extend(part.values())
        elif isinstance(part, list):
            stack.extend(part)
    return found


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointCorruptError(f"a stored tensor has type {text!r}, which torch {torch.__version__} does not know")
    return dtype


def encode(structures: dict[str, Any]) -> bytes:
    """The content of `state.json`. The standard library's JSON: integers of any size, NaN and infinities, exact floats."""
    return json.dumps(structures, separators=(",", ":")).encode()


def decode(data: bytes) -> dict[str, Any]:
    """Inverse of `encode`."""
    found = json.loads(data)
    if not isinstance(found, dict):
        raise CheckpointCorruptError("state.json does not hold an object")
    return found
