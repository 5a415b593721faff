"""BatchNorm folding: put the normalization into the weights of the layer before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..analysis.inputs import check_model
from ..nn.base import set_note
from ..nn.surgery import Ignore, all_names, check_ignore, ignored, replace
from ..nn.untouched import untouched
from .calibration import example_run
from .calls import Calls
from .copying import copy_model
from .overrides import own_method
from .tracing import Traced, graphs, in_all
from .types import Layer, Norm

_PAIRS = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_OUT_OF_SIGHT = "kept: it lies in code that torch.fx cannot trace, where only a run on example_inputs tells what is before it"
_OUT_OF_SIGHT_OF_A_RUN = "kept: torch.fx cannot trace the code around it as it ran on the example"


def fold_batch_norm(model: nn.Module, *, example_inputs: Any = None, ignore: Ignore = (), inplace: bool = False) -> nn.Module:
    """Fold each BatchNorm into the Linear or Conv whose output only it reads; an ``nn.Identity`` takes its place.

        weight' = weight * gamma / sqrt(var + eps)
        bias'   = (bias - mean) * gamma / sqrt(var + eps) + beta

    The model computes the same in evaluation mode (Jacob et al. 2018, section 3.2, arXiv 1712.05877). Pairs are found by tracing with
    ``torch.fx``. A BatchNorm that stays gets a note (``nn.base.get_note``) with the reason.

    - ``example_inputs``: a tensor, a tuple of positional or a mapping of keyword arguments. The model runs once on it, and the trace is
      used where it shows what happened. Needed for what lies in code that cannot be traced
    - ``ignore``: layers or BatchNorms to leave alone

    >>> model = fold_batch_norm(model)
    """
    check_model("fold_batch_norm", model)
    entries = check_ignore("fold_batch_norm", model, ignore)
    calls = None if example_inputs is None else example_run("fold_batch_norm", model, example_inputs)[1]
    with untouched(model):  # reading a parametrized weight may change buffers
        pairs, reasons = foldable(model, calls, entries)
    if not inplace:
        model = copy_model(model)
    fold_pairs(model, pairs, reasons)
    return model


def foldable(model: nn.Module, calls: Calls | None, ignore: Ignore = ()) -> tuple[dict[str, str], dict[str, str]]:
    """({BatchNorm: layer before it}, {BatchNorm that stays: reason}), by first path. Changes nothing. ``calls``: see ``graphs``."""
    norms = {norm: paths[0] for norm, paths in all_names(model).items() if isinstance(norm, _NORMS)}
    if not norms:
        return {}, {}
    names = all_names(model)
    tied = _tied(model)
    pairs: dict[str, str] = {}
    reasons = dict.fromkeys(norms.values(), _OUT_OF_SIGHT if calls is None else _OUT_OF_SIGHT_OF_A_RUN)
    traced = list(graphs(model, calls))
    in_sight = {module for courses in traced for course in courses for module in course.calls}
    reasons.update(
        (norms[norm], "kept: no Linear or Conv right before it whose output it alone reads") for norm in norms if norm in in_sight
    )
    for layer, norm in [pair for courses in traced for pair in in_all(courses, _adjacent)]:
        if norms[norm] in pairs:
            continue
        reason = _obstacle(layer, norm, tied)
        if reason is None and any(ignored(path, module, ignore) for module in (layer, norm) for path in names[module]):
            reason = "named in ignore"
        if reason is None:
            pairs[norms[norm]] = names[layer][0]
            del reasons[norms[norm]]
        else:
            reasons[norms[norm]] = f"kept: {reason}"
    return pairs, reasons


def fold_pairs(model: nn.Module, pairs: dict[str, str], reasons: dict[str, str]) -> None:
    """Carry out what ``foldable`` found, in place."""
    for norm_name, layer_name in pairs.items():
        norm, layer = model.get_submodule(norm_name), model.get_submodule(layer_name)
        if _fold(layer, norm):
            replace(model, norm, nn.Identity())
        else:
            reasons = {**reasons, norm_name: "kept: the weight before it has a parametrization that does not scale"}
    for norm_name, reason in reasons.items():
        set_note(model.get_submodule(norm_name), reason)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _NORMS) for module in model.modules())


def _obstacle(layer: Layer, norm: Norm, tied: set[int]) -> str | None:
    for module in (layer, norm):
        method = own_method(module, next(kind for kind in (*_PAIRS, *_NORMS) if isinstance(module, kind)))
        if method is not None:
            return f"a {type(module).__name__} has a {method} of its own"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if norm.num_features != layer.weight.shape[0]:
        return "it does not normalize the output channels of the layer before it"
    if any(id(parameter) in tied for part in (layer, norm) for parameter in part.parameters()):
        return "it or the layer before it shares a parameter with another layer"
    if any(module._forward_hooks or module._forward_pre_hooks for module in (layer, norm)):
        return "it or the layer before it has hooks"
    return None


def _tied(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _adjacent(traced: Traced) -> Iterator[tuple[Layer, Norm]]:
    """(layer, BatchNorm) pairs in which both are called once and the BatchNorm alone reads the layer's output."""
    for node in traced.graph.nodes:
        norm = traced.module(node)
        before = node.args[0] if norm is not None and node.args else None
        if not isinstance(before, fx.Node) or len(before.users) != 1:
            continue
        layer = traced.module(before)
        matches = any(isinstance(layer, kind) and isinstance(norm, norm_kind) for kind, norm_kind in _PAIRS.items())
        # Weights that the graph reads directly would change under their reader when folded into.
        if matches and traced.called_once(layer) and traced.called_once(norm) and not traced.read_directly(layer):
            yield layer, norm


@torch.no_grad()
def _fold(layer: Layer, norm: Norm) -> bool:
    """Fold in place; False, with nothing changed, if a parametrization of the weight does not let the factor through."""
    mean, var, eps = norm.running_mean, norm.running_var, norm.eps
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
    dtype = layer.weight.dtype
    factor = gamma.double() / torch.sqrt(var.double() + eps)
    shape = (-1, *[1] * (layer.weight.dim() - 1))
    weight = layer.weight.double() * factor.view(shape)
    if not _assign_weight(layer, weight.to(dtype), factor.view(shape).to(dtype)):
        return False
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
    bias = ((bias.double() - mean.double()) * factor + beta.double()).to(dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias)
    else:
        layer.bias.copy_(bias)
    return True


def _assign_weight(layer: Layer, weight: Tensor, factor: Tensor) -> bool:
    if not parametrize.is_parametrized(layer, "weight"):
        layer.weight.copy_(weight)
        return True
    # A mask commutes with a factor per output channel, a weight norm does not: try it and look.
    chain = layer.parametrizations.weight
    if not chain.is_tensor:
        return False
    before = chain.original.clone()
    chain.original.mul_(factor)
    if torch.allclose(layer.weight, weight, rtol=1e-4, atol=0):
        return True
    chain.original.copy_(before)
    return False
