"""``pycompress.load``."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..nn.base import CompressedModule
from ..nn.state import layers
from ..nn.surgery import replace
from .manifest import KEY, CheckpointError, Entry, Manifest, parse
from .structure import build_compressed, own_names, rebuild


def load(path: str | os.PathLike[str], skeleton: nn.Module | None = None, *, device: str | torch.device = "cpu") -> nn.Module:
    """Read a model that :func:`save` wrote. Returns a new model in evaluation mode.

    ``skeleton``: an instance of the original architecture, as it was before pruning and quantization; its values do not
    matter, it may live on the meta device. It is copied, never changed: layers get the types and sizes that the file
    says, then every tensor is loaded; a missing or unexpected one is an error. Only a file that holds a single
    compressed layer needs no skeleton.

    Outputs equal those of the saved model to the bit (on the same machine and kernels). Nothing in the file is run or
    imported: it names layer classes of ``pycompress.nn.LAYERS`` and a fixed set of torch.nn layers, numbers, and tensors.

    Raises :class:`CheckpointError` (a ``ValueError``) that names the file and what is wrong with it.

    >>> model = load("small.safetensors", Net())
    """
    if skeleton is not None and not isinstance(skeleton, nn.Module):
        raise TypeError(f"load: skeleton must be a torch.nn.Module or None, got {type(skeleton).__name__}")
    device = torch.device(device)
    skeleton = getattr(skeleton, "_orig_mod", skeleton)
    with torch.device("cpu"), _named_errors(path), _opened(path) as (manifest, file):
        if skeleton is None and manifest.modules[""].config is None:
            raise CheckpointError(
                f"holds tensors and structure but no code, so load needs skeleton: an instance of {manifest.architecture} as it was "
                f"before compression, load(path, {manifest.architecture.rpartition('.')[2]}(...))"
            )
        model = rebuild(nn.Identity() if skeleton is None else copy.deepcopy(skeleton), manifest)
        _check_tensors(model, manifest)
        return _fill(model, manifest, file).eval().to(device)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked manifest of a checkpoint as plain data, among it the ``"metadata"`` given to :func:`save`."""
    with _named_errors(path), _opened(path) as (manifest, _):
        return json.loads(manifest.to_json())


@contextmanager
def _named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        # Names and values in the message come from the file and may have any length.
        raise CheckpointError(f"load: {os.fspath(path)}: {str(error)[:500]}") from error.__cause__


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Manifest, Any]]:
    if Path(path).is_dir():
        raise CheckpointError("is a folder")
    Path(path).open("rb").close()  # a missing or unreadable file is an ordinary OSError
    try:
        file = safe_open(os.fspath(path), framework="pt", device="cpu")
    except Exception as error:  # SafetensorError, and for an empty file an error of mmap
        raise CheckpointError(f"is not a safetensors file, or damaged or cut short ({error})") from error
    with file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        header = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
        yield parse((file.metadata() or {}).get(KEY), header), file


def _check_tensors(model: nn.Module, manifest: Manifest) -> None:
    """Every tensor of the file has a place in the model and the other way round, before the first one is read."""
    expected: set[str] = set()
    for path, module in layers(model).items():
        entry = manifest.modules[path]
        if isinstance(module, CompressedModule):
            expected |= _check_compressed(path, module, manifest)
        else:
            expected |= _check_plain(path, module, entry, manifest)
    for name in sorted(manifest.tensors.keys() | manifest.tied.keys()):
        if name not in expected:
            raise CheckpointError(f"has an unexpected tensor {name!r}, no module of the skeleton takes it")


def _check_compressed(path: str, module: CompressedModule, manifest: Manifest) -> set[str]:
    """The empty layer on the meta device says what it wants."""
    expected = set()
    for name, want in module.state_dict().items():
        full = _join(path, name)
        stored = manifest.tensors.get(full)
        if stored is None:
            raise CheckpointError(f"lacks the tensor {full!r}")
        if stored.order is not None or stored.dtype != want.dtype or stored.shape != tuple(want.shape):
            raise CheckpointError(
                f"tensor {full!r} must be {want.dtype} {tuple(want.shape)} for its {type(module).__name__}, "
                f"got {stored.dtype} {stored.shape}"
            )
        expected.add(full)
    return expected


def _check_plain(path: str, module: nn.Module, entry: Entry, manifest: Manifest) -> set[str]:
    expected = set()
    for name, _ in own_names(module):
        full = _join(path, name)
        stored = manifest.tensors.get(manifest.tied.get(full, full))
        if stored is None:
            if name in entry.none or name in module._non_persistent_buffers_set:
                continue
            raise CheckpointError(f"lacks the tensor {full!r}")
        expected.add(full)
        old = getattr(module, name)
        if old is None or name in module._non_persistent_buffers_set:
            continue
        shape = stored.shape  # in memory order, which has the same number of dimensions
        if stored.dtype.is_floating_point != old.is_floating_point() or (not old.is_floating_point() and stored.dtype != old.dtype):
            raise CheckpointError(f"tensor {full!r} has dtype {stored.dtype}, {old.dtype} in the skeleton")
        if len(shape) != old.dim():
            raise CheckpointError(f"tensor {full!r} has {len(shape)} dimensions, {old.dim()} in the skeleton")
    # A buffer outside the state_dict that forward made on the way will be made again.
    return expected | {_join(path, name) for name in entry.transient if name not in module._buffers}


def _fill(model: nn.Module, manifest: Manifest, file: Any) -> nn.Module:
    read: dict[tuple[str, bool], Tensor] = {}

    def tensor(name: str) -> Tensor:
        """A copy in memory of torch's own: the file's is mapped, badly aligned, and gone when the file is rewritten."""
        stored = manifest.tensors[name]
        data = file.get_tensor(name).clone()
        if stored.order is None:
            return data
        inverse = sorted(range(data.dim()), key=stored.order.__getitem__)
        return data.permute(inverse)

    for path, module in layers(model).items():
        if isinstance(module, CompressedModule):
            values = {name: tensor(_join(path, name)) for name in module.state_dict()}
            model = replace(model, module, _filled_layer(path, manifest.modules[path], values))
            continue
        for name, is_parameter in list(own_names(module)):
            full = _join(path, name)
            full = manifest.tied.get(full, full)
            old = getattr(module, name)
            if full not in manifest.tensors:
                if name in manifest.modules[path].none:
                    setattr(module, name, None)
                elif old is not None and old.is_meta:
                    raise CheckpointError(f"lacks the buffer {full!r}, and the skeleton's is on the meta device")
                continue
            if (full, is_parameter) not in read:
                value = tensor(full)
                if is_parameter:
                    trains = value.is_floating_point() if old is None else old.requires_grad
                    value = nn.Parameter(value, requires_grad=trains)
                read[full, is_parameter] = value
            setattr(module, name, read[full, is_parameter])
    return model


def _filled_layer(path: str, entry: Entry, values: dict[str, Tensor]) -> CompressedModule:
    layer = build_compressed(path, entry, "cpu")  # as large as the file's tensors, that was checked
    try:
        layer.load_state_dict(values, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"module {path!r} does not take its tensors ({error})".replace("\n", " ")) from error
    return layer


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
