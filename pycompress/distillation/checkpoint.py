"""Training state in one safetensors file: tensors as tensors, everything else as JSON in its header. No pickle.

Writing is atomic (a temporary file in the same folder, then a rename), so a crash leaves the previous checkpoint.
Reading builds numbers, strings, lists, dictionaries and tensors, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "pycompress-checkpoint-1"


def save_state(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested dictionaries, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises ``TypeError`` for any other value, naming where it sits, before the file is touched.

    >>> save_state({"epoch": 3, "optimizer": optimizer.state_dict()}, "run.safetensors")
    """
    tensors: dict[str, Tensor] = {}
    manifest = json.dumps(_pack(state, "state", tensors))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "manifest": manifest})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, tensors on the CPU. Raises ``ValueError`` for a file that is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
        state = _unpack(json.loads(metadata["manifest"]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"load_state: {os.fspath(path)!r} is not a usable training checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"load_state: {os.fspath(path)!r} is not a usable training checkpoint: no state in it")
    return state


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``: [tag, content] for containers and tensors, plain for the rest. Tensors go into ``tensors``."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"save_state: {where} must be a plain dense tensor, got {type(value).__name__}")
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return ["tensor", name]
    if isinstance(value, Mapping):
        tag = "counter" if isinstance(value, Counter) else "dict"
        return [
            tag,
            [[_pack(key, f"a key of {where}", tensors), _pack(entry, f"{where}[{key!r}]", tensors)] for key, entry in value.items()],
        ]
    if isinstance(value, (list, tuple)):
        return ["list" if isinstance(value, list) else "tuple", [_pack(entry, f"{where}[{i}]", tensors) for i, entry in enumerate(value)]]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"save_state: {where} must be a tensor, number, string, list or dict, got {type(value).__name__}")


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(packed, list):
        return packed
    tag, content = packed
    if tag == "tensor":
        return tensors[content]
    if tag in ("dict", "counter"):
        entries = {_unpack(key, tensors): _unpack(value, tensors) for key, value in content}
        return entries if tag == "dict" else Counter(entries)
    if tag in ("list", "tuple"):
        values = [_unpack(entry, tensors) for entry in content]
        return values if tag == "list" else tuple(values)
    raise ValueError(f"unknown entry {tag!r} in its manifest")
