"""Taking parametrizations off without breaking copies of the module."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def remove_parametrizations(module: nn.Module, name: str, *, leave_parametrized: bool = True) -> nn.Module:
    """``torch.nn.utils.parametrize.remove_parametrizations``, safe for modules that were copied.

    ``copy.deepcopy`` of a parametrized module shares its made-up class with the original, and torch's function deletes the property
    from that class: afterwards the *other* module has no ``weight`` any more (seen with torch 2.13). So the module gets a
    class of its own first.
    """
    if parametrize.is_parametrized(module, name):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    return parametrize.remove_parametrizations(module, name, leave_parametrized)
