"""Cross-layer equalization: move scale between neighbouring layers until their channels use the range equally."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ...analysis.inputs import check_model
from ...nn.surgery import Ignore, all_names, check_ignore, ignored
from ..copying import copy_model
from ..overrides import has_hooks, own_method
from ..scheme import check_int
from ..tracing import Traced, graphs, in_all
from ..types import Layer
from .base import algorithm

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# f(s x) = s f(x) for s > 0, element by element, and the same channel by channel for convolutions of d dimensions.
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout)
_ELEMENTWISE_FUNCTIONS = (F.relu, torch.relu, F.leaky_relu, F.dropout)
_BY_CHANNEL = {
    1: (nn.Dropout1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.Dropout3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
_BY_CHANNEL_FUNCTIONS = {
    1: (F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d),
    2: (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    3: (F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d),
}


_NO_PAIR = "no two of its layers have only ReLU, dropout or pooling between them, which GELU, SiLU, normalizations and additions are not"


@algorithm("cross_layer_equalization", stage="before", needs_data=False)
def cross_layer_equalization(model: nn.Module, *, iterations: int = 20, ignore: Ignore = (), inplace: bool = False) -> nn.Module:
    """Rescale pairs of layers with only ReLU-like functions between them; the float model computes the same.

    For each channel i between W1 and W2: s_i = sqrt(max|W1_i| / max|W2_i|), W1_i /= s_i, b1_i /= s_i, W2_i *= s_i. Repeated for chains.
    Matters most for one scale per tensor. Fold BatchNorms first. Pairs are found with ``torch.fx``, assuming batched inputs; an
    untraceable model is left as it is. ``ignore``: layers not to touch. Warns if there is nothing to do.
    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.

    >>> model = cross_layer_equalization(fold_batch_norm(model))
    """
    where = "cross_layer_equalization"
    check_model(where, model)
    check_int(where, "iterations", iterations, 1, 1000)
    entries = check_ignore(where, model, ignore)
    names = all_names(model)
    skip = [paths[0] for layer, paths in names.items() if any(ignored(path, layer, entries) for path in paths)]
    if not inplace:
        model = copy_model(model)
    skipped = {model.get_submodule(name) for name in skip}
    found = equalizable(model)
    pairs = [(a, b) for a, b in found if a not in skipped and b not in skipped]
    if not pairs:
        reason = "ignore names one of each pair" if found else _NO_PAIR if any(graphs(model, None)) else "torch.fx cannot trace it"
        warnings.warn(f"{where}: nothing to do, the model stays as it is ({reason})", stacklevel=2)
    for _ in range(iterations):
        changes = [_equalize(first, second) for first, second in pairs]
        if not changes or max(changes) < 1e-3:
            break
    return model


def equalizable(model: nn.Module) -> list[tuple[Layer, Layer]]:
    """(layer, next layer) pairs in which nothing else reads what flows between them."""
    return [pair for courses in graphs(model, None) for pair in in_all(courses, _neighbours)]


def _neighbours(traced: Traced) -> Iterator[tuple[Layer, Layer]]:
    for node in traced.graph.nodes:
        layer = traced.module(node)
        if not isinstance(layer, _LAYERS):
            continue
        after, module, flat = node, None, False
        while len(after.users) == 1:
            after = next(iter(after.users))
            module = traced.module(after)
            if isinstance(module, _LAYERS):
                break
            if _is_flatten(after, module):
                flat = True
            elif not _passes(after, module, layer) or (flat and module is not None and not isinstance(module, _ELEMENTWISE)):
                break
        if isinstance(module, _LAYERS) and all(_usable(traced, part) for part in (layer, module)) and _fits(layer, module, flat):
            yield layer, module


def _usable(traced: Traced, layer: Layer) -> bool:
    plain = _computes_as(layer, _LAYERS) and not parametrize.is_parametrized(layer)
    return plain and traced.called_once(layer) and not traced.read_directly(layer)


def _computes_as(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the module is of one of these types, also by what it computes, and nobody watches it."""
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    return kind is not None and own_method(module, kind) is None and not has_hooks(module)


def _dims(layer: Layer) -> int:
    """0 for Linear, d for a convolution of d dimensions."""
    return 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)


def _passes(node: fx.Node, module: nn.Module | None, layer: Layer) -> bool:
    """Whether a scale per output channel of ``layer`` comes through this node."""
    d = _dims(layer)
    if module is not None:
        return _computes_as(module, _ELEMENTWISE + _BY_CHANNEL.get(d, ()))
    if node.op == "call_method":
        return node.target in ("relu", "relu_", "contiguous")
    return node.op == "call_function" and node.target in _ELEMENTWISE_FUNCTIONS + _BY_CHANNEL_FUNCTIONS.get(d, ())


def _is_flatten(node: fx.Node, module: nn.Module | None) -> bool:
    """(N, C, ...) -> (N, C * ...)"""
    if module is not None:
        return _computes_as(module, (nn.Flatten,)) and module.start_dim == 1 and module.end_dim == -1
    named = node.target == "flatten" if node.op == "call_method" else node.target is torch.flatten
    return named and node.args[1:] == (1,) and not node.kwargs


def _fits(first: Layer, second: Layer, flat: bool) -> bool:
    """Whether each input feature of ``second`` belongs to one output channel of ``first``."""
    channels: int = first.weight.shape[0]
    if isinstance(second, nn.Linear):
        if isinstance(first, nn.Linear):
            return second.in_features == channels
        return flat and second.in_features % channels == 0
    return not flat and _dims(first) == _dims(second) and second.in_channels == channels


def _by_input(second: Layer, channels: int) -> Tensor:
    """View of the second weight as (groups, outputs, channels per group, rest)."""
    weight: Tensor = second.weight
    groups = getattr(second, "groups", 1)
    return weight.view(groups, weight.shape[0] // groups, channels // groups, -1)


@torch.no_grad()
def _equalize(first: Layer, second: Layer) -> float:
    """One pair, in place; returns how far the largest factor was from 1."""
    weight: Tensor = first.weight
    channels = weight.shape[0]
    after = _by_input(second, channels)
    range1 = weight.flatten(1).abs().amax(dim=1).double()
    range2 = after.abs().amax(dim=(1, 3)).flatten().double()
    usable = (range1 > 0) & (range2 > 0)
    scale = torch.where(usable, (range1 / range2.clamp(min=1e-30)).sqrt(), torch.ones_like(range1))
    weight.copy_(weight.double() / scale.view(-1, *[1] * (weight.dim() - 1)))
    if first.bias is not None:
        first.bias.copy_(first.bias.double() / scale)
    after.copy_(after.double() * scale.view(after.shape[0], 1, -1, 1))
    return float((scale.log().abs()).max())
