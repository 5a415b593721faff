"""Everything a pruner verifies before it touches a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..nn.surgery import ignored
from .mask import stored_weight, weight_of
from .patterns import NM, Pattern
from .unseen import attention_outputs


def check_ratio(where: str, ratio: Any) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(f"{where}: ratio must be in [0, 1), got {ratio!r}")
    return float(ratio)


def check_positive(where: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {name} must be a positive integer, got {value!r}")
    return value


def check_training(where: str, training: Any, sparse_decay: Any, pattern: str) -> float | None:
    """The decay of straight-through masks; None for ordinary ones."""
    if training not in ("masked", "sr-ste"):
        raise ValueError(f"{where}: training must be 'masked' or 'sr-ste', got {training!r}")
    if training == "masked":
        if sparse_decay is not None:
            raise ValueError(f"{where}: sparse_decay must be left out with training='masked', it is for 'sr-ste'")
        return None
    if pattern == "channel":
        raise ValueError(f"{where}: training must be 'masked' with pattern 'channel', which has no masks, got 'sr-ste'")
    if sparse_decay is None:
        return 2e-4
    if isinstance(sparse_decay, bool) or not isinstance(sparse_decay, (int, float)) or not 0 <= sparse_decay < math.inf:
        raise ValueError(f"{where}: sparse_decay must be a finite number >= 0, got {sparse_decay!r}")
    return float(sparse_decay)


def resolve_ratios(where: str, ratio: Any, pattern: Pattern | None, scope: str, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Layer name -> ratio. A dict's keys are names or patterns as in ``ignore``; the exact name wins, then the first match.

    Layers that a dict does not name get no entry. N:M patterns know their ratio; another one is an error.
    """
    if isinstance(pattern, NM):
        implied = 1 - pattern.n / pattern.m
        if isinstance(ratio, Mapping) or (ratio is not None and abs(check_ratio(where, ratio) - implied) > 1e-6):
            raise ValueError(f"{where}: ratio must be {implied:g} or left out with pattern {pattern.name!r}, got {ratio!r}")
        return dict.fromkeys(layers, implied)
    if ratio is None:
        raise ValueError(f"{where}: ratio must be given, a share in [0, 1)")
    if not isinstance(ratio, Mapping):
        return dict.fromkeys(layers, check_ratio(where, ratio))
    if scope == "global":
        raise ValueError(f"{where}: ratio must be one number with scope='global', got a dict")
    if not ratio:
        raise ValueError(f"{where}: ratio must name at least one layer, got an empty dict")
    for key, value in ratio.items():
        check_ratio(where, value)
        if not isinstance(key, str):
            raise TypeError(f"{where}: ratio must have layer names or patterns as keys, got {key!r}")
        if not any(ignored(name, layer, [key]) for name, layer in layers.items()):
            raise ValueError(f"{where}: ratio names {key!r}, which matches no prunable layer; there are {', '.join(map(repr, layers))}")
    found = {}
    for name, layer in layers.items():
        matches = [name] if name in ratio else [key for key in ratio if ignored(name, layer, [key])]
        if matches:
            found[name] = float(ratio[matches[0]])
    return found


def check_weights(where: str, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        stored = stored_weight(layer)
        if stored is not None and is_lazy(stored):
            raise ValueError(f"{where}: layer {name!r} must have its shape: run the model once before pruning it")
        if not bool(torch.isfinite(weight_of(layer)).all()):
            raise ValueError(f"{where}: weights must be finite, got NaN or infinite ones in layer {name!r}")


def check_untied(where: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """A mask on one of two layers with the same Parameter would either miss the other or zero it behind its back."""
    shared = tied(model)
    for name, layer in layers.items():
        parts = {f"{name}.{part}".strip(".") for part, _ in layer.named_modules()}
        if parts & shared:
            raise ValueError(f"{where}: layer {name!r} must have a weight of its own, got one shared with another layer; put it in ignore")


def check_called(where: str, model: nn.Module, layers: Mapping[str, nn.Module], needs: frozenset[str]) -> None:
    """Inputs of a layer can only be seen where the layer is called."""
    silent = attention_outputs(layers, model) if "activations" in needs else []
    if silent:
        raise ValueError(
            f"{where}: a criterion that needs activations must see the inputs of every layer, got {', '.join(map(repr, silent))}, whose "
            "weight nn.MultiheadAttention uses without calling the layer; put it in ignore or choose another criterion"
        )


def check_plain(where: str, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"{where}: moving or removing channels (pattern 'channel') needs plain weights, got parametrized ones in layer {name!r}; "
                "convert masks and fake quantization first, or do it before them"
            )


def tied(model: nn.Module) -> set[str]:
    """Names of modules that own a Parameter which another module owns too."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}
