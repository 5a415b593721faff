"""Which layers of a model are quantized, why the others are not, and how a float layer is taken apart and put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..nn.base import CompressedModule
from ..nn.packed import PackedModule
from ..nn.sparse24_conv2d import Sparse24Conv2d
from ..nn.sparse24_linear import Sparse24Linear
from ..nn.surgery import Ignore, all_names, ignored, replace
from .foreign import as_linear, is_transposed_linear
from .overrides import has_hooks, own_method
from .types import Layer

if TYPE_CHECKING:
    from .configs import QuantizationConfig

ConfigMap = Mapping[str | type[nn.Module], "QuantizationConfig"]

_FLOAT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PACKED_FLOAT_LAYERS = (Sparse24Linear, Sparse24Conv2d)
"""What pruning made of float layers: still to be quantized."""


def choose_layers(
    where: str, model: nn.Module, config: QuantizationConfig | ConfigMap, ignore: Ignore, *, qat: bool = False
) -> tuple[dict[str, QuantizationConfig], dict[str, str]]:
    """(name -> config of the layers to quantize, name -> reason for each layer with weights that stays as it is).

    Shared modules appear once. ``qat``: they are to be trained, which packed layers cannot. Raises ``ValueError`` if no layer can be
    quantized or a weight holds NaN or Inf.
    """
    chosen: dict[str, QuantizationConfig] = {}
    kept: dict[str, str] = {}
    names = all_names(model)
    _check_patterns(where, names, config)
    owners = _owners(model)
    inside_attention = {child for module in names if isinstance(module, nn.MultiheadAttention) for child in module.modules()} - {
        module for module in names if isinstance(module, nn.MultiheadAttention)
    }
    inside_compressed = {
        child
        for module in names
        if isinstance(module, CompressedModule) and not isinstance(module, _PACKED_FLOAT_LAYERS)
        for child in module.modules()
    }
    for module, paths in names.items():
        if module in inside_compressed or not _has_weights(module):
            continue
        layer_config = _config_of(module, paths, config)
        if any(ignored(path, module, ignore) for path in paths):
            kept[paths[0]] = "left as it is: named in ignore"
        elif layer_config is None:
            kept[paths[0]] = "left as it is: no config is given for it"
        else:
            reason = _obstacle(module, layer_config, owners, module in inside_attention, qat)
            if reason is None:
                chosen[paths[0]] = layer_config
            else:
                kept[paths[0]] = f"left as it is: {reason}"
    if not chosen:
        raise ValueError(f"{where}: model must have a layer that can be quantized, got none{_why_none(names, kept)}")
    for name in chosen:
        layer = model.get_submodule(name)
        for part, tensor in (("weight", layer.weight), ("bias", getattr(layer, "bias", None))):  # an embedding has no bias
            if isinstance(tensor, Tensor) and tensor.is_meta:
                how = "give it some first: model.to_empty(device='cpu'), then load_state_dict"
                raise ValueError(f"{where}: {part} of layer {name!r} must have values, got a meta tensor; {how}")
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                raise ValueError(f"{where}: {part} of layer {name!r} must be finite, got NaN or Inf")
    return chosen, kept


def _check_patterns(where: str, names: dict[nn.Module, list[str]], config: QuantizationConfig | ConfigMap) -> None:
    """A name or pattern that matches nothing is a mistake, as it is in ``ignore``. Types may be those of other models."""
    for pattern in config if isinstance(config, Mapping) else ():
        if isinstance(pattern, str) and not any(_matches(pattern, path) for paths in names.values() for path in paths):
            raise ValueError(f"{where}: config entry {pattern!r} matches no module of the model")


def _matches(pattern: str, path: str) -> bool:
    return path == pattern or path.startswith(pattern + ".") or fnmatchcase(path, pattern)


def _config_of(module: nn.Module, paths: list[str], config: QuantizationConfig | ConfigMap) -> QuantizationConfig | None:
    """The last matching entry of a mapping wins, so that exceptions follow the rule."""
    if not isinstance(config, Mapping):
        return config
    found = None
    for pattern, candidate in config.items():
        if isinstance(pattern, type):
            if isinstance(module, pattern) or (issubclass(nn.Linear, pattern) and is_transposed_linear(module)):
                found = candidate
        elif any(_matches(pattern, path) for path in paths):
            found = candidate
    return found


def _has_weights(module: nn.Module) -> bool:
    """A layer that owns a matrix or kernel itself: worth a word in the report if it stays float."""
    if isinstance(module, _PACKED_FLOAT_LAYERS):
        return True
    if isinstance(module, (CompressedModule, nn.utils.parametrize.ParametrizationList)):
        return False
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return isinstance(module, _FLOAT_LAYERS) or any(isinstance(p, UninitializedParameter) or p.dim() >= 2 for p in own)


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Parameter id -> modules that hold it themselves."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def open_packed(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replace packed float layers, and linear layers of other libraries, among these by torch's with the same weights, in place."""
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, _PACKED_FLOAT_LAYERS):
            model = replace(model, layer, layer.to_dense())
        elif is_transposed_linear(layer):
            model = replace(model, layer, as_linear(layer))
    return model


def _obstacle(
    module: Layer, config: QuantizationConfig, owners: dict[int, list[nn.Module]], inside_attention: bool, qat: bool
) -> str | None:
    kind = type(module).__name__.removeprefix("Parametrized")
    if isinstance(module, config.packed_types):
        return _packed_obstacle(module, config, qat)
    transposed = is_transposed_linear(module) and nn.Linear in config.layer_types
    if not isinstance(module, config.layer_types) and not transposed:
        return f"{type(config).__name__} has no layer for {kind}"
    if inside_attention:
        return "nn.MultiheadAttention uses this weight directly and never calls the layer"
    base = type(module) if transposed else next(base for base in config.layer_types if isinstance(module, base))
    method = own_method(module, base)
    if method is not None:
        return f"{kind} has a {method} of its own"
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        return "its weight is not initialized, run the model once first"
    if any(len(owners[id(parameter)]) > 1 for parameter in module.parameters()):
        return "its weight is tied to another layer's"
    if "weight" not in module._parameters and not nn.utils.parametrize.is_parametrized(module, "weight"):
        return "its weight is not a parameter (an old-style weight_norm or spectral_norm, or torch.nn.utils.prune? take it off first)"
    if has_hooks(module):
        return "it has hooks, which a new layer would lose"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}, not a floating point type"
    if module.weight.numel() == 0:
        return "its weight is empty"
    return config.obstacle(as_linear(module) if transposed else module)


def _packed_obstacle(module: PackedModule, config: QuantizationConfig, qat: bool) -> str | None:
    if qat:
        return f"a {type(module).__name__} cannot be trained; for training with masks call Pruner.convert after Quantizer.convert"
    if module.activation != "none":
        return f"its activation {module.activation!r} is fused into it"
    if has_hooks(module):
        return "it has hooks, which a new layer would lose"
    return config.obstacle(module.to_dense())


_NOT_MEANT = ("named in ignore", "no config is given for it", " has no layer for ")


def _why_none(names: dict[nn.Module, list[str]], kept: dict[str, str]) -> str:
    if kept:
        # A layer that could be quantized but for something tells more than one that was never meant to be.
        telling = [(name, reason) for name, reason in kept.items() if not any(words in reason for words in _NOT_MEANT)]
        name, reason = next(iter(telling or kept.items()))
        more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        return f" ({name or 'the model itself'}: {reason.removeprefix('left as it is: ')}{more})"
    if any(isinstance(module, CompressedModule) for module in names):
        return " (it is quantized already)"
    return ""


def float_twin(layer: Layer) -> Layer:
    """A plain layer with the effective weight of a parametrized one, in its mode (training or not). Tensors are shared, not copied."""
    weight: Tensor = layer.weight.detach()
    bias = layer.bias
    options: dict[str, Any] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        twin: Layer = nn.Linear(layer.in_features, layer.out_features, **options)
    else:
        kind: Any = next(base for base in _FLOAT_LAYERS if isinstance(layer, base))
        same = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")}
        twin = kind(layer.in_channels, layer.out_channels, **same, **options)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        twin.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return twin.train(layer.training)
