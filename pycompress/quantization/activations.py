"""Activation modules that the layers of this library can take in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}


def activation_of(module: nn.Module | None) -> str | None:
    """The name by which the layers know this activation, None for others and for modules that are no activations.

    >>> activation_of(nn.GELU())
    'gelu'
    """
    kind = type(module)
    if kind in _ACTIVATIONS:
        return _ACTIVATIONS[kind]
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else None  # type: ignore[union-attr]
    if kind.__module__ == "transformers.activations":  # told by name, so that transformers need not be installed
        if kind.__name__ == "SiLUActivation":
            return "silu"
        if kind.__name__ == "GELUActivation" and getattr(module, "act", None) is F.gelu:
            return "gelu"
    return None
