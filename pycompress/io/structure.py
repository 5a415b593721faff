"""Give a copy of the skeleton the structure that a manifest describes, before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..nn.base import LAYERS, CompressedModule, set_note
from ..nn.channels_last_max_pool import ChannelsLastMaxPool2d
from ..nn.parametrized import remove_parametrizations
from ..nn.relu_unless_int8 import ReLUUnlessInt8
from ..nn.state import layers
from ..nn.surgery import all_names, replace
from .manifest import DTYPES, CheckpointError, Entry, Manifest, Simple, is_number
from .writer import _DERIVED, has_text, is_torch_layer

_BUILDABLE: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(nn.Identity, nn.Flatten, nn.Linear, nn.Embedding, nn.PReLU),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        ChannelsLastMaxPool2d,
        *(ReLUUnlessInt8, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    )
}
"""torch.nn layers that may stand where the skeleton has another type, e.g. nn.Identity for a folded BatchNorm."""

# Constructor arguments that shape a layer and that it keeps under the same name. The others hold no parameters.
_ARGUMENTS = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "groups"),
    *("num_embeddings", "embedding_dim", "num_features", "num_channels", "num_groups", "normalized_shape", "num_parameters"),
)


def rebuild(skeleton: nn.Module, manifest: Manifest) -> nn.Module:
    """Change ``skeleton`` (a copy) to the manifest's structure and return it.

    Layers of another type are put in place without values (on the meta device), simple attributes are set.
    """
    _remove_parametrizations(skeleton)
    found = layers(skeleton)
    new = {path: _empty_layer(path, entry, found.get(path)) for path, entry in manifest.modules.items()}
    replaced = [path for path, layer in new.items() if layer is not None]
    _check_paths(manifest, found, replaced)
    _check_shared(manifest, skeleton, found, replaced)
    for path, entry in manifest.modules.items():
        layer = new[path]
        if layer is not None:
            skeleton = replace(skeleton, found[path], layer)
        if entry.config is None:
            _set_attributes(path, layer or found[path], entry)
            set_note(layer or found[path], entry.note)  # compressed layers are built again when their tensors are read
    return skeleton


def build_compressed(path: str, entry: Entry, device: str) -> CompressedModule:
    """An empty layer of a registered class. On the meta device it takes no memory, whatever sizes the file claims."""
    if entry.type not in LAYERS:
        raise CheckpointError(f"module {path!r} has the unknown layer class {entry.type!r}, known are {', '.join(LAYERS)}")
    assert entry.config is not None
    try:
        with torch.device(device):
            layer = LAYERS[entry.type].from_config(entry.config)
    except Exception as error:  # whatever a layer makes of arguments that nobody has checked before
        raise CheckpointError(f"module {path!r} cannot be built as {entry.type} ({first_line(error)})") from error
    layer.weight_dtype = DTYPES[entry.weight_dtype or "F32"]
    set_note(layer, entry.note)
    return layer


def _remove_parametrizations(model: nn.Module) -> None:
    """A checkpoint holds effective weights, so parametrizations of the skeleton (weight norm, masks) have done their part."""
    for module in list(layers(model).values()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                remove_parametrizations(module, name)


def _empty_layer(path: str, entry: Entry, old: nn.Module | None) -> nn.Module | None:
    """What takes the place of a module of the skeleton, None if it stays."""
    if old is None:
        raise CheckpointError(f"the skeleton has no module {path!r} ({entry.type} in the file)")
    if entry.config is not None:
        return build_compressed(path, entry, "meta")
    if type(old).__name__ == entry.type:
        return None
    if entry.type not in _BUILDABLE:
        raise CheckpointError(f"the skeleton has a {type(old).__name__} at {path or 'its root'!r}, the file a {entry.type}")
    arguments = {name: entry.attributes[name] for name in _ARGUMENTS if name in entry.attributes}
    try:
        with torch.device("meta"):
            layer = _BUILDABLE[entry.type](**arguments)
    except Exception as error:  # as in build_compressed
        raise CheckpointError(f"module {path!r} cannot be built as {entry.type} ({first_line(error)})") from error
    return layer


def _check_paths(manifest: Manifest, found: dict[str, nn.Module], replaced: list[str]) -> None:
    for path in found:
        if path not in manifest.modules and not _is_below(path, replaced):
            raise CheckpointError(f"the skeleton has a module {path!r} ({type(found[path]).__name__}) that the file does not know")
    for path in manifest.modules:
        if _is_below(path, replaced):
            raise CheckpointError(f"module {path!r} cannot be inside a layer that is stored as a whole")


def _check_shared(manifest: Manifest, skeleton: nn.Module, found: dict[str, nn.Module], replaced: list[str]) -> None:
    names = all_names(skeleton)
    shared = {other: path for path, module in found.items() for other in names[module][1:] if not _is_below(path, replaced)}
    for other in sorted(shared.keys() | manifest.shared.keys()):
        if shared.get(other) != manifest.shared.get(other):
            raise CheckpointError(f"skeleton and file do not share the same modules ({other!r})")


def _is_below(path: str, parents: list[str]) -> bool:
    return any(path != parent and (parent == "" or path.startswith(f"{parent}.")) for parent in parents)


def _set_attributes(path: str, module: nn.Module, entry: Entry) -> None:
    """Numbers that differ from the skeleton's get the file's value. Names that the skeleton lacks are left out: they are
    notes somebody made on the model, not arguments of its constructor."""
    own = vars(module)
    for name, value in entry.attributes.items():
        if name not in own or name == "training" or (name.startswith("_") and name not in _DERIVED):
            continue
        old = own[name]
        plain = list(old) if isinstance(old, (tuple, list)) else old
        if plain == value and type(plain) is type(value):
            continue
        if not _fits(plain, value) or (has_text([plain, value]) and not is_torch_layer(module)):
            raise CheckpointError(f"module {path!r} has {name} = {old!r} in the skeleton, it cannot become {value!r}")
        if isinstance(old, (tuple, list)) and isinstance(value, list):
            value = type(old)(value)  # type: ignore[assignment]
        setattr(module, name, value)


def _fits(old: object, new: Simple) -> bool:
    if old is None or new is None:
        return True
    if isinstance(old, list) or isinstance(new, list):
        # nn.Conv2d takes padding as numbers or as a word
        return isinstance(old, (list, str)) and isinstance(new, (list, str))
    if isinstance(old, bool) or isinstance(new, bool):
        return type(old) is type(new)
    if isinstance(old, str) or isinstance(new, str):
        return type(old) is type(new)
    return is_number(old) and is_number(new)


def first_line(error: Exception) -> str:
    """torch appends C++ stack traces."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def own_names(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Names of a module's parameters (True) and buffers (False), those that are None included."""
    yield from ((name, True) for name in module._parameters)
    yield from ((name, False) for name in module._buffers)
