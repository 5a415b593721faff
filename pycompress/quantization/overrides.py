"""Layers that compute something else than the torch type they are derived from."""

from __future__ import annotations

from torch import nn

_COMPUTATION = ("forward", "_conv_forward", "__call__", "_call_impl")
"""What decides about the result of a call; ``_conv_forward`` is where the forward of a convolution does its work."""


def own_method(module: nn.Module, base: type[nn.Module]) -> str | None:
    """The method by which a module computes something else than ``base``, of which it is an instance: one that a subclass overrides, or one
    put onto the instance (``layer.forward = ...``). None if it computes what ``base`` computes.

    >>> own_method(nn.Linear(4, 4), nn.Linear)
    """
    kinds = type(module).__mro__
    places = [vars(module), *(vars(kind) for kind in kinds[: kinds.index(base)])]
    return next((name for name in _COMPUTATION for place in places if name in place), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether code of the user sees or changes what goes into or comes out of this module, or the gradients of that."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
