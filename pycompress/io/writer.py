"""``pycompress.save``."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..atomic import atomic_path
from ..nn.base import LAYERS, CompressedModule, get_note
from ..nn.state import layers, own_slots
from ..nn.surgery import all_names
from ..nn.untouched import untouched
from .manifest import DTYPES, KEY, Entry, Manifest, Simple, Stored, dtype_name, is_simple


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a model, compressed or not, to one ``.safetensors`` file. Returns the path.

    The file holds the tensors and, as JSON in its header, the structure: compressed layers and their settings, the
    changed sizes of pruned layers, tied tensors, shared modules. No code and no pickle; :func:`load` puts it on an
    instance of the original architecture. Parametrizations (masks, fake quantization) are not stored, their effect is:
    a masked weight is written with its zeros. ``metadata``: anything JSON can hold, see :func:`read_manifest`.

    The file appears whole or not at all; the model stays as it was. Raises ``TypeError`` for what such a file cannot
    hold: a compressed layer that is not in ``pycompress.nn.LAYERS``, modules with extra state, complex or sparse tensors.
    Warns about a model that simulates quantized activations: the original architecture will not do as its skeleton.

    >>> save(model, "small.safetensors", metadata={"accuracy": 0.98})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be a torch.nn.Module, got {type(model).__name__}")
    user = _checked_metadata(metadata)
    model = getattr(model, "_orig_mod", model)  # torch.compile
    model = model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else model
    _warn_of_simulation(model)
    with untouched(model):
        manifest, tensors = _describe(model, user)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={KEY: manifest.to_json()})
    return Path(path)


def _warn_of_simulation(model: nn.Module) -> None:
    """Quantizers of activations are modules that the original does not have. (Those of weights are parametrizations, no part of a file.)"""
    for path, module in layers(model).items():
        if type(module).__module__.startswith("pycompress.quantization."):
            warnings.warn(
                f"save: {path!r} simulates quantized activations in float: to load this file, prepare or quantize the original with "
                "the same config first and give that as skeleton",
                stacklevel=3,
            )
            return


def _describe(model: nn.Module, metadata: dict[str, Any]) -> tuple[Manifest, dict[str, Tensor]]:
    found = layers(model)
    names = all_names(model)
    entries: dict[str, Entry] = {}
    stored: dict[str, Stored] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[Any, str] = {}
    storages: set[int] = set()
    for path, module in found.items():
        entries[path] = _entry(path, module)
        for slot in own_slots(module, all_buffers=True):
            name = f"{path}.{slot.name}" if path else slot.name
            if slot.identity in first_name:
                tied[name] = first_name[slot.identity]
                continue
            first_name[slot.identity] = name
            stored[name], tensors[name] = _plain(name, slot.tensor)
            # The format wants every tensor to own its bytes.
            storage = tensors[name].untyped_storage()
            if storage.data_ptr() in storages or storage.nbytes() != tensors[name].nbytes:
                tensors[name] = tensors[name].clone()
            storages.add(tensors[name].untyped_storage().data_ptr())
    architecture = type(model)
    return (
        Manifest(
            architecture=f"{architecture.__module__}.{architecture.__qualname__}",
            library=_library_version(),
            modules=entries,
            shared={other: path for path, module in found.items() for other in names[module][1:]},
            tensors=stored,
            tied=tied,
            metadata=metadata,
        ),
        tensors,
    )


def _entry(path: str, module: nn.Module) -> Entry:
    kind = parametrize.type_before_parametrizations(module)
    if isinstance(module, CompressedModule):
        if kind.__name__ not in LAYERS or LAYERS[kind.__name__] is not kind:
            raise TypeError(f"save: compressed layer {path!r} must be registered in pycompress.nn.LAYERS, got {kind.__name__}")
        dtype = None if module.weight_dtype == torch.float32 else dtype_name(module.weight_dtype)
        return Entry(kind.__name__, json.loads(json.dumps(module.config())), {}, (), (), dtype, get_note(module))
    if getattr(kind, "get_extra_state", None) is not nn.Module.get_extra_state:
        raise TypeError(f"save: module {path!r} ({kind.__name__}) has extra state, which a file without pickle cannot hold")
    none = [name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is None]
    transient = [name for name in module._buffers if name in module._non_persistent_buffers_set]
    return Entry(kind.__name__, None, simple_attributes(module), tuple(none), tuple(transient), note=get_note(module))


# An attribute with an underscore that nn.Conv2d derives from its padding and reads in forward.
_DERIVED = ("_reversed_padding_repeated_twice",)


def simple_attributes(module: nn.Module) -> dict[str, Simple]:
    """Numbers, None, and lists of them among a module's attributes; strings only of torch's own layers.

    Pruning changes such attributes (``num_heads``, ``groups``), and ``forward`` depends on them.
    """
    own = {
        name: value
        for name, value in vars(module).items()
        if (not name.startswith("_") or name in _DERIVED) and name != "training" and is_simple(value)
    }
    if not is_torch_layer(module):
        own = {name: value for name, value in own.items() if not has_text(value)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


def is_torch_layer(module: nn.Module) -> bool:
    return parametrize.type_before_parametrizations(module).__module__.startswith("torch.nn.")


def has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(each, str) for each in value))


def _plain(name: str, tensor: Tensor) -> tuple[Stored, Tensor]:
    """The tensor as it goes into the file: on the CPU, contiguous after its dimensions were put in memory order."""
    if is_lazy(tensor):
        raise ValueError(f"save: tensor {name!r} has no shape yet, run the model once before saving it")
    if tensor.is_meta:
        raise ValueError(f"save: tensor {name!r} is on the meta device and has no values")
    if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
        raise TypeError(f"save: tensor {name!r} must be dense with a dtype of the safetensors format, got {tensor.dtype}, {tensor.layout}")
    tensor = tensor.detach()
    order = _memory_order(tensor)
    data = tensor if order is None else tensor.permute(order)
    return Stored(tensor.dtype, tuple(data.shape), order), data.cpu().contiguous()


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from the outermost in memory, for a permuted dense tensor such as a channels_last weight.

    The layout is kept because kernels choose their order of summation by it: another one could change the last bits.
    Even the stride of a dimension of size 1 counts, by which torch tells channels_last in a depthwise weight.
    """
    order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], -tensor.shape[dim], dim))
    for least in (1, 2):  # all dimensions if that can be had, otherwise those longer than 1
        for candidate in (None, tuple(order)):
            strides = zip(restored_strides(tensor.shape, candidate), tensor.stride(), tensor.shape, strict=True)
            if all(restored == stride for restored, stride, size in strides if size >= least):
                return candidate
    return None  # a slice or an expanded tensor is stored packed


def restored_strides(shape: Sequence[int], order: Sequence[int] | None) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in memory in that order, None for the usual one."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order if order is not None else range(len(shape))):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _library_version() -> str:
    try:
        return version("pycompress")
    except PackageNotFoundError:  # a source tree on the path, not an installation
        return "0+source"


def _checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(metadata, (Mapping, type(None))):
        raise TypeError(f"save: metadata must be a dict or None, got {type(metadata).__name__}")
    plain = dict(metadata or {})
    if not all(isinstance(key, str) for key in plain):
        raise TypeError("save: metadata must have strings as keys")
    try:
        json.dumps(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"save: metadata must be what JSON can hold ({error})") from error
    return plain
