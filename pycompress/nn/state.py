"""What a model is made of when all training helpers are taken off: its layers and their effective tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .base import CompressedModule


class Slot(NamedTuple):
    """A tensor that a module owns itself."""

    name: str
    tensor: torch.Tensor
    is_parameter: bool
    identity: Hashable
    """Equal for tied tensors, i.e. one parameter that hangs in several modules."""


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, by its first path, parents first. Parametrizations and the insides of compressed layers are
    left out: they are part of the layer they belong to."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def walk(path: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        found[path] = module
        if isinstance(module, CompressedModule):
            return
        for name, child in module.named_children():
            if not (name == "parametrizations" and parametrize.is_parametrized(module)):
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def own_slots(module: nn.Module, *, all_buffers: bool = False) -> Iterator[Slot]:
    """Parameters and buffers of the module itself, not of its children; buffers outside the state_dict on request only.

    A parametrized tensor (mask, fake quantization, weight norm) appears under its plain name with its effective value.
    For a compressed layer these are the canonical tensors of its state_dict.
    """
    if isinstance(module, CompressedModule):
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield Slot(name, tensor, isinstance(tensor, nn.Parameter), (id(module), name))
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Slot(name, parameter, True, id(parameter))
    for name, buffer in module._buffers.items():
        if buffer is not None and (all_buffers or name not in module._non_persistent_buffers_set):
            yield Slot(name, buffer, False, id(buffer))
    for name, (tensor, is_parameter) in effective(module).items():
        yield Slot(name, tensor, is_parameter, (id(module), name))


def effective(module: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    """The parametrized tensors of a module: name -> (value in use, whether the original is a parameter)."""
    if not parametrize.is_parametrized(module):
        return {}
    with torch.no_grad():
        return {
            name: (getattr(module, name).detach(), next(parametrization.parameters(recurse=False), None) is not None)
            for name, parametrization in module.parametrizations.items()  # type: ignore[union-attr, operator]
        }
