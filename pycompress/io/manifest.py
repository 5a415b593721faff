"""The structure of a model as JSON, in the header of a ``.safetensors`` file.

A file is read by whoever gets it, so nothing in it is believed before it is checked: types, names, and that the table of
tensors here says the same as the header of the file. See docs/checkpoints.md for the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

VERSION = 1
KEY = "pycompress"
"""The entry of the file's metadata that holds the manifest."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Element types of the safetensors format that a checkpoint may hold."""

Simple = bool | int | float | str | list[bool | int | float | str | None] | None


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not fit the skeleton."""


@dataclass(frozen=True)
class Entry:
    """One module: a compressed layer with the arguments to build it, or any other with its simple attributes."""

    type: str
    config: dict[str, Any] | None
    attributes: dict[str, Simple]
    none: tuple[str, ...]
    """Parameters and buffers that are None, e.g. ``("bias",)``."""
    transient: tuple[str, ...]
    """Buffers that are not part of the state_dict."""
    weight_dtype: str | None = None
    """Of a compressed layer: the name in ``DTYPES`` of the type of its ``weight``, None for float32, as in files that do not have it."""
    note: str | None = None
    """Why the layer was left as it is, for ``pycompress.report``."""


@dataclass(frozen=True)
class Stored:
    """One tensor: ``order`` lists its dimensions from the outermost in memory, None for the usual order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class Manifest:
    architecture: str
    """Module and name of the class that was saved; information only, nothing is imported."""
    library: str
    modules: dict[str, Entry]
    """By first path, parents first."""
    shared: dict[str, str]
    """Further paths of modules that hang in several places -> the first one."""
    tensors: dict[str, Stored]
    tied: dict[str, str]
    """Names of tied tensors -> the name under which the tensor is stored."""
    metadata: dict[str, Any]

    def to_json(self) -> str:
        data = {
            "format": KEY,
            "version": VERSION,
            "library": self.library,
            "architecture": self.architecture,
            "modules": {path: _drop_empty(entry.__dict__) for path, entry in self.modules.items()},
            "shared": self.shared,
            "tensors": {name: _row(stored) for name, stored in self.tensors.items()},
            "tied": self.tied,
            "metadata": self.metadata,
        }
        return json.dumps(data, separators=(",", ":"))


def parse(text: str | None, header: Mapping[str, tuple[str, list[int]]]) -> Manifest:
    """Check and read a manifest. ``header``: dtype and shape of each tensor as the file has them."""
    if text is None:
        raise CheckpointError("has no pycompress manifest, was it written by pycompress.save?")
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its manifest is not JSON ({error})") from error
    root = _Reader(data, "manifest")
    if root.get("format", str) != KEY:
        raise CheckpointError(f"its manifest has the format {data['format']!r}, expected {KEY!r}")
    version = root.get("version", int)
    if version > VERSION:
        library = root.get("library", str)
        raise CheckpointError(f"has format version {version} (pycompress {library}), this pycompress reads up to {VERSION}: update it")
    if version < 1:
        raise CheckpointError(f"has format version {version}, which does not exist")
    manifest = Manifest(
        architecture=root.get("architecture", str),
        library=root.get("library", str),
        modules={path: _entry(path, each) for path, each in root.get("modules", dict).items()},
        shared=root.strings("shared"),
        tensors={name: _stored(name, each) for name, each in root.get("tensors", dict).items()},
        tied=root.strings("tied"),
        metadata=root.get("metadata", dict),
    )
    _check_names(manifest)
    _check_header(manifest, header)
    return manifest


def is_number(value: Any) -> bool:
    return type(value) in (bool, int, float)


def is_simple(value: Any) -> bool:
    """Values that may be stored as attributes: numbers, strings, None, and lists or tuples of them."""
    if type(value) in (tuple, list, torch.Size):
        return all(each is None or type(each) is str or is_number(each) for each in value)
    return value is None or type(value) is str or is_number(value)


class _Reader:
    """Typed access to a JSON object."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"its {where} must be an object, got {type(data).__name__}")
        self.data, self.where = data, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.data.get(key, default)
        if type(value) is not kind:
            got = type(value).__name__ if key in self.data else "nothing"
            raise CheckpointError(f"its {self.where} must have {key!r} of type {kind.__name__}, got {got}")
        return value

    def strings(self, key: str) -> dict[str, str]:
        value = self.get(key, dict)
        if not all(isinstance(each, str) for each in value.values()):
            raise CheckpointError(f"its {self.where} must have only strings in {key!r}")
        return value


def _entry(path: str, data: Any) -> Entry:
    reader = _Reader(data, f"manifest entry for module {path!r}")
    attributes = reader.get("attributes", dict, {})
    for name, value in attributes.items():
        if not is_simple(value):
            raise CheckpointError(f"its {reader.where} must have simple attributes, got {type(value).__name__} for {name!r}")
    none, transient = reader.get("none", list, []), reader.get("transient", list, [])
    if not all(isinstance(name, str) for name in (*none, *transient)):
        raise CheckpointError(f"its {reader.where} must have names in 'none' and 'transient'")
    config = reader.get("config", dict) if "config" in data else None
    dtype = data.get("weight_dtype")
    if dtype is not None and (type(dtype) is not str or dtype not in DTYPES or not DTYPES[dtype].is_floating_point):
        raise CheckpointError(f"its {reader.where} must have a floating-point 'weight_dtype', got {dtype!r}")
    note = reader.get("note", str) if "note" in data else None
    return Entry(reader.get("type", str), config, attributes, tuple(none), tuple(transient), dtype, note)


def _stored(name: str, row: Any) -> Stored:
    """[dtype, shape] or [dtype, shape, order]"""
    where = f"manifest entry for tensor {name!r}"
    if type(row) is not list or len(row) not in (2, 3) or any(type(part) is not list for part in row[1:]):
        raise CheckpointError(f"its {where} must be a list of dtype, shape and perhaps order")
    dtype, shape = DTYPES.get(row[0]) if type(row[0]) is str else None, row[1]
    if dtype is None:
        raise CheckpointError(f"its {where} has the unknown dtype {row[0]!r}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"its {where} must have a shape of non-negative integers")
    order = row[2] if len(row) == 3 else None
    if order is not None and (any(type(dim) is not int for dim in order) or sorted(order) != list(range(len(shape)))):
        raise CheckpointError(f"its {where} must have a permutation of the dimensions as order")
    return Stored(dtype, tuple(shape), None if order is None else tuple(order))


def _row(stored: Stored) -> list[Any]:
    return [dtype_name(stored.dtype), stored.shape, *([] if stored.order is None else [stored.order])]


def _check_names(manifest: Manifest) -> None:
    if "" not in manifest.modules:
        raise CheckpointError("its manifest does not describe the root module")
    for name, first in manifest.shared.items():
        if first not in manifest.modules or name in manifest.modules:
            raise CheckpointError(f"its manifest shares module {name!r} with {first!r}, which do not fit its list of modules")
    for name, stored in manifest.tied.items():
        if stored not in manifest.tensors or name in manifest.tensors:
            raise CheckpointError(f"its manifest ties {name!r} to {stored!r}, which do not fit its list of tensors")


def _check_header(manifest: Manifest, header: Mapping[str, tuple[str, list[int]]]) -> None:
    for name in sorted(manifest.tensors.keys() ^ header.keys()):
        problem = (
            "the manifest lists it, the file lacks it" if name in manifest.tensors else "the file has it, the manifest does not list it"
        )
        raise CheckpointError(f"tensor {name!r}: {problem}")
    for name, (dtype, shape) in header.items():
        stored = manifest.tensors[name]
        if DTYPES.get(dtype) != stored.dtype or tuple(shape) != stored.shape:
            raise CheckpointError(
                f"tensor {name!r} is {dtype} {list(shape)}, the manifest says {dtype_name(stored.dtype)} {list(stored.shape)}"
            )


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _drop_empty(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value not in (None, {}, ()) or (key == "config" and value is not None)}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return data
