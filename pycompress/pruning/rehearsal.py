"""Cuts are tried on a copy before the model is touched: it has to run, to keep its output shapes, and to read the right channels."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..analysis.inputs import split_inputs
from .criteria import SCORABLE
from .graph import Cuts, apply_cuts
from .inputs import tensors_in


def rehearse(model: nn.Module, cuts: Cuts, example_inputs: Any) -> None:
    """Raise what the cut model raises, or ``RuntimeError`` if outputs change their shape or a layer reads the wrong channels."""
    args, kwargs = split_inputs("Pruner", example_inputs)
    twin = deepcopy(model).eval()
    with torch.no_grad():
        before = [tuple(tensor.shape) for tensor in tensors_in(twin(*args, **kwargs))]
        cut = deepcopy(model).eval()
        apply_cuts(cut, cuts)
        after = [tuple(tensor.shape) for tensor in tensors_in(cut(*args, **kwargs))]
        if before != after:
            raise RuntimeError(f"output shapes change from {before} to {after}")
        _check_reads(twin, cuts, lambda: twin(*args, **kwargs))


def _check_reads(model: nn.Module, cuts: Cuts, forward: Callable[[], Any]) -> None:
    """Follow noise from the channels to be removed to the layers that lose inputs.

    A permutation between two layers (channel shuffle) keeps all shapes, so a cut model would run and read the wrong channels. The
    inputs to be removed have to be among those that the noise reaches, or the noise has to stay within them. (It reaches all inputs
    after a normalisation over channels, and not all after a dead unit.) Changes the weights of ``model``.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SCORABLE)}
    removed: dict[str, dict[str, list[int]]] = {"in": {}, "out": {}}
    for (name, side), (_, indices) in cuts.items():
        if name in layers:
            removed[side][name] = indices
    for name, indices in removed["in"].items():  # so that noise that arrives at the right place stops there
        _stop_reading(layers[name], indices)
    seen: dict[str, list[Tensor]] = {}
    listeners = [layers[name].register_forward_pre_hook(_record(seen, name)) for name in removed["in"]]
    forward()
    clean = dict(seen)
    reached: dict[str, set[int]] = {name: set() for name in removed["in"]}
    for sign in (1.0, -1.0):  # ReLU passes one of them
        seen.clear()
        noise = [layers[name].register_forward_hook(_add_noise(indices, sign)) for name, indices in removed["out"].items()]
        forward()
        for handle in noise:
            handle.remove()
        for name, inputs in seen.items():
            for old, new in zip(clean[name], inputs, strict=True):
                reached[name] |= set((new != old).flatten(1).any(1).nonzero().flatten().tolist())
    for handle in listeners:
        handle.remove()
    for name, indices in removed["in"].items():
        if reached[name] - set(indices) and set(indices) - reached[name]:
            raise RuntimeError(
                f"layer {name!r} reads other channels than the ones that follow the removed ones, after a permutation or reshape"
            )


def _stop_reading(layer: nn.Module, indices: list[int]) -> None:
    """Zero the weights of some inputs."""
    assert isinstance(layer, SCORABLE)
    if isinstance(layer, _ConvTransposeNd):
        layer.weight[indices] = 0
        return
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        layer.weight[:, indices] = 0
        return
    weight = layer.weight.view(groups, -1, *layer.weight.shape[1:])  # (groups, out / groups, in / groups, ...)
    for index in indices:
        weight[index // weight.shape[2], :, index % weight.shape[2]] = 0


def _channels_first(layer: nn.Module, tensor: Tensor) -> Tensor:
    """(channels, everything else): a view."""
    axis = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1
    return tensor.movedim(axis, 0)


def _record(seen: dict[str, list[Tensor]], name: str) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            seen.setdefault(name, []).append(_channels_first(layer, args[0]).flatten(1).clone())

    return hook


def _add_noise(indices: list[int], sign: float) -> Callable[..., Tensor]:
    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        channels = _channels_first(layer, output)
        # Far above the signal, so that no nonlinearity hides it; uneven, so that no normalisation removes it.
        strength = 100 * output.abs().max().clamp(min=1)
        noise = torch.rand(channels[indices].shape, generator=torch.Generator().manual_seed(0)).to(output)
        channels[indices] += sign * strength * (1 + noise)
        return output

    return hook
